"""The shipped launcher configs on two CPU processes, with real DeepSpeed: against one process, resumed, and exported."""

import json
import os
import pickle
import shutil
import socket
import subprocess
from itertools import product
from pathlib import Path

import namespaces
import pytest
import scaled
import torch
from accelerate.utils import DeepSpeedPlugin
from diffusers import QwenImageTransformer2DModel
from launched import BIN, ROOT, finish, on_cpu, start
from safetensors.torch import load_file
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from align.dpo import DPOConfig
from align.engine import checkpoints
from align.engine.resume import _check_rows
from align.parallel.sharding import (
    SHARDING,
    TENSORS_ONLY,
    Sharding,
    check_launch,
    check_zero,
    sharded_otherwise,
    tensors_only,
)
from align.sft import SFTConfig
from align.tiny import CHECKPOINT

pytestmark = pytest.mark.skipif(scaled.why_not() is not None, reason=str(scaled.why_not()))
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("scaled")


@pytest.fixture(scope="module")
def alone(folder):
    """``alone(algorithm)``: its run on one process."""
    runs: dict[str, scaled.Run] = {}

    def once(algorithm: str) -> scaled.Run:
        if algorithm not in runs:
            if algorithm == "dpo":
                scaled.make_pairs(folder)
            runs[algorithm] = scaled.train(folder, algorithm, None, f"{algorithm}-one")
        return runs[algorithm]

    return once


def check_equal(one: scaled.Run, two: scaled.Run) -> None:
    for key in ("loss", "learning_rate"):
        assert two.logged(key) == pytest.approx(one.logged(key), abs=TOLERANCE), key
    assert two.logged("grad_norm") == pytest.approx(one.logged("grad_norm"), rel=1e-2)
    assert min(one.logged("grad_norm")) > 0.001  # so that they were clipped
    assert scaled.largest_difference(one.trained(1), one.trained(scaled.UPDATES)) > 100 * TOLERANCE
    for update in range(1, scaled.UPDATES + 1):
        assert scaled.largest_difference(one.trained(update), two.trained(update)) < TOLERANCE
    assert scaled.largest_difference(one.lora, two.lora) < TOLERANCE


def check_export(run: scaled.Run) -> None:
    loaded = run.loaded_by_stock()
    assert scaled.largest_difference(loaded, run.trained(scaled.UPDATES)) == 0
    assert all(value.any() for value in loaded.values())  # B too, which begins at 0


def check_resumed(whole: scaled.Run, rest: scaled.Run) -> None:
    for key in ("loss", "grad_norm", "learning_rate"):
        assert rest.logged(key, 1) == whole.logged(key, 1), key
    assert scaled.largest_difference(whole.lora, rest.lora) == 0


def check_grpo(run: scaled.Run) -> None:
    """What its log and its first checkpoint say."""
    first = run.log[0]
    assert first["ratio_deviation_at_start"] == 0 and first["ratio_min"] == first["ratio_max"] == 1
    assert first["kl_total"] == 0 < run.log[1]["kl_total"]  # the reference is the model without its adapter
    checkpoint = run.folder / "checkpoint-1"
    base = (ROOT / "align/tiny/checkpoint/transformer/diffusion_pytorch_model.safetensors").stat().st_size
    assert sum(f.stat().st_size for f in checkpoint.glob("global_step1/*model_states.pt")) < base / 4
    assert {f.stat().st_mode & 0o022 for f in checkpoint.rglob("*")} == {0}  # for others to write into
    with tensors_only():  # all of it passes, and a bomb does not
        for file in checkpoint.glob("global_step1/*.pt"):
            assert torch.load(file, weights_only=False)


def test_grpo_on_two_processes_is_the_run_of_one_and_resumes_and_exports(folder, alone):
    """Under ZeRO-3."""
    two, rest = scaled.train_and_resume(folder, "grpo", "zero3", "grpo-zero3")
    check_equal(alone("grpo"), two)
    check_export(two)
    check_grpo(two)
    check_resumed(two, rest)


def test_a_run_of_two_processes_goes_on_on_one(folder, alone):
    """Under ZeRO-2, in the middle of a rollout."""
    two = scaled.train(folder, "grpo", "zero2", "grpo-zero2")
    check_equal(alone("grpo"), two)
    check_export(two)
    check_grpo(two)
    assert (two.folder / "checkpoint-1/rollout-1-of-2.safetensors").is_file()
    rest = scaled.resume(folder, "grpo", "zero2", two, processes=1)
    check_moved(two, rest)
    assert "ZeRO-2 on 2 processes, and this run is under DeepSpeed ZeRO-2 on 1" in rest.output


