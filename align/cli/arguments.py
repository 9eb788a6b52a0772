"""What the command lines share: the model's arguments, and a parser that helps."""

import argparse
import inspect
import logging
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
import yaml
from peft import LoraConfig
from transformers import TrainingArguments
from trl import TrlParser

from align.cli.configs import find_config
from align.cli.counterparts import hint
from align.engine.settings import check_settings, declared, kinds_of, setting
from align.engine.values import takes_texts, wrong_kind
from align.models.adapters import find_adapter
from align.models.loading import nearest
from align.tiny import IMAGES, PROMPTS
from rewards.redaction import located, redacted

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
logger = logging.getLogger(__name__)
#: LoRA settings that mean nothing in a full fine-tune.
_LORA_FIELDS = ("adapter", "lora_r", "lora_alpha", "lora_dropout", "lora_target_modules")


@dataclass
class ModelArguments:
    """The model, and what of it is trained."""

    model: str = setting("tiny", "Folder or hub name in the layout of a diffusers pipeline, or `tiny`.")
    dtype: str = setting(
        "float32", "Precision of the frozen weights: float32, bfloat16, float16.", fixed_on_resume=True
    )
    offload: bool = setting(False, "Keep text encoder and VAE on the CPU while they are not in use.")
    attention_backend: str | None = setting(
        None, "diffusers' attention backend for the transformer. Default: torch's own."
    )
    compile_blocks: bool = setting(
        False, "torch.compile the transformer's repeated block: slower to start, faster to run."
    )
    use_peft: bool = setting(True, "Train a LoRA adapter; false fine-tunes the whole transformer.")
    lora_r: int | None = setting(None, "Rank of the adapter. Default 16.", least=1)
    lora_alpha: int | None = setting(None, "Scale of the adapter. Default twice the rank.", least=1)
    lora_dropout: float | None = setting(None, "Dropout inside the adapter. Default 0.", least=0, below=1)
    lora_target_modules: list[str] | None = setting(
        None, "Linear layers to adapt. Default: those of the attention, as the model's family lists them."
    )
    adapter: str | None = setting(None, "A LoRA to start from: its .safetensors file, or the folder of it.")

    def __post_init__(self) -> None:
        check_settings(self)
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
        if self.adapter is not None:
            find_adapter(self.adapter)
            for name in _LORA_FIELDS[1:]:
                if getattr(self, name) is not None:
                    logger.warning("%s is ignored: the adapter %s defines it", name, self.adapter)

    def peft_config(self) -> LoraConfig | None:
        """Return the fresh adapter that these arguments ask for, if they do."""
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


def resolve_dataset(name: str) -> str:
    """Turn ``tiny/NAME`` into the folder that travels with the package; return any other name as it is."""
    family, _, rest = name.partition("/")
    if family != "tiny" or Path(name).exists():
        return name
    embedded = {
        folder.name: folder for root in (PROMPTS, IMAGES) for folder in sorted(root.iterdir()) if folder.is_dir()
    }
    if rest not in embedded:
        raise FileNotFoundError(f"no embedded data set {name!r}." + nearest(rest, [f"tiny/{n}" for n in embedded]))
    return str(embedded[rest])


# -- parsing -----------------------------------------------------------------------------------------------------------


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows each default, but for None: there the help says what happens, or the option must be given."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default is None else super()._get_help_string(action)


class OptionParser(TrlParser):
    """TRL's parser, whose help is grouped, this library's options before transformers', and whose errors are sentences.

    ``options``: the argparse action of every setting, by its name. ``flags``: all that may stand behind ``--``.
    """

    def __init__(self, dataclass_types: Sequence[type], **settings: Any) -> None:
        self.options: dict[str, argparse.Action] = {}
        self.flags = {"config", "help"}
        self._titles = {name: title for kind in dataclass_types for name, title in _titles(kind).items()}
        self._groups: dict[str, Any] = {}
        self._kinds = {name: kind for one in dataclass_types for name, kind in kinds_of(one).items()}
        self._mappings = {name for one in dataclass_types for name, rule in declared(one) if rule.mappings}
        super().__init__(list(dataclass_types), allow_abbrev=False, formatter_class=_HelpFormatter, **settings)
        self.usage = "%(prog)s --config FILE_OR_NAME [--OPTION VALUE ...]"  # not a list of all of them

    def add_argument(self, *names: Any, **settings: Any) -> argparse.Action:
        title = self._titles.get(settings.get("dest") or names[0].lstrip("-").replace("-", "_"))
        if title is None:
            return super().add_argument(*names, **settings)
        if not self._groups:  # all of them, in the order in which help shows them
            self._groups = {t: self.add_argument_group(t) for t in dict.fromkeys(self._titles.values())}
        action = self._groups[title].add_argument(*names, **settings)
        self.options[action.dest] = action
        self.flags |= {name.lstrip("-").replace("-", "_") for name in names}
        return action

    def set_defaults_with_config(self, **config: Any) -> list[str]:
        """Take a config's values as defaults, one text for a list as a list of one, as on the command line."""
        for name, value in config.items():
            if isinstance(value, str) and takes_texts(self._kinds.get(name)):
                config[name] = [value]
        return super().set_defaults_with_config(**config)

    def wrong_kind(self, name: str, value: Any) -> str | None:
        """Return what a setting's value should be and is not, if it is not."""
        return wrong_kind(self._kinds[name], value, name in self._mappings)

    def error(self, message: str) -> Any:
        """Raise ValueError, where argparse would print the usage of all options."""
        raise ValueError(message)


