"""What the command lines of the trainers share: model and data arguments, and parsing that helps."""

import argparse
import logging
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import yaml
from peft import LoraConfig
from trl import TrlParser

from align.models.loading import check_resolution, describe_transformer, digest_adapter, nearest, resolve_folder
from align.tiny import IMAGES, PROMPTS

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
logger = logging.getLogger(__name__)
#: LoRA settings that mean nothing in a full fine-tune.
_LORA_FIELDS = ("adapter", "lora_r", "lora_alpha", "lora_dropout", "lora_target_modules")


@dataclass
class ModelArguments:
    """The model, and what of it is trained."""

    model: str = field(
        default="tiny", metadata={"help": "Folder or hub name in the layout of Qwen/Qwen-Image, or `tiny`."}
    )
    dtype: str = field(
        default="float32", metadata={"help": "Precision of the frozen weights: float32, bfloat16, float16."}
    )
    offload: bool = field(
        default=False, metadata={"help": "Keep text encoder and VAE on the CPU while they are not in use."}
    )
    attention_backend: str | None = field(
        default=None, metadata={"help": "diffusers' attention backend for the transformer. Default: torch's own."}
    )
    compile_blocks: bool = field(
        default=False,
        metadata={"help": "torch.compile the transformer's repeated block: slower to start, faster to run."},
    )
    use_peft: bool = field(
        default=True, metadata={"help": "Train a LoRA adapter; false fine-tunes the whole transformer."}
    )
    lora_r: int | None = field(default=None, metadata={"help": "Rank of the adapter. Default 16."})
    lora_alpha: int | None = field(default=None, metadata={"help": "Scale of the adapter. Default twice the rank."})
    lora_dropout: float | None = field(default=None, metadata={"help": "Dropout inside the adapter. Default 0."})
    lora_target_modules: list[str] | None = field(
        default=None, metadata={"help": "Linear layers to adapt. Default: the joint attention's eight."}
    )
    adapter: str | None = field(
        default=None, metadata={"help": "Folder of a LoRA to start from (pytorch_lora_weights.safetensors)."}
    )

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype {self.dtype!r} is unknown." + nearest(self.dtype, set(DTYPES)))
        if not self.use_peft and self.dtype != "float32":
            raise ValueError(
                f"a full fine-tune of weights in {self.dtype} loses most of its updates to rounding: use dtype: float32, "
                "and bf16: true for the arithmetic"
            )
        if not self.use_peft:
            given = [name for name in _LORA_FIELDS if getattr(self, name) is not None]
            if given:
                raise ValueError(
                    f"use_peft: false asks for a full fine-tune and {given[0]!r} for an adapter: leave one of them out"
                )
        if self.lora_r is not None and self.lora_r < 1:
            raise ValueError(f"lora_r must be at least 1, found {self.lora_r}")
        if self.adapter is not None:
            if not (Path(self.adapter) / LORA_FILE).is_file():
                raise FileNotFoundError(f"adapter folder {self.adapter} has no {LORA_FILE}")
            for name in _LORA_FIELDS[1:]:
                if getattr(self, name) is not None:
                    logger.warning("%s is ignored: the adapter %s says its own", name, self.adapter)

    def check(self, height: int, width: int) -> None:
        """Everything that can be known wrong before weights are read."""
        check_resolution(resolve_folder(self.model), height, width)
        if self.attention_backend is not None:
            from diffusers.models.attention_dispatch import AttentionBackendName

            known = {backend.value for backend in AttentionBackendName}
            if self.attention_backend not in known:
                raise ValueError(
                    f"unknown attention_backend {self.attention_backend!r}." + nearest(self.attention_backend, known)
                )

    def identity(self) -> dict[str, dict[str, Any]]:
        """What is known of :meth:`align.models.contract.FlowModel.identity` before a weight is read."""
        trained: dict[str, Any] = {"tuning": "LoRA" if self.use_peft else "full"}
        config = self.peft_config()
        if config is not None:
            trained |= {"lora_r": config.r, "lora_alpha": config.lora_alpha}
        if self.use_peft:
            trained["adapter"] = None if self.adapter is None else digest_adapter(self.adapter)
        return {"model": describe_transformer(self.model, resolve_folder(self.model)), "trained": trained}

    def peft_config(self) -> LoraConfig | None:
        if not self.use_peft or self.adapter is not None:
            return None
        rank = self.lora_r or 16
        return LoraConfig(
            r=rank,
            lora_alpha=self.lora_alpha or 2 * rank,
            lora_dropout=self.lora_dropout or 0.0,
            target_modules=self.lora_target_modules,
            init_lora_weights="gaussian",
        )