@pytest.mark.slow
@pytest.mark.parametrize(("algorithm", "launcher"), product(scaled.ALGORITHMS, scaled.LAUNCHERS))
def test_every_algorithm_under_every_launcher(folder, alone, algorithm, launcher):
    one = alone(algorithm)
    two, rest = scaled.train_and_resume(folder, algorithm, launcher, f"every-{algorithm}-{launcher}")
    check_equal(one, two)
    check_export(two)
    check_resumed(two, rest)


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["ddp", "zero3"])
def test_what_a_group_has_in_common_is_computed_once_on_two_processes_too(folder, launcher):
    one = scaled.train(folder, "grpo", None, f"grpo-prefix-{launcher}-one", "--num_prefixes", "2")
    two, rest = scaled.train_and_resume(folder, "grpo", launcher, f"grpo-prefix-{launcher}", "--num_prefixes", "2")
    check_equal(one, two)
    # An update's two parts may end within what images have in common, on each of two processes at a place of its own: what
    # is cut there is computed once more (forward 1, backward 2, reference 1). With nothing in common it were 16 an update.
    costs = zip(one.logged("forward_equivalents"), two.logged("forward_equivalents"), strict=True)
    assert all(-4 <= cost_two - cost <= 2 * 4 for cost, cost_two in costs)
    check_resumed(two, rest)


#: What large models are trained in; without a GPU it has to be said that this is meant.
BFLOAT16 = ("--dtype", "bfloat16", "--bf16", "true", "--use_cpu", "true")


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ["grpo", "sft"])
@pytest.mark.parametrize("launcher", ["zero2", "zero3"])
def test_bfloat16_is_trained_alike_resumes_exactly_and_exports(folder, algorithm, launcher):
    one = scaled.train(folder, algorithm, None, f"{algorithm}-{launcher}-bf16-one", *BFLOAT16)
    two, rest = scaled.train_and_resume(folder, algorithm, launcher, f"{algorithm}-{launcher}-bf16", *BFLOAT16)
    # GRPO's is a sum of advantages that cancel, times ratios near 1: what is left is of the order of their rounding.
    assert two.logged("loss") == pytest.approx(one.logged("loss"), rel=2e-2, abs=1e-4)
    assert two.logged("grad_norm") == pytest.approx(one.logged("grad_norm"), rel=2e-2)
    if algorithm == "grpo":
        assert two.log[0]["ratio_deviation_at_start"] < two.log[0]["ratio_tolerance"] / 10
        assert two.log[0]["reward"] == pytest.approx(one.log[0]["reward"], rel=5e-3)
    moved = scaled.largest_difference(one.trained(1), one.trained(scaled.UPDATES))
    assert scaled.largest_difference(single(one.lora), single(two.lora)) < moved / 5
    check_export(two)
    check_resumed(two, rest)


