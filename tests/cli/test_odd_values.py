"""Values that cannot be, and places that a run cannot use: a sentence with the setting's name, before a model is loaded."""

import http.server
import json
import random
import re
import sys
import threading
from pathlib import Path

import pytest
import torch
import yaml
from odd_configs import BASES, DOORS, draw, furnish, names_a_key

from align import generate, grpo
from align.cli.counterparts import COUNTERPARTS, hint
from align.models.qwen_image import QwenImage
from align.online.trainer import OnlineTrainer
from align.sampling.held_out import as_prompts

torch.set_num_threads(1)
ROOT = Path(__file__).parents[2]


class ModelLoaded(Exception):
    """A model was loaded: nothing was wrong until then."""


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """The user stands in a folder with prompts, a reward, images and pairs; loading a model ends a command."""

    def loaded(*args, **settings):
        raise ModelLoaded

    furnish(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(QwenImage, "load", loaded)
    for name in ("WANDB_MODE", "WANDB_API_KEY", "HF_TOKEN", "WANDB_DISABLED"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    yield tmp_path
    if "wandb" in sys.modules:
        sys.modules["wandb"].teardown()  # else it keeps for later tests what it read of this one's environment


def said(door: str, **changed) -> str:
    """What a door answers to a config; "" where it would load the model."""
    Path("config.yaml").write_text(yaml.safe_dump(BASES[door] | changed))
    with pytest.raises((ModelLoaded, SystemExit)) as ended:
        DOORS[door][1](["--config", "config.yaml"])
    if isinstance(ended.value, ModelLoaded):
        return ""
    assert isinstance(ended.value.code, str) and ended.value.code.startswith("error: "), ended.value.code
    return ended.value.code


@pytest.mark.parametrize("door", DOORS)
def test_the_configs_below_work_but_for_what_is_changed(door):
    assert not said(door)


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("seed", range(10))
def test_a_config_changed_at_random_loads_a_model_or_names_what_is_wrong(door, seed):
    changed = draw(random.Random(f"{door} {seed}"), door)
    answer = said(door, **changed)
    assert not answer or names_a_key(answer, changed), (changed, answer)


NAN, INFINITE = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("door", "changed", "message"),
    [
        ("grpo", {"lora_r": 2.5}, "lora_r in config.yaml must be a whole number, found 2.5"),
        ("grpo", {"lora_r": [8]}, "lora_r in config.yaml must be a whole number, found [8]"),
        ("sft", {"resolution": [64]}, "resolution in config.yaml must be a whole number, found [64]"),
        ("grpo", {"ema_decay": [0.9]}, "ema_decay in config.yaml must be a number, found [0.9]"),
        ("grpo", {"epsilon_high": [1]}, "epsilon_high in config.yaml must be a number, found [1]"),
        ("grpo", {"sde_window_range": ["a", "b"]}, "sde_window_range in config.yaml must be a list of whole numbers"),
        ("grpo", {"sde_window_range": [0.5, 2]}, "sde_window_range in config.yaml must be a list of whole numbers"),
        ("grpo", {"sde_window_range": "1"}, "sde_window_range must be a list of whole numbers, found 1"),
        ("grpo", {"sde_window_size": 1.0}, "sde_window_size in config.yaml must be a whole number, found 1.0"),
        ("grpo", {"overwrite_output_dir": [False]}, "overwrite_output_dir in config.yaml must be true or false"),
        ("nft", {"num_train_sigmas": 2.5}, "num_train_sigmas in config.yaml must be a whole number, found 2.5"),
        ("grpo", {"lora_alpha": NAN}, "lora_alpha in config.yaml must be a whole number, found nan"),
        ("grpo", {"seed": "abc"}, "seed: invalid int value: 'abc'"),
        ("sft", {"max_aspect_ratio": INFINITE}, "max_aspect_ratio in config.yaml must be a finite number, found inf"),
        ("sft", {"max_aspect_ratio": 1e30}, "max_aspect_ratio must lie in [1, 100], found 1e+30"),
        ("sft", {"logit_mean": NAN}, "logit_mean in config.yaml must be a finite number, found nan"),
        ("sft", {"logit_mean": "nan"}, "logit_mean must be a finite number, found nan"),
        ("dpo", {"sft_weight": NAN}, "sft_weight in config.yaml must be a finite number, found nan"),
        ("dpo", {"beta": INFINITE}, "beta in config.yaml must be a finite number, found inf"),
        ("dpo", {"min_margin": NAN}, "min_margin in config.yaml must be a finite number, found nan"),
        ("dpo", {"pair_strategy": "best"}, "pair_strategy must be one of best_worst, all_pairs, found 'best'"),
        ("sft", {"on_bad_row": "leave"}, "on_bad_row must be one of error, skip, found 'leave'"),
        ("grpo", {"dataloader_persistent_workers": True}, "needs dataloader_num_workers of at least 1, found 0"),
        ("dpo", {"min_confidence": 2}, "min_confidence must lie in [0, 1], found 2"),
        ("grpo", {"learning_rate": NAN}, "learning_rate in config.yaml must be a finite number, found nan"),
        ("grpo", {"learning_rate": -1e-3}, "learning_rate must be at least 0, found -0.001"),
        ("grpo", {"adam_beta2": 1.0}, "adam_beta2 must lie in [0, 1), found 1.0"),
        ("grpo", {"adam_beta1": -0.1}, "adam_beta1 must lie in [0, 1), found -0.1"),
        ("grpo", {"adam_epsilon": -1}, "adam_epsilon must be positive, found -1"),
        ("grpo", {"adam_epsilon": 0}, "adam_epsilon must be positive, found 0"),
        ("grpo", {"weight_decay": -1}, "weight_decay must be at least 0, found -1"),
        ("grpo", {"weight_decay": "inf"}, "weight_decay must be a finite number, found inf"),
        ("grpo", {"max_grad_norm": -1}, "max_grad_norm must be at least 0, found -1"),
        ("grpo", {"warmup_steps": NAN}, "warmup_steps in config.yaml must be a finite number, found nan"),
        ("grpo", {"guidance_scale": NAN}, "guidance_scale in config.yaml must be a finite number, found nan"),
        ("grpo", {"guidance_scale": -1}, "guidance_scale must be at least 0, found -1"),
        ("generate", {"dataset_split": "/dev/null/x"}, "dataset_split must be a name, which a folder gets too"),
        ("generate", {"guidance_scale": -1}, "guidance_scale must be at least 0, found -1"),
        ("sft", {"lora_dropout": -0.1}, "lora_dropout must lie in [0, 1), found -0.1"),
        ("sft", {"lora_alpha": 0}, "lora_alpha must be at least 1, found 0"),
        ("sft", {"max_steps": 0}, "max_steps must be at least 1, or -1 for num_train_epochs, found 0"),
        ("sft", {"max_steps": -7}, "max_steps must be at least 1, or -1 for num_train_epochs, found -7"),
        ("dpo", {"height": -1}, "height must be positive, found -1"),
        ("grpo", {"seed": -3}, "seed must lie in [0, 4294967295], found -3"),
        ("grpo", {"dataset_name": ""}, "no training data was given: pass --dataset_name"),
        ("grpo", {"guard_dataset_names": [1]}, "guard_dataset_names in config.yaml must be a list of texts, found [1]"),
        ("grpo", {"optim": "adamw_8bit"}, "optim adamw_8bit cannot be built: You need to install `bitsandbytes`"),
        ("grpo", {"optim_args": "x"}, "optim_args x cannot be built"),
        ("sft", {"optim_args": "betas=0.5"}, "optim_args betas=0.5 change nothing: optim adamw_torch"),
        ("grpo", {"noise_level": 1e30}, "noise_level must lie in (0, 10], found 1e+30"),
        ("grpo", {"optim": "adamv"}, "optim"),
        ("grpo", {"lr_scheduler_type": "cosine_with_min_lr"}, "lr_scheduler_type cosine_with_min_lr cannot be built"),
        ("sft", {"lr_scheduler_type": "warmup_stable_decay"}, "lr_scheduler_type warmup_stable_decay cannot be built"),
        ("sft", {"lr_scheduler_kwargs": "x"}, "lr_scheduler_kwargs must be a mapping, as JSON, found 'x'"),
        ("sft", {"lr_scheduler_kwargs": "[1]"}, "lr_scheduler_kwargs must be a mapping, as JSON, found '[1]'"),
        ("sft", {"accelerator_config": {"a": 1}}, "accelerator_config has no 'a'. There are: dispatch_batches"),
        ("sft", {"accelerator_config": "no.json"}, "accelerator_config must be a mapping, as JSON, found 'no.json'"),
        ("grpo", {"neftune_noise_alpha": 5}, "neftune_noise_alpha adds noise to the embeddings of a language model"),
        ("grpo", {"use_liger_kernel": True}, "use_liger_kernel replaces layers of a language model"),
        ("grpo", {"dataloader_multiprocessing_context": "fork"}, "needs dataloader_num_workers of at least 1, found 0"),
        ("sft", {"metric_for_best_model": "loss2"}, "metric_for_best_model 'loss2' is not measured: there are no"),
        ("sft", {"cache_dir": "/dev/null/x"}, "the cache /dev/null/x cannot be written"),
        ("sft", {"attention_backend": "flash"}, "attention_backend flash cannot be used on cpu in float32: Flash Att"),
        ("generate", {"attention_backend": "xformers"}, "attention_backend xformers cannot be used on cpu in float32"),
        ("grpo", {"report_to": "mlflow"}, "report_to mlflow needs the package mlflow, which is not installed"),
        ("grpo", {"report_to": ["tensorboard", "wnadb"]}, "report_to 'wnadb' is unknown. Did you mean 'wandb'?"),
        ("grpo", {"report_to": "wandb"}, "report_to wandb is not logged in: run `wandb login`"),
        ("sft", {"push_to_hub": True}, "push_to_hub is asked for and HF_HUB_OFFLINE is set"),
        ("grpo", {"output_dir": "prompts.txt"}, "output_dir prompts.txt cannot be a folder: prompts.txt is a file"),
        ("grpo", {"output_dir": "/dev/null/x"}, "output_dir /dev/null/x cannot be a folder: /dev/null is a file"),
        ("grpo", {"output_dir": "/proc/x"}, "output_dir /proc/x cannot be written"),
        ("generate", {"output_dir": "prompts.txt/x"}, "output_dir prompts.txt/x cannot be a folder: prompts.txt is a file"),
        ("grpo", {"model_name_or_path": "tiny"}, "unknown key 'model_name_or_path' in config.yaml. Here it is model."),
    ],
)  # fmt: skip
def test_a_value_that_cannot_be_is_named(door, changed, message):
    answer = said(door, **changed)
    assert message in answer and "\n" not in answer, answer
    assert not Path("run").exists()


@pytest.mark.parametrize(
    ("door", "changed"),
    [
        ("grpo", {"max_steps": -1, "num_train_epochs": 1}),
        ("grpo", {"lora_dropout": None, "ema_decay": 0.9, "learning_rate": 0}),
        ("grpo", {"report_to": "tensorboard", "lr_scheduler_type": "cosine", "warmup_steps": 0.1}),
        (
            "grpo",
            {"lora_target_modules": "to_q", "guard_dataset_names": "prompts.txt", "eval_dataset_name": "prompts.txt"},
        ),
        ("sft", {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr": 1e-5}, "optim": "sgd"}),
        ("sft", {"lr_scheduler_kwargs": '{"num_cycles": 0.5}', "lr_scheduler_type": "cosine"}),
        ("sft", {"attention_backend": "_native_math", "neftune_noise_alpha": 0}),
        ("dpo", {"accelerator_config": {"even_batches": False}, "seed": 2**32 - 1}),
        ("nft", {"adam_beta2": 0, "adam_beta1": 0.5}),
    ],
)
def test_a_value_that_can_be_is_taken(door, changed):
    assert not said(door, **changed)


def test_wandb_is_let_pass_offline_with_a_key_and_where_a_run_is_open(monkeypatch):
    for name, value in (("WANDB_MODE", "offline"), ("WANDB_MODE", "disabled"), ("WANDB_API_KEY", "f" * 40)):
        monkeypatch.setenv(name, value)
        assert not said("grpo", report_to="wandb")
        monkeypatch.delenv(name)


def test_a_push_to_the_hub_needs_a_token(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    assert "push_to_hub needs a token" in said("grpo", push_to_hub=True)


class Hub(http.server.BaseHTTPRequestHandler):
    """Knows one token."""

    def do_GET(self):
        known = self.headers["Authorization"] == "Bearer a-right-token"
        body = b'{"name": "me", "type": "user"}' if known else b'{"error": "Invalid username or password."}'
        self.send_response(200 if known else 401)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        """Say nothing."""


def test_a_push_to_the_hub_needs_one_that_answers_and_knows_the_token(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    server = http.server.HTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", url)
    assert not said("grpo", push_to_hub=True, hub_token="a-right-token")
    refused = said("grpo", push_to_hub=True, hub_token="another-token")
    server.shutdown()
    server.server_close()
    unanswered = said("grpo", push_to_hub=True, hub_token="a-right-token")
    for answer in (refused, unanswered):
        assert f"push_to_hub is asked for, and {url} does not say whose token it is: " in answer
        assert "another-token" not in answer and "a-right-token" not in answer


# --- Names of other libraries ---


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("model_name_or_path", "--model"), ("reward_funcs", "--rewards"), ("dataset", "--dataset_name"),
        ("lora_rank", "--lora_r"), ("num_train_steps", "--max_steps"), ("max_train_steps", "--max_steps"),
        ("train_batch_size", "--per_device_train_batch_size"), ("clip_range", "--epsilon"),
        ("resolution", "--height and --width"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("dashes", [False, True])
def test_an_option_of_another_library_is_answered_with_ours(theirs, ours, dashes):
    with pytest.raises(SystemExit) as ended:
        grpo.main([f"--{theirs.replace('_', '-') if dashes else theirs}", "x"])
    assert ended.value.code == f"error: unknown option --{theirs}. Here it is {ours}."


def test_a_counterpart_is_named_only_where_the_door_has_it():
    with pytest.raises(SystemExit, match=r"unknown option --clip_range\. "):
        generate.main(["--clip_range", "1"])
    assert hint("instance_prompt", {"trigger"}) == " Here it is trigger." and "Here" not in hint(
        "instance_prompt", {"seed"}
    )
    assert hint("train.lr", {"learning_rate"}, "--") == " Here it is --learning_rate."
    assert hint("zzzz", {"a", "", "seed"}) == " --help lists all."


def test_counterparts_are_options_and_agree_with_the_manual():
    known = {name for types, _ in DOORS.values() for one in types for name in one.__dataclass_fields__}
    assert {ours for all_ours in COUNTERPARTS.values() for ours in all_ours} <= known
    assert not {theirs for theirs, ours in COUNTERPARTS.items() if ours == (theirs,)}
    rows = re.findall(r"^\| `([\w.\[\]]+)` \| `--(\w+)` \|", (ROOT / "docs/coming_from.md").read_text(), re.MULTILINE)
    assert len(rows) > 40
    for theirs, ours in rows:
        name = theirs.rpartition(".")[2]
        if name not in known and name not in ("resume_path", "use_8bit_adam"):
            assert ours in COUNTERPARTS.get(theirs, COUNTERPARTS.get(name, ())), f"{theirs}: {ours}"


# --- Prompts from Python ---


def test_prompts_from_python_may_be_a_list_of_rows():
    rows = [{"prompt": "a", "spec": "b"}, {"prompt": "c", "spec": "d"}]
    made = as_prompts(rows, "train_dataset")
    assert made.to_list() == rows and as_prompts(made, "train_dataset") is made
    for wrong, found in (
        (["a"], "list of str"),
        ("prompts.txt", "str"),
        ({"prompt": ["a"]}, "dict"),
        (None, "NoneType"),
    ):
        with pytest.raises(ValueError, match=rf"train_dataset must be a datasets.Dataset, or a list .* found {found}$"):
            as_prompts(wrong, "train_dataset")


def test_an_online_trainer_takes_a_list_of_rows(folder):
    settings = {key: value for key, value in BASES["grpo"].items() if key not in ("dataset_name", "rewards", "lora_r")}
    args, rows = grpo.GRPOConfig(**settings), [{"prompt": name} for name in "abcd"]
    reward = "bright.py:score"
    with pytest.raises(ModelLoaded):
        grpo.GRPOTrainer("tiny", [reward], args, rows, eval_dataset=rows[:1], guard_datasets={"g": rows[1:2]})
    with pytest.raises(ValueError, match=r"train_dataset must be .* found str"):
        grpo.GRPOTrainer("tiny", [reward], args, "prompts.txt")
    with pytest.raises(ValueError, match=r"guard g must be .* found list of str"):
        grpo.GRPOTrainer("tiny", [reward], args, rows, guard_datasets={"g": ["a"]})
    assert issubclass(grpo.GRPOTrainer, OnlineTrainer) and json.dumps(rows)
