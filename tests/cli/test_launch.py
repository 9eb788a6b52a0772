"""Runs as a user starts them: real processes, from a folder outside the checkout."""

import json
import signal
import subprocess
import sys
from itertools import islice

import pytest
import torch
from diffusers import QwenImagePipeline
from launched import BIN, GLOO, ROOT, TWO, here, run, start
from safetensors.torch import load_file

from align.tiny import CHECKPOINT, PROMPTS

#: What is measured when a run ends.
HELD_OUT = ["--num_generations_eval", "1", "--eval_dataset_name", "./held_out.jsonl"]
HELD_OUT += ["--guard_dataset_names", "./held_out.jsonl"]
SHORT = [
    *("--eval_strategy", "no", "--eval_on_start", "false", "--num_generations", "4", "--generation_batch_size", "8"),
    *("--per_device_train_batch_size", "8", "--gradient_accumulation_steps", "2", "--num_inference_steps", "4"),
    *("--sde_window_size", "2", "--num_prefixes", "4", "--disable_tqdm", "true", *HELD_OUT),
]
REWARD = """
from PIL import ImageStat

def score(images, prompts, spec):
    assert all(s["kind"] in ("count", "pair", "word") for s in spec) and len(spec) == len(images)
    return [ImageStat.Stat(image).mean[0] / 255 for image in images]
"""
SOME_SCORED = """

def some(images, prompts, spec):
    return [s if "square" in p else None for s, p in zip(score(images, prompts, spec), prompts)]
"""


GRPO = [
    ROOT / "align/grpo.py",
    "--config",
    ROOT / "configs/tiny/grpo.yaml",
    *SHORT,
    "--rewards",
    "./my_reward.py:score",
]


def fill(folder):
    """Put a reward and held-out prompts in a folder."""
    (folder / "my_reward.py").write_text(REWARD)
    with (PROMPTS / "background/test.jsonl").open() as rows:
        (folder / "held_out.jsonl").write_text("".join(islice(rows, 4)))
    return folder


@pytest.fixture
def outside(tmp_path):
    return fill(tmp_path)


def lora(folder):
    return load_file(folder / "pytorch_lora_weights.safetensors")


def log_of(folder):
    return json.loads((folder / "trainer_state.json").read_text())["log_history"]


@pytest.mark.parametrize("door", [[ROOT / "align/grpo.py"], ["-m", "align.grpo"]], ids=["by-path", "by-module"])
def test_custom_reward_from_a_folder_outside_the_checkout(outside, door):
    launch = [BIN / "accelerate", "launch", "--num_processes", "1"]
    output = run(outside, *launch, *door, *GRPO[1:], "--max_steps", "2", "--output_dir", "out")
    assert [entry["step"] for entry in log_of(outside / "out") if "rewards/score/mean" in entry] == [1, 2]
    assert "| score |" in output
    pipe = QwenImagePipeline.from_pretrained(CHECKPOINT, dtype=torch.float32)
    pipe.load_lora_weights(outside / "out")
    image = pipe("a circle", height=64, width=64, num_inference_steps=2).images[0]
    assert pipe.get_active_adapters() == ["default_0"] and image.size == (64, 64)