def single(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """In float32: DeepSpeed keeps such a copy for its optimizer alone, and what is sampled with, and exported, is rounded."""
    return {name: value.float() for name, value in state.items()}


# --- Resumed on other processes than wrote the checkpoint, in the middle of a rollout ---

#: With moments, which are shared out as well. So large an epsilon keeps Adam from amplifying rounding.
ADAM = (
    *("--optim", "adamw_torch", "--learning_rate", "1e-3", "--adam_epsilon", "1e-4", "--max_grad_norm", "1"),
    *("--weight_decay", "0.1"),
)


def check_moved(whole: scaled.Run, rest: scaled.Run) -> None:
    """The two updates after the checkpoint are those of the undisturbed run."""
    for key in ("loss", "learning_rate", "grad_norm"):
        assert rest.logged(key, 1) == pytest.approx(whole.logged(key, 1), abs=TOLERANCE), key
    assert scaled.largest_difference(whole.lora, rest.lora) < TOLERANCE
    assert scaled.largest_difference(whole.trained(1), whole.trained(scaled.UPDATES)) > 10 * TOLERANCE


#: (launcher, processes) before and after; without a launcher it is one process.
MOVES = [
    (("zero2", 1), ("zero2", 2)),
    (("zero2", 2), ("zero2", 1)),
    (("zero2", 2), ("zero2", 4)),
    (("zero3", 2), ("zero3", 1)),
    (("zero3", 1), ("zero3", 2)),
    (("zero3", 2), ("zero3", 4)),
    (("zero3", 2), ("zero2", 2)),
    (("zero3", 2), ("zero3_offload", 2)),
    (("zero3_offload", 2), (None, 1)),
    (("ddp", 2), (None, 1)),
    ((None, 1), ("ddp", 2)),
    ((None, 1), ("zero3", 2)),
    (("zero2", 2), ("ddp", 2)),
]


@pytest.fixture(scope="module")
def undisturbed(folder):
    """``undisturbed(launcher, processes)``: a GRPO run with moments on them."""
    runs: dict[tuple, scaled.Run] = {}

    def once(launcher: str | None, processes: int) -> scaled.Run:
        key, name = (launcher, processes), f"moved-{launcher}-{processes}"
        if key not in runs:
            runs[key] = scaled.train(folder, "grpo", launcher, name, *ADAM, processes=processes)
        return runs[key]

    return once


@pytest.mark.slow
@pytest.mark.parametrize(("before", "after"), sorted(MOVES, key=str), ids=str)
def test_a_run_goes_on_on_other_processes_and_under_another_launcher(folder, undisturbed, before, after):
    whole = undisturbed(*before)
    check_moved(whole, scaled.resume(folder, "grpo", after[0], whole, *ADAM, processes=after[1]))


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ["sft", "dpo", "dpo_online"])
@pytest.mark.parametrize(("before", "after"), [(("zero3", 2), ("zero3", 1)), ((None, 1), ("ddp", 2))], ids=str)
def test_the_others_go_on_on_other_processes_too(folder, alone, algorithm, before, after):
    alone(algorithm)  # DPO's pairs are made for it
    whole = scaled.train(folder, algorithm, before[0], f"moved-{algorithm}-{before[0]}", processes=before[1])
    check_moved(whole, scaled.resume(folder, algorithm, after[0], whole, processes=after[1]))


@pytest.mark.slow
def test_the_moving_average_of_shared_out_weights(folder):
    """Exported is the average, which under ZeRO-3 is gathered for each step and put into the model's parts."""
    more = ("--ema_decay", "0.5")
    one = scaled.train(folder, "grpo", None, "average-one", *more)
    two, rest = scaled.train_and_resume(folder, "grpo", "zero3", "average-zero3", *more)
    check_equal(one, two)
    check_resumed(two, rest)
    assert scaled.largest_difference(two.loaded_by_stock(), load_file(two.folder / "checkpoint-3/ema.safetensors")) == 0
    assert scaled.largest_difference(two.loaded_by_stock(), two.trained(3)) > TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["zero2", "zero3"])
@pytest.mark.parametrize(("algorithm", "more"), [("grpo", ("--beta", "0")), ("grpo", ()), ("dpo", ()), ("sft", ())])
def test_a_full_fine_tune_of_shared_out_weights(folder, alone, algorithm, more, launcher):
    """With a reference, too: a frozen copy, which ZeRO-3 shares out as well."""
    alone(algorithm)  # DPO's pairs are made for it
    more, name = (*scaled.FULL, *more), f"full-{algorithm}{len(more)}"
    one = scaled.train(folder, algorithm, None, f"{name}-one", *more)
    two, rest = scaled.train_and_resume(folder, algorithm, launcher, f"{name}-{launcher}", *more)
    moved = scaled.resume(folder, algorithm, None, two, *more)
    base = QwenImageTransformer2DModel.from_pretrained(CHECKPOINT / "transformer").state_dict()
    assert two.logged("loss") == pytest.approx(one.logged("loss"), abs=TOLERANCE)
    assert scaled.largest_difference(one.exported, two.exported) < TOLERANCE
    assert scaled.largest_difference(one.exported, base) > 10 * TOLERANCE
    assert scaled.largest_difference(two.exported, rest.exported) == 0
    assert scaled.largest_difference(two.exported, moved.exported) < TOLERANCE


#: Under which four processes have one image's groups on two of them.
FOUR = list(product(("sft", "dpo", "grpo"), ("ddp", "zero2", "zero3")))


