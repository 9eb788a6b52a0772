"""Tiny configs of which two or three settings are changed at random, to what is odd, hostile, or of another kind."""

import json
import random
import re
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import load_file

from align import dpo, dpo_online, generate, grpo, nft, sft
from align.cli.arguments import ModelArguments, OptionParser
from align.cli.data import DataArguments
from align.cli.images import CaptionedDataArguments, PreferenceDataArguments
from align.engine.settings import kinds_of
from align.engine.values import wrong_kind

#: Of each door: what its command line is made of, and its main.
DOORS: dict[str, tuple[tuple[type, ...], Any]] = {
    "sft": ((CaptionedDataArguments, ModelArguments, sft.SFTConfig), sft.main),
    "dpo": ((PreferenceDataArguments, ModelArguments, dpo.DPOConfig), dpo.main),
    "dpo_online": ((DataArguments, ModelArguments, dpo_online.OnlineDPOConfig), dpo_online.main),
    "grpo": ((DataArguments, ModelArguments, grpo.GRPOConfig), grpo.main),
    "nft": ((DataArguments, ModelArguments, nft.NFTConfig), nft.main),
    "generate": ((generate.GenerateArguments, ModelArguments), generate.main),
}
_SIZES = {"height": 32, "width": 32, "num_inference_steps": 2, "rollout_batch_size": 8, "use_cpu": True}
_RUN = _SIZES | {"output_dir": "run", "max_steps": 1, "lora_r": 2, "save_strategy": "no", "disable_tqdm": True}
_GROUPS = _RUN | {
    "dataset_name": "prompts.txt",
    "rewards": ["bright.py:score"],
    "num_generations": 2,
    "generation_batch_size": 4,
}
_IMAGES = _RUN | {"per_device_train_batch_size": 2, "eval_prompts_name": "prompts.txt", "cache_dir": "cache"}
#: Of each door: a config that works, in the folder that :func:`furnish` makes.
BASES: dict[str, dict[str, Any]] = {
    "sft": _IMAGES | {"dataset_name": "images"},
    "dpo": _IMAGES | {"dataset_name": "pairs.jsonl", "beta": 100.0},
    "dpo_online": _GROUPS | {"per_device_train_batch_size": 2},
    "grpo": _GROUPS | {"per_device_train_batch_size": 4},
    "nft": _GROUPS | {"per_device_train_batch_size": 8},
    "generate": _SIZES
    | {"dataset_name": "prompts.txt", "rewards": ["bright.py:score"], "output_dir": "run", "num_generations": 2},
}
#: Settings that are changed more often than the others of transformers, which are many.
_OFTEN = (
    "learning_rate", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm", "warmup_steps",
    "lr_scheduler_type", "lr_scheduler_kwargs", "optim", "optim_args", "max_steps", "num_train_epochs", "report_to",
    "gradient_checkpointing", "bf16", "save_steps", "eval_steps", "eval_strategy", "save_strategy", "logging_steps",
)  # fmt: skip
#: Settings that reach out of the folder, that need a launcher, or that compile for minutes.
_LEFT_OUT = {"deepspeed", "fsdp", "fsdp_config", "torch_compile", "torch_compile_backend", "torch_compile_mode",
             "compile_blocks", "debug", "local_rank", "ddp_backend", "parallelism_config", "full_determinism",
             "enable_jit_checkpoint", "hub_model_id"}  # fmt: skip
_NUMBERS = [float("nan"), float("inf"), -float("inf"), -1, 0, 1, 2, 3, 0.5, 2.5, 1.0, -1e-3, 1e-3, 0.9, 1e9, 1e30, 1e-30,
            1e-4, 7, 4, 5, 8, 16, 32, 64, -2, 2**40]  # fmt: skip
