"""Data arguments of the command lines: what is trained on, and which held-out prompts are sampled and scored."""

import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datasets import Dataset

from align.cli.arguments import resolve_dataset
from align.engine.settings import setting
from align.sampling.held_out import check_columns
from preference_data.pairs import STRATEGIES, build_pairs, merge_votes
from preference_data.prompts import load_prompts
from preference_data.readers import Records, read_captioned, read_preferences
from preference_data.schemas import CaptionedImage, Pair
from rewards import Reward, load_rewards


def load_guards(names: list[str] | None, split: str) -> dict[str, Dataset]:
    """Guard data sets by the name they are logged under."""
    guards: dict[str, Dataset] = {}
    for name in names or []:
        if Path(name).stem in guards:
            raise ValueError(f"two guard data sets are both called {Path(name).stem!r}: rename one of them")
        guards[Path(name).stem] = load_prompts(resolve_dataset(name), split)
    return guards


@dataclass
class DataArguments:
    """Prompts and rewards."""

    dataset_name: str = field(
        metadata={"help": "Prompts: a file, a folder with train.jsonl, a hub name, or tiny/NAME."}
    )
    rewards: list[str] = field(metadata={"help": "Built-in names, module:attr or file.py:attr; mappings in a config."})
    dataset_split: str = field(default="train", metadata={"help": "Split to train on."})
    eval_dataset_name: str | None = field(default=None, metadata={"help": "Held-out prompts; default: none."})
    eval_split: str = field(default="test", metadata={"help": "Split of the held-out prompts and the guards."})
    guard_dataset_names: list[str] | None = field(
        default=None, metadata={"help": "Further held-out prompts to watch for damage, logged as eval_NAME_..."}
    )

    def load(self) -> tuple[Dataset, Dataset | None, dict[str, Dataset]]:
        """The training, the held-out and the guard prompts."""
        train = load_prompts(resolve_dataset(self.dataset_name), self.dataset_split)
        held_out = None
        if self.eval_dataset_name:
            held_out = load_prompts(resolve_dataset(self.eval_dataset_name), self.eval_split)
        return train, held_out, load_guards(self.guard_dataset_names, self.eval_split)


@dataclass
class SampleArguments:
    """Held-out prompts that are sampled while training on images, and what scores the samples."""

    eval_prompts_name: str | None = setting(None, "Held-out prompts to sample, for the grid and eval_NAME.")
    eval_prompts_split: str = setting("test", "Split of those prompts and of the guards.")
    guard_dataset_names: list[str] | None = setting(
        None, "Further held-out prompts to watch for damage, logged as eval_NAME_..."
    )
    rewards: list[str] = field(
        default_factory=list,
        metadata={"help": "Score the samples: built-in names, module:attr or file.py:attr; mappings in a config."},
    )

    def load_samples(self) -> tuple[list[Reward], Dataset | None, dict[str, Dataset]]:
        """Rewards, held-out prompts, guards; raises ValueError where they do not fit together."""
        rewards = load_rewards(self.rewards) if self.rewards else []
        split = self.eval_prompts_split
        prompts = load_prompts(resolve_dataset(self.eval_prompts_name), split) if self.eval_prompts_name else None
        guards = load_guards(self.guard_dataset_names, split)
        if (rewards or guards) and prompts is None:
            raise ValueError("rewards and guards score samples of held-out prompts: give --eval_prompts_name")
        if guards and not rewards:
            raise ValueError("guard data sets are only scored: give --rewards, or leave the guards out")
        check_columns(rewards, [*([] if prompts is None else [prompts]), *guards.values()])
        return rewards, prompts, guards


@dataclass
class CaptionedDataArguments(SampleArguments):
    """Captioned images."""

    dataset_name: str = setting(
        "",
        "Images and captions: a folder (metadata.jsonl, or .txt beside each image), a file, a hub name, or tiny/NAME.",
    )
    dataset_split: str = setting("train", "Split to train on.")
    eval_dataset_name: str | None = setting(None, "Held-out images, for the held-out loss. Default: none.")
    eval_split: str = setting("test", "Split of the held-out images.")
    trigger: str | None = setting(
        None, "A word for the style: the caption of every image that has none, and the first word of those that have."
    )
    on_bad_row: str = setting("error", "A row that cannot be used: error stops, skip leaves it out and lists it.")

    def load(self) -> tuple[Records[CaptionedImage], Records[CaptionedImage] | None]:
        """Training and held-out images; raises BadRow for a file that is known to be bad without decoding it."""
        need(self.dataset_name)
        train = self._read(self.dataset_name, self.dataset_split)
        return train, self._read(self.eval_dataset_name, self.eval_split) if self.eval_dataset_name else None

    def _read(self, name: str, split: str) -> Records[CaptionedImage]:
        records = read_captioned(resolve_dataset(name), split, trigger=self.trigger, on_bad_row=self.on_bad_row)
        records.check_files(quiet=_is_other_process())
        return records


@dataclass
class PreferenceDataArguments(SampleArguments):
    """Preferences, and how pairs are made of them."""

    dataset_name: str = setting(
        "", "Preferences: parquet, JSON lines, webdataset tars, a folder or a hub name; see preference_data.readers."
    )
    dataset_split: str = setting("train", "Split to train on.")
    eval_dataset_name: str | None = setting(None, "Held-out preferences, for loss and accuracy. Default: none.")
    eval_split: str = setting("test", "Split of the held-out preferences.")
    dataset_format: str | None = setting(
        None, "Their layout: pickapic, hpdv3, pairs, ranked, ... Default: by the columns."
    )
    streaming: bool = setting(False, "Read a hub data set as it comes, without storing it.")
    pair_strategy: str = setting("best_worst", f"Pairs of a ranked list: {' or '.join(STRATEGIES)}.")
    min_margin: float = setting(0.0, "Leave out pairs whose scores differ by less.")
    min_confidence: float = setting(0.0, "Leave out pairs that a smaller share of the votes prefers, 0..1.")
    merge_annotators: bool = setting(False, "Several rows judge one and the same pair: take the majority.")
    on_bad_row: str = setting("error", "A row that cannot be used: error stops, skip leaves it out and lists it.")

    def load(self) -> tuple[Iterable[Pair], Iterable[Pair] | None]:
        """Training and held-out pairs; raises BadRow for a file that is known to be bad without decoding it."""
        need(self.dataset_name)
        train = self._read(self.dataset_name, self.dataset_split)
        return train, self._read(self.eval_dataset_name, self.eval_split) if self.eval_dataset_name else None

    def _read(self, name: str, split: str) -> Iterable[Pair]:
        records: Any = read_preferences(
            resolve_dataset(name),
            split,
            format=self.dataset_format,
            on_bad_row=self.on_bad_row,
            streaming=self.streaming,
        )
        records.check_files(quiet=_is_other_process())
        if not self.merge_annotators:
            return build_pairs(
                records, self.pair_strategy, min_margin=self.min_margin, min_confidence=self.min_confidence
            )
        merged = merge_votes(build_pairs(records, self.pair_strategy))
        return build_pairs(merged, self.pair_strategy, min_margin=self.min_margin, min_confidence=self.min_confidence)


def _is_other_process() -> bool:
    """Whether the launcher started this process beside a main one, which shows the progress."""
    return os.environ.get("RANK", "0") != "0"


def need(dataset_name: str) -> None:
    """Raise ValueError when no data set was named."""
    if not dataset_name:
        raise ValueError("no training data was given: pass --dataset_name, or `dataset_name:` in the config")