@pytest.mark.slow
@pytest.mark.parametrize(("algorithm", "launcher"), FOUR)
def test_four_processes_are_as_one(folder, alone, algorithm, launcher):
    one = alone(algorithm)  # which makes the pairs
    four = scaled.train(folder, algorithm, launcher, f"{algorithm}-{launcher}-four", processes=4)
    check_equal(one, four)
    check_export(four)


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["zero2", "zero3", "zero3_offload"])
def test_moments_that_are_shared_out_too(folder, launcher):
    one = scaled.train(folder, "grpo", None, "adam-one", *ADAM)
    two, rest = scaled.train_and_resume(folder, "grpo", launcher, f"adam-{launcher}", *ADAM)
    assert scaled.largest_difference(one.lora, two.lora) < TOLERANCE
    assert scaled.largest_difference(one.trained(1), one.trained(scaled.UPDATES)) > 10 * TOLERANCE
    check_resumed(two, rest)


@pytest.mark.slow
def test_two_launchers_as_on_two_machines_make_one_run(folder, alone):
    one = alone("grpo")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launch = on_cpu(ROOT / "configs/accelerate/multi_node.yaml", folder, port=port)
    words = scaled.words(folder, "grpo", "multi_node", "grpo-nodes", 2)
    machines = [
        start(folder, *launch, "--main_process_ip", "127.0.0.1", "--machine_rank", rank, *words) for rank in (0, 1)
    ]
    for machine in machines:
        finish(machine)
    check_equal(one, scaled.Run(folder / "grpo-nodes"))


@pytest.mark.slow
@pytest.mark.parametrize("rendezvous", ["static", "c10d"])
def test_two_machines_that_share_a_cable_and_a_disk_make_one_run(folder, alone, rendezvous):
    """Each launcher in a network namespace of its own: what one listens on, the other finds by its address alone."""
    missing = namespaces.why_not()
    if missing:
        pytest.skip(missing)
    one = alone("grpo")
    launch = on_cpu(ROOT / "configs/accelerate/multi_node.yaml", folder, port=29500)
    words = scaled.words(folder, "grpo", "multi_node", f"grpo-{rendezvous}", 2)
    with namespaces.two_machines() as machines:
        alone_there = subprocess.run(
            [str(w) for w in machines[1].inside("ip", "-brief", "addr")], capture_output=True, text=True, check=True
        ).stdout
        assert machines[1].address in alone_there and machines[0].address not in alone_there
        launchers = []
        for rank, machine in enumerate(machines):
            reached = ("--main_process_ip", machines[0].address, "--machine_rank", rank)
            command: tuple[object, ...] = (*launch, *reached, *words)
            if rendezvous == "c10d":  # a machine's name leads to no address here: each is told its own, and who is host
                told = ("--rdzv_backend", "c10d", "--rdzv_conf", f"is_host={1 - rank}")
                command = ("env", f"PET_LOCAL_ADDR={machine.address}", *launch, *told, *reached, *words)
            launchers.append(start(folder, *machine.inside(*command)))
        for launcher in launchers:
            finish(launcher)
    check_equal(one, scaled.Run(folder / f"grpo-{rendezvous}"))


# --- Security ---


class Bomb:
    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self):
        return (Path.touch, (self.file,))


def test_a_bomb_is_refused_whatever_deepspeed_asks_for(tmp_path, monkeypatch):
    from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine

    engine, file, went_off = TorchCheckpointEngine(), tmp_path / "optim_states.pt", tmp_path / "went off"
    torch.save({"optimizer_state_dict": Bomb(went_off)}, file)
    monkeypatch.setenv(TENSORS_ONLY, "0")
    with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"), tensors_only():
        engine.load(str(file), map_location="cpu")
    assert not went_off.exists() and os.environ[TENSORS_ONLY] == "0"
    engine.load(str(file), map_location="cpu")
    assert went_off.exists()  # it would have


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["zero2", "zero3"])
@pytest.mark.parametrize("part", ["model_states", "optim_states"])
def test_code_planted_in_a_checkpoint_of_deepspeed_does_not_run(folder, launcher, part):
    base = folder / f"planted-{launcher}"
    if not base.exists():
        scaled.train(folder, "grpo", launcher, base.name, "--max_steps", "1")
    checkpoint = Path(shutil.copytree(base / "checkpoint-1", folder / f"bomb-{launcher}-{part}"))
    went_off = folder / f"went off {launcher} {part}"
    manifest = json.loads((checkpoint / checkpoints.MANIFEST).read_text())
    for file in checkpoint.glob(f"global_step1/*{part}.pt"):
        torch.save(torch.load(file, weights_only=False) | {"planted": Bomb(went_off)}, file)
        manifest["files"][str(file.relative_to(checkpoint))] = file.stat().st_size
    (checkpoint / checkpoints.MANIFEST).write_text(json.dumps(manifest))
    launch = on_cpu(ROOT / f"configs/accelerate/{launcher}.yaml", folder)
    words = scaled.words(folder, "grpo", launcher, f"{checkpoint.name}-resumed", 2)
    process = start(folder, *launch, *words, "--resume_from_checkpoint", checkpoint)
    output, _ = process.communicate(timeout=120)
    assert process.returncode != 0 and "Weights only load failed" in output and not went_off.exists()