_WORDS = [
    "",
    " ",
    "x",
    "none",
    "true",
    "1",
    "2",
    "0.5",
    "1e-4",
    "nan",
    "steps",
    "a,b",
    "bright.py:score",
    "images",
    "pairs.jsonl",
    "to_q",
    "tiny",
    "tiny/full",
    "/dev/null/x",
    "prompts.txt",
]
_OTHERS: list[Any] = [
    None,
    True,
    False,
    [],
    [1],
    [0.5, 2],
    [1, 2],
    ["a", "b"],
    [None],
    ["x"],
    ["to_q"],
    ["prompts.txt"],
    [0, 1],
    {},
    {"a": 1},
    [[1]],
]
_SIZE_NAMES = re.compile(r"size|steps|num_|height|width|resolution|sigmas|epochs|per_file|workers|lora_r$|accumulation")
#: What a message may call a setting by, other than its name.
_CALLED = {
    "dataset_name": "data|prompts|pairs|NAME|file", "eval_dataset_name": "data|file", "eval_prompts_name": "data|file",
    "guard_dataset_names": "guard|data|file", "rewards": "reward", "model": "model", "adapter": "adapter",
    "dataset_split": "split", "eval_split": "split", "eval_prompts_split": "split", "columns": "column",
    "dataset_format": "format|layout", "image_folder": "folder|image", "lora_target_modules": "LoRA target",
    "resume_from_checkpoint": "resume|checkpoint", "trigger": "caption", "streaming": "stream", "cache_dir": "cache",
    "num_train_sigmas": "noise levels", "num_inference_steps": "noise levels",
    "save_strategy": "the best checkpoint",
    "overwrite_output_dir": "output_dir", "sde_window_range": "trained steps", "sde_type": "trained steps", "sde_window_size": "trained steps", "bf16": "bf16", "report_to": "report|integration|supported",
}  # fmt: skip


def furnish(folder: Path) -> None:
    """Put into a folder what the base configs name: prompts, a reward, captioned images, pairs."""
    (folder / "prompts.txt").write_text("".join(f"a red circle on a {colour} background\n" for colour in _COLOURS))
    (folder / "bright.py").write_text(
        "def score(images, prompts):\n    return [i.getpixel((0, 0))[0] for i in images]\n"
    )
    (folder / "images").mkdir()
    for colour in _COLOURS:
        Image.new("RGB", (64, 64), colour).save(folder / "images" / f"{colour}.png")
        (folder / "images" / f"{colour}.txt").write_text(f"a {colour} background")
    with open(folder / "pairs.jsonl", "w") as file:
        for better, worse in (("red", "blue"), ("yellow", "green")):
            row = {"prompt": "a circle", "chosen": f"images/{better}.png", "rejected": f"images/{worse}.png"}
            file.write(json.dumps(row) + "\n")


_COLOURS = ("red", "blue", "green", "yellow")


def draw(rng: random.Random, door: str) -> dict[str, Any]:
    """Draw two or three settings of a door, and an odd value for each."""
    options = OptionParser(DOORS[door][0]).options
    ours = {name for kind in DOORS[door][0] for name in _own(kind)} & options.keys()
    common = sorted((ours | set(_OFTEN)) & options.keys() - _LEFT_OUT)
    rare = sorted(options.keys() - _LEFT_OUT - set(common))
    kinds = {name: kind for one in DOORS[door][0] for name, kind in kinds_of(one).items()}
    names = {rng.choice(rare if rng.random() < 0.2 and rare else common) for _ in range(rng.choice((2, 3)))}
    return {name: _value(rng, name, kinds[name], options[name].choices) for name in sorted(names)}


def _own(kind: type) -> set[str]:
    return {
        name
        for owner in kind.__mro__
        if owner.__module__.startswith("align")
        for name in vars(owner).get("__annotations__", {})
    }


def _value(rng: random.Random, name: str, kind: Any, choices: Any) -> Any:
    """Draw a value: mostly of the right kind, and small where a size would only take long."""
    right = [value for value in [*_NUMBERS, *_WORDS, *_OTHERS] if wrong_kind(kind, value) is None]
    if choices:
        right = list(choices)
    pool = right if right and rng.random() < 0.85 else [*_NUMBERS, *_WORDS, *_OTHERS]
    long = _SIZE_NAMES.search(name)
    return rng.choice([v for v in pool if not (long and isinstance(v, (int, float)) and 100 < v < float("inf"))])


def names_a_key(message: str, changed: dict[str, Any]) -> bool:
    """Whether a message names one of the settings that were changed, or a file that was given."""
    named = any(name in message or re.search(_CALLED.get(name, "$^"), message) for name in changed)
    return named or any(isinstance(value, str) and len(value) > 3 and value in message for value in changed.values())


def broken_weights(folder: Path) -> list[str]:
    """Name the files below a folder that hold a weight which is NaN or infinite."""
    return [
        str(file)
        for file in folder.rglob("*.safetensors")
        if "cache" not in file.parts
        and not all(
            bool(torch.isfinite(tensor).all()) for tensor in load_file(file).values() if tensor.is_floating_point()
        )
    ]