def wait_for_update(process: subprocess.Popen, count: int) -> str:
    """Read the log until ``count`` updates were logged; returns what was read."""
    read = []
    assert process.stdout is not None
    for line in process.stdout:
        read.append(line)
        if sum("'loss'" in seen for seen in read) >= count:
            return "".join(read)
    raise AssertionError("".join(read)[-3000:])


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The LoRA of six undisturbed updates."""
    folder = fill(tmp_path_factory.mktemp("whole"))
    here(folder, *GRPO, "--max_steps", "6", "--output_dir", "out")
    return lora(folder / "out")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_leaves_a_checkpoint_that_resumes_to_the_same_result(outside, whole, number):
    words = [*GRPO, "--max_steps", "6", "--output_dir", "cut"]
    process = start(outside, sys.executable, *words)
    wait_for_update(process, 2)
    process.send_signal(number)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    assert f"{number.name}: finishing this update" in output
    assert "--resume_from_checkpoint cut/checkpoint-" in output
    done = int(output.rpartition("checkpoint-")[2].split()[0])
    assert 2 <= done < 6
    here(outside, *words, "--resume_from_checkpoint", "true")
    cut = lora(outside / "cut")
    assert all((whole[key] == cut[key]).all() for key in whole)


def test_a_finished_run_is_not_overwritten_unasked(outside):
    words = [*GRPO, "--max_steps", "1", "--output_dir", "out"]
    here(outside, *words, "--save_strategy", "steps", "--save_steps", "1")
    with pytest.raises(SystemExit, match="error: out holds checkpoint-1 of an earlier run: pass --resume_from_check"):
        here(outside, *words, "--overwrite_output_dir", "false")


def test_a_signal_to_the_launcher_leaves_a_checkpoint_too(outside):
    launch = [BIN / "accelerate", "launch", "--num_processes", "1"]
    process = start(outside, *launch, *GRPO, "--max_steps", "200", "--output_dir", "cut")
    wait_for_update(process, 2)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=120)  # ends when the run, which outlives its launcher, has ended
    assert "interrupted; go on with: --resume_from_checkpoint cut/checkpoint-" in output
    assert list((outside / "cut").glob("checkpoint-*/model.safetensors"))


def test_two_processes_make_the_images_and_the_updates_of_one(outside):
    words = [*GRPO, "--max_steps", "4"]
    words += ["--gradient_accumulation_steps", "1"]  # two updates a rollout: its rows must be dealt alike
    words += ["--optim", "sgd", "--learning_rate", "1"]  # Adam's first steps amplify rounding to the learning rate
    here(outside, *words, "--output_dir", "one")
    run(outside, *TWO, *words, "--output_dir", "two", "--per_device_train_batch_size", "4", *GLOO)
    logs = [log_of(outside / name) for name in ("one", "two")]
    for key in ("reward", "reward_std", "loss", "grad_norm", "forward_equivalents"):
        one, two = ([entry[key] for entry in log if key in entry] for log in logs)
        assert one == pytest.approx(two, rel=1e-2, abs=1e-6), key  # images are rounded to bytes before they are scored
    one, two = (lora(outside / name) for name in ("one", "two"))
    assert max((one[key] - two[key]).abs().max().item() for key in one) < 1e-4


def test_two_processes_make_the_pairs_and_the_updates_of_one(outside):
    """Online DPO, with groups that make no pair: a process whose part of an update is empty must keep in step."""
    (outside / "my_reward.py").write_text(REWARD + SOME_SCORED)
    common = [ROOT / "align/dpo_online.py", "--config", ROOT / "configs/tiny/dpo_online.yaml", "--eval_strategy", "no"]
    common += ["--eval_on_start", "false", "--num_generations", "4", "--generation_batch_size", "32", "--disable_tqdm"]
    common += ["true", *HELD_OUT, "--num_inference_steps", "3", "--max_steps", "8", "--rewards", "./my_reward.py:some"]
    common += ["--num_iterations", "2", "--optim", "sgd", "--learning_rate", "0.1", "--use_cpu", "true"]
    here(outside, *common, "--per_device_train_batch_size", "4", "--output_dir", "one")
    run(
        outside, *TWO, *common, "--output_dir", "two", "--per_device_train_batch_size", "2",
        "--ddp_backend", "gloo", "--save_strategy", "steps", "--save_steps", "6",
    )  # fmt: skip
    logs = [log_of(outside / name) for name in ("one", "two")]
    for key in ("reward", "dead_groups", "loss", "grad_norm"):
        one, two = ([entry[key] for entry in log if key in entry] for log in logs)
        assert one == pytest.approx(two, rel=1e-2, abs=1e-6), key  # images are rounded to bytes before they are scored
    dead = [entry["dead_groups"] for entry in logs[0] if "dead_groups" in entry]
    assert len(dead) == 2 and all(0.5 < share < 1 for share in dead)
    one, two = (lora(outside / name) for name in ("one", "two"))
    assert max((one[key] - two[key]).abs().max().item() for key in one) < 1e-4
    # From the middle of the second rollout, which two processes sampled, one process goes on to the same end.
    here(
        outside, *common, "--per_device_train_batch_size", "4", "--output_dir", "rest",
        "--resume_from_checkpoint", "two/checkpoint-6",
    )  # fmt: skip
    rest = lora(outside / "rest")
    assert max((one[key] - rest[key]).abs().max().item() for key in one) < 1e-4


def test_two_processes_make_the_points_and_the_updates_of_one(outside):
    """DiffusionNFT, with a sampling policy of its own and dead groups, resumed in the middle of a rollout."""
    (outside / "my_reward.py").write_text(REWARD + SOME_SCORED)
    common = [ROOT / "align/nft.py", "--config", ROOT / "configs/tiny/nft.yaml", "--eval_strategy", "no"]
    common += ["--eval_on_start", "false", "--num_generations", "4", "--generation_batch_size", "32", "--disable_tqdm"]
    common += [
        "true",
        *HELD_OUT,
        "--num_inference_steps",
        "3",
        "--num_train_sigmas",
        "1",
        "--gradient_accumulation_steps",
        "1",
    ]
    common += ["--sampling_decay_rate", "0.3", "--max_steps", "4", "--rewards", "./my_reward.py:some"]
    common += ["--train_sigmas", "schedule", "--optim", "sgd", "--learning_rate", "0.1", "--use_cpu", "true"]
    here(outside, *common, "--per_device_train_batch_size", "16", "--output_dir", "one")
    two = [*TWO, *common, "--per_device_train_batch_size", "8", "--ddp_backend", "gloo"]
    run(outside, *two, "--output_dir", "two", "--save_strategy", "steps", "--save_steps", "3")
    run(outside, *two, "--output_dir", "rest", "--resume_from_checkpoint", "two/checkpoint-3")
    logs = [log_of(outside / name) for name in ("one", "two")]
    for key in ("reward", "dead_groups", "loss", "grad_norm", "old_distance", "sampling_decay"):
        one, other = ([entry[key] for entry in log if key in entry] for log in logs)
        assert one == pytest.approx(other, rel=1e-2, abs=1e-6), key  # images are bytes when they are scored
    one, other, rest = (lora(outside / name) for name in ("one", "two", "rest"))
    assert max((one[key] - other[key]).abs().max().item() for key in one) < 1e-4
    assert all((other[key] == rest[key]).all() for key in other)


def test_a_wrong_word_is_answered_with_a_sentence(outside):
    process = start(outside, sys.executable, *GRPO[:-1], "warm_backgroud")
    output, _ = process.communicate(timeout=120)
    assert process.returncode != 0
    assert "error: unknown reward 'warm_backgroud'. Did you mean 'warm_background'?" in output
    assert "Traceback" not in output and "Loading pipeline" not in output


def test_each_algorithm_goes_on_from_the_last_one(outside):
    """SFT, preferences of its model, DPO from its LoRA, GRPO from DPO's: each by path, each from what the last one left."""
    tiny, cache = ROOT / "configs/tiny", ["--cache_dir", "cache", "--disable_tqdm", "true", "--eval_on_start", "false"]
    cache += ["--eval_prompts_name", "./held_out.jsonl", "--num_generations_eval", "1"]
    here(outside, ROOT / "align/sft.py", "--config", tiny / "sft_style.yaml", *cache, "--max_steps", "2",
        "--eval_strategy", "no", "--output_dir", "style")  # fmt: skip
    here(outside, ROOT / "align/generate.py", "--config", tiny / "generate.yaml", "--max_prompts", "8", "--num_generations", "4",
        "--adapter", "style", "--rewards", "./my_reward.py:score", "--output_dir", "pairs")  # fmt: skip
    output = here(outside, ROOT / "align/dpo.py", "--config", tiny / "dpo.yaml", *cache, "--max_steps", "2",
        "--eval_strategy", "no", "--dataset_name", "pairs", "--eval_dataset_name", "pairs/train",
        "--guard_dataset_names", "./held_out.jsonl", "--adapter", "style", "--output_dir", "preferred")  # fmt: skip
    assert "| accuracy | not measured | 0." in output  # evaluated at the end alone
    assert abs(next(entry["loss"] for entry in log_of(outside / "preferred") if "loss" in entry) - 0.693147) < 1e-5
    style, preferred = (lora(outside / name) for name in ("style", "preferred"))
    assert style.keys() == preferred.keys() and any((style[k] != preferred[k]).any() for k in style)
    # At no learning rate GRPO leaves the LoRA as DPO left it, which is also the reference of its KL.
    here(outside, *GRPO, "--max_steps", "1", "--adapter", "preferred", "--learning_rate", "0", "--beta", "0.1",
        "--output_dir", "rewarded")  # fmt: skip
    rewarded = lora(outside / "rewarded")
    assert rewarded.keys() == preferred.keys() and all((rewarded[k] == preferred[k]).all() for k in preferred)
    assert next(entry["kl_total"] for entry in log_of(outside / "rewarded") if "kl_total" in entry) == 0