# --- What cannot be is said before a model is loaded ---


@pytest.mark.slow
def test_a_full_fine_tune_with_a_moving_average_ends_under_zero3_before_the_model_is_loaded(folder):
    launch = on_cpu(ROOT / "configs/accelerate/zero3.yaml", folder, processes=1)
    words = scaled.words(folder, "grpo", "zero3", "refused")
    process = start(folder, *launch, *words, "--use_peft", "false", "--ema_decay", "0.9")
    output, _ = process.communicate(timeout=300)
    assert process.returncode != 0 and not (folder / "refused").exists()
    assert "error: ema_decay 0.9 would keep a second, full copy of a fully fine-tuned model" in output
    assert "Train an adapter, use ZeRO-2, or leave ema_decay out" in output and "Loading pipeline" not in output


@pytest.fixture
def settings(tmp_path):
    """``settings(type, stage, **others)``: arguments as under a launcher that asks for this ZeRO stage."""

    def make(config_type: type, stage: int, **others):
        args = config_type(output_dir=str(tmp_path / "out"), use_cpu=True, report_to="none", **others)
        args.deepspeed_plugin = DeepSpeedPlugin(zero_stage=stage) if stage else None
        return args

    return make


def test_what_a_full_fine_tune_cannot_do_under_zero3(settings):
    args = settings(SFTConfig, 3, ema_decay=0.9)
    with pytest.raises(ValueError, match=r"ema_decay 0\.9 would keep a second, full copy"):
        check_zero(args, adapter=False)
    check_zero(args, adapter=True)
    check_zero(settings(SFTConfig, 2, ema_decay=0.9), adapter=False)
    check_zero(settings(DPOConfig, 3), adapter=False)


@pytest.mark.parametrize(
    ("written", "stage", "said"),
    [
        ({"zero_stage": 3, "processes": 2}, 3, "ZeRO-3 on 2 processes, and this run is under DeepSpeed ZeRO-3 on 1"),
        ({"zero_stage": 2, "processes": 1}, 0, "ZeRO-2 on 1 processes, and this run is without DeepSpeed: "),
        (None, 2, "written without DeepSpeed, and this run is under DeepSpeed ZeRO-2 on 1"),
        ({"zero_stage": 3, "processes": 1, "offload": "cpu"}, 3, "on 1 processes with the optimizer on the cpu, and"),
    ],
)
def test_a_checkpoint_that_was_sharded_otherwise_is_named(settings, tmp_path, caplog, written, stage, said):
    if written:
        (tmp_path / SHARDING).write_text(json.dumps(written))
    args = settings(SFTConfig, stage)
    found = sharded_otherwise(tmp_path, args, log=True)
    assert found == Sharding(**written or {"zero_stage": 0, "processes": 1}) and said in caplog.text
    caplog.clear()
    Sharding.of(args).write(tmp_path)
    assert sharded_otherwise(tmp_path, args, log=True) is None and not caplog.text


@pytest.mark.parametrize(
    ("then", "ways"),
    [
        (16, "--per_device_train_batch_size 4 or --gradient_accumulation_steps 8 or --num_processes 4"),
        (6, "--gradient_accumulation_steps 3"),
        (10, "--per_device_train_batch_size 10 --gradient_accumulation_steps 1"),
        (5, "--per_device_train_batch_size 5 --gradient_accumulation_steps 1"),
    ],
)
def test_another_global_batch_is_refused_with_values_that_would_do(settings, tmp_path, then, ways):
    args = settings(SFTConfig, 0, per_device_train_batch_size=2, gradient_accumulation_steps=4)
    (tmp_path / checkpoints.MANIFEST).write_text(json.dumps({"run": {"fixed_on_resume": {"rows_per_update": then}}}))
    with pytest.raises(ValueError) as caught:
        _check_rows(tmp_path, args)
    assert f"x 1 processes = 8 rows an update, and it was {then} when" in str(caught.value)
    (tmp_path / checkpoints.MANIFEST).write_text(json.dumps({"run": {"fixed_on_resume": {"rows_per_update": 8}}}))
    _check_rows(tmp_path, args)