def _titles(kind: type) -> dict[str, str]:
    """Return the help's title of every field, the most derived class first: the class that declares it, and its file."""
    titles: dict[str, str] = {}
    for owner in kind.__mro__:
        ours = not issubclass(TrainingArguments, owner)
        file = owner.__module__.replace(".", "/") + ".py" if ours else "transformers"
        for name in inspect.get_annotations(owner).keys() & {one.name for one in fields(kind)}:
            titles.setdefault(name, f"{owner.__name__} ({file})")
    return titles


def parse(dataclass_types: Sequence[type], argv: Iterable[str] | None = None, door: str = "") -> tuple[Any, ...]:
    """Parse ``--config FILE_OR_NAME`` and command-line overrides into dataclasses.

    Without any word it prints how to begin, and ends. ``door``: the file of align/ that was started.

    Raises:
        ValueError, FileNotFoundError: an option, a key or a value that cannot be, with the nearest that can.
    """
    _leave_own_folder()
    words = _split_equals(list(sys.argv[1:] if argv is None else argv))
    if not words and door:
        print(how_to_begin(door))
        raise SystemExit(0)
    parser = OptionParser(dataclass_types, prog=_command(door))
    for flag in (word[2:].partition("=")[0].replace("-", "_") for word in words if word.startswith("--")):
        if flag not in parser.flags:
            raise ValueError(f"unknown option --{flag}." + hint(flag, parser.flags, "--"))
    for place, word in enumerate(words):
        if word == "--config":
            if place + 1 == len(words):
                raise ValueError("--config needs a file")
            words[place + 1] = str(find_config(words[place + 1]))
            _check_config(Path(words[place + 1]), parser)
    return parser.parse_args_and_config(words)


def _leave_own_folder() -> None:
    """Take align/ off the path of modules, where a door that runs by its path has it: its folders are not a reward's."""
    align = Path(__file__).parents[1]
    sys.path[:] = [entry for entry in sys.path if not entry or Path(entry).resolve() != align]


def how_to_begin(door: str) -> str:
    """Return three lines that say what to type."""
    command, verb = _command(door), "Make preferences" if door == "generate" else "Train"
    return (
        f"{verb} from a config: {command} --config tiny/{_EXAMPLES.get(door, door)}\n"
        "List the shipped configs: flow-align configs\n"
        f"List all options: {command} --help"
    )


def _command(door: str) -> str:
    """Return the command that starts a door, as it was started now: by path, or by its name."""
    by_path = Path(sys.argv[0]).name == f"{door}.py"
    return f"accelerate launch {sys.argv[0]}" if by_path else f"flow-align {door}"


#: The shipped config to begin with, where it is not called like the door.
_EXAMPLES = {"sft": "sft_style"}


def _check_config(config: Path, parser: OptionParser) -> None:
    """Raise ValueError when a YAML file is no mapping, or has a key or a value that the arguments do not take."""
    try:
        content = yaml.safe_load(config.read_text())
    except yaml.YAMLError as error:
        raise ValueError(f"config file {config} is not YAML: {located(error)}") from None
    if not isinstance(content, dict):
        raise ValueError(f"config file {config} must hold a mapping of keys to values, found {type(content).__name__}")
    known = parser.options
    for key, value in content.items():
        if key == "env":
            continue
        if key not in known:
            raise ValueError(f"unknown key {key!r} in {config}." + hint(str(key), known.keys()))
        if value is None and (known[key].required or known[key].default is not None):
            raise ValueError(f"{key} in {config} has no value: give it one, or leave it out")
        wanted = None if value is None or isinstance(value, str) else parser.wrong_kind(key, value)  # text is converted
        if wanted:
            raise ValueError(f"{key} in {config} must be {wanted}, found {redacted({key: value})[key]!r}")


def _split_equals(words: list[str]) -> list[str]:
    """Split ``--config=FILE``, which TRL's parser does not see, into two words."""
    split = [word.split("=", 1) if word.startswith("--config=") else [word] for word in words]
    return [piece for pieces in split for piece in pieces]


@contextmanager
def plain_errors() -> Iterator[None]:
    """Enter a context in which a mistake in a config is answered with a sentence, not with a traceback."""
    try:
        yield
    except (ValueError, OSError, ImportError) as error:
        raise SystemExit(f"error: {redacted(str(error))}") from error