LORA_FILE = "pytorch_lora_weights.safetensors"


def resolve_dataset(name: str) -> str:
    """``tiny/NAME`` to the folder that travels with the package; any other name as it is."""
    family, _, rest = name.partition("/")
    if family != "tiny" or Path(name).exists():
        return name
    there = {place.name: place for root in (PROMPTS, IMAGES) for place in sorted(root.iterdir()) if place.is_dir()}
    if rest not in there:
        raise FileNotFoundError(f"no embedded data set {name!r}." + nearest(rest, [f"tiny/{t}" for t in there]))
    return str(there[rest])


def parse(dataclass_types: Sequence[type], argv: Iterable[str] | None = None) -> tuple[Any, ...]:
    """``--config FILE.yaml`` and command-line overrides to dataclasses; an unknown key names the nearest known one."""
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = TrlParser(dataclass_types)
    options = {o[2:].replace("-", "_") for action in parser._actions for o in action.option_strings} | {"config"}
    for flag in (a.split("=")[0][2:].replace("-", "_") for a in argv if a.startswith("--")):
        if flag not in options:
            raise ValueError(f"unknown option --{flag}." + nearest(flag, options))
    if argv[-1:] == ["--config"]:
        raise ValueError("--config needs a file")
    known = {action.dest: action for action in parser._actions if action.dest != "help"}
    for config in _config_paths(argv):
        _check_config(config, known)
    return parser.parse_args_and_config(_split_equals(argv))


def _check_config(config: Path, known: dict[str, argparse.Action]) -> None:
    """Raise when a YAML file is missing, is no mapping, or has a key or a value that the arguments do not take."""
    if not config.is_file():
        beside = {str(p) for p in config.parent.glob("*.y*ml")} if config.parent.is_dir() else set()
        hint = nearest(str(config), beside) if beside else ""
        raise FileNotFoundError(f"config file {config} does not exist." + hint)
    try:
        content = yaml.safe_load(config.read_text())
    except yaml.YAMLError as error:
        raise ValueError(f"config file {config} is not YAML: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"config file {config} must hold a mapping of keys to values, found {type(content).__name__}")
    for key, value in content.items():
        if key == "env":
            continue
        if key not in known:
            raise ValueError(f"unknown key {key!r} in {config}." + nearest(str(key), set(known)))
        if value is None and (known[key].required or known[key].default is not None):
            raise ValueError(f"{key} in {config} has no value: give it one, or leave it out")
        fault = _type_fault(known[key], value)
        if fault:
            raise ValueError(f"{key} in {config} must be {fault}, found {value!r}")


def _type_fault(action: argparse.Action, value: Any) -> str | None:
    """What a YAML value should have been, for an option that argparse would have converted from text."""
    if value is None or isinstance(value, str):
        return None  # argparse converts text itself
    if action.nargs in ("+", "*"):
        return None if isinstance(value, (list, dict)) else "a list"
    if isinstance(action.default, (dict, list)) or action.type not in (int, float, str):
        return None
    if action.type is str:
        return "text"
    whole = isinstance(value, int) and not isinstance(value, bool)
    if action.type is int:
        return None if whole else "a whole number"
    return None if whole or isinstance(value, float) else "a number"


def _split_equals(argv: list[str]) -> list[str]:
    """``--config=x`` to ``--config x``: the parser underneath looks for the two words."""
    return [word for a in argv for word in (a.split("=", 1) if a.startswith("--config=") else [a])]


def _config_paths(argv: list[str]) -> list[Path]:
    words = _split_equals(argv)
    return [Path(value) for flag, value in pairwise(words) if flag == "--config"]


@contextmanager
def plain_errors() -> Iterator[None]:
    """A mistake in a config is answered with a sentence, not with a traceback."""
    try:
        yield
    except (ValueError, FileNotFoundError, FileExistsError, ImportError) as error:
        raise SystemExit(f"error: {error}") from error