def test_processes_that_did_not_find_each_other_are_refused(monkeypatch):
    args = SFTConfig(use_cpu=True)
    check_launch(args)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(
        ValueError, match=r"started 2 processes, but this process is in a group of 1: .*--ddp_backend gloo"
    ):
        check_launch(args)


def test_a_launcher_that_starts_one_process_of_several_is_told_on(monkeypatch, caplog):
    """`accelerate launch --num_processes 2` without a config, on a machine without accelerators."""
    args = SFTConfig(use_cpu=True)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    check_launch(args)
    assert not caplog.text
    monkeypatch.setenv("MASTER_PORT", "29500")
    check_launch(args)
    assert "one process, although more were requested" in caplog.text and "--config_file configs/accel" in caplog.text


def test_fsdp_is_refused_with_what_there_is_instead(settings, monkeypatch):
    args = settings(SFTConfig, 0)
    check_launch(args)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ValueError, match=r"FSDP, .* launch with configs/accelerate/zero2.yaml or zero3.yaml"):
        check_launch(args)
    with pytest.raises(ValueError, match="the launcher asks for FSDP"):  # by whoever makes arguments
        settings(SFTConfig, 0)


@pytest.mark.slow
def test_fsdp2_ends_before_the_model_is_loaded(tmp_path):
    launch = [BIN / "accelerate", "launch", "--use_fsdp", "--fsdp_version", "2", "--num_processes", "1"]
    words = ["--config", ROOT / "configs/tiny/grpo.yaml", "--rewards", "jpeg_size", "--output_dir", "refused"]
    output, _ = start(tmp_path, *launch, ROOT / "align/grpo.py", *words).communicate(timeout=120)
    assert "error: the launcher asks for FSDP" in output and "zero2.yaml or zero3.yaml" in output
    assert "Loading pipeline" not in output and not (tmp_path / "refused").exists()


def test_transformers_loads_its_models_whole_under_zero3(settings):
    plugin = DeepSpeedPlugin(zero_stage=3)
    plugin.set_deepspeed_weakref()  # as transformers' own arguments do
    assert is_deepspeed_zero3_enabled()
    settings(SFTConfig, 0)
    assert not is_deepspeed_zero3_enabled()


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["ddp", "zero2", "zero3"])
def test_what_is_no_number_ends_every_process_and_the_best_checkpoint_is_exported(folder, launcher):
    """A run of NaN exported itself with exit code 0; the best checkpoint was a traceback after the last update."""
    too_fast = ("--optim", "adamw_torch", "--learning_rate", "1e30", "--max_grad_norm", "0")
    best = (
        "--load_best_model_at_end",
        "true",
        "--eval_strategy",
        "steps",
        "--eval_steps",
        "1",
        "--save_total_limit",
        "1",
    )
    runs = [
        scaled.words(folder, "sft", launcher, f"nan-{launcher}", 2, too_fast),
        scaled.words(folder, "grpo", launcher, f"best-{launcher}", 2, best),
        scaled.words(folder, "grpo", launcher, f"best-full-{launcher}", 2, (*best, *scaled.FULL)),
    ]
    wrong = scaled.chain(folder, launcher, runs, 2)
    assert list(wrong) == [f"nan-{launcher}"]
    assert "the loss or the weights are NaN or infinite: the last good checkpoint is" in wrong[f"nan-{launcher}"]
    assert checkpoints.last_good(folder / f"nan-{launcher}") is not None
    assert not (folder / f"nan-{launcher}" / "pytorch_lora_weights.safetensors").exists()
    for name in (f"best-{launcher}", f"best-full-{launcher}"):
        run = scaled.Run(folder / name)
        state = json.loads((run.folder / "trainer_state.json").read_text())
        exported = run.loaded_by_stock()
        kept = run.trained(state["best_global_step"])
        assert scaled.largest_difference({key: exported[key] for key in kept}, kept) == 0
        rewards = [entry["eval_reward"] for entry in state["log_history"] if "eval_reward" in entry]
        assert state["best_metric"] == max(rewards)
