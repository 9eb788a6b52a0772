"""Data arguments of the trainers on images: captioned images, preferences, and held-out prompts to sample."""

import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from align.cli.arguments import resolve_dataset
from align.cli.data import load_guards, named
from align.engine.settings import check_settings, setting
from preference_data.pairs import STRATEGIES, build_pairs, merge_votes
from preference_data.prompts import load_prompts
from preference_data.readers import read_captioned, read_preferences
from preference_data.records import Records
from preference_data.schemas import CaptionedImage, Pair
from preference_data.sources import parse_columns
from rewards import load_rewards


@dataclass
class SampleArguments:
    """Held-out prompts that are sampled while training on images, and what scores the samples."""

    eval_prompts_name: str | None = setting(None, "Held-out prompts to sample, for the grid and eval_NAME.")
    eval_prompts_split: str = setting("test", "Split of those prompts and of the guards.")
    guard_dataset_names: list[str] | None = setting(
        None, "Further held-out prompts to watch for damage, logged as eval_NAME_..."
    )
    rewards: list[str] = setting(
        [], "Score the samples: built-in names, module:attr or file.py:attr; mappings in a config.", mappings=True
    )

    # A subclass gives these names their own line of help, and says how a data set is read.
    dataset_name: str = setting("", "Data to train on.")
    dataset_split: str = setting("train", "Split to train on.")
    eval_dataset_name: str | None = setting(None, "Held-out data. Default: none.")
    eval_split: str = setting("test", "Split of the held-out data.")
    columns: list[str] | None = setting(
        None, "The data's names of columns, as NAME=COLUMN: chosen=image_a rejected=image_b.", fixed_on_resume=True
    )
    image_folder: str | None = setting(
        None, "Where relative paths of images start and all images lie. Default: the data's folder, found."
    )
    on_bad_row: Literal["error", "skip"] = setting(
        "error", "A row that cannot be used: error stops, skip leaves it out and lists it."
    )

    def __post_init__(self) -> None:
        check_settings(self)

    def load(self) -> dict[str, Any]:
        """Return what a trainer on images takes; raises BadRow for a file that is known to be bad without decoding it."""
        return {
            **self.load_samples(),
            "train_dataset": self._read(named(self.dataset_name), self.dataset_split),
            "eval_dataset": self._read(self.eval_dataset_name, self.eval_split) if self.eval_dataset_name else None,
            "on_bad_row": self.on_bad_row,
        }

    def _read(self, name: str, split: str) -> Iterable[Any]:
        raise NotImplementedError

    def _reading(self) -> dict[str, Any]:
        """Return how data are read, whatever they are."""
        columns = parse_columns(self.columns or []) or None
        return {"on_bad_row": self.on_bad_row, "image_folder": self.image_folder, "columns": columns}

    def load_samples(self) -> dict[str, Any]:
        """Return what a trainer takes to sample; raises ValueError where rewards, prompts and guards do not fit."""
        if (self.rewards or self.guard_dataset_names) and not self.eval_prompts_name:
            raise ValueError("rewards and guards score samples of held-out prompts: give --eval_prompts_name")
        if self.guard_dataset_names and not self.rewards:
            raise ValueError("guard data sets are only scored: give --rewards, or leave the guards out")
        rewards = load_rewards(self.rewards) if self.rewards else []  # first: a wrong name is known at once
        split = self.eval_prompts_split
        prompts = load_prompts(resolve_dataset(self.eval_prompts_name), split) if self.eval_prompts_name else None
        guards = load_guards(self.guard_dataset_names, split)
        return {"rewards": rewards, "eval_prompts": prompts, "guard_datasets": guards}


@dataclass
class CaptionedDataArguments(SampleArguments):
    """Captioned images."""

    dataset_name: str = setting(
        "",
        "Images and captions: a folder (metadata.jsonl, or .txt beside each image), a file, a hub name, or tiny/NAME.",
    )
    eval_dataset_name: str | None = setting(None, "Held-out images, for the held-out loss. Default: none.")
    eval_split: str = setting("test", "Split of the held-out images.")
    trigger: str | None = setting(
        None,
        "A word for the style: the caption of every image that has none, and the first word of those that have.",
        fixed_on_resume=True,
    )

    def _read(self, name: str, split: str) -> Records[CaptionedImage]:
        records = read_captioned(resolve_dataset(name), split, trigger=self.trigger, **self._reading())
        records.check_files(quiet=_is_other_process())
        return records


@dataclass
class PreferenceDataArguments(SampleArguments):
    """Preferences, and how pairs are made of them."""

    dataset_name: str = setting(
        "", "Preferences: parquet, JSON lines, webdataset tars, a folder or a hub name; see preference_data.readers."
    )
    eval_dataset_name: str | None = setting(None, "Held-out preferences, for loss and accuracy. Default: none.")
    eval_split: str = setting("test", "Split of the held-out preferences.")
    dataset_format: str | None = setting(
        None, "Their layout: pickapic, hpdv3, pairs, ranked, ... Default: by the columns.", fixed_on_resume=True
    )
    streaming: bool = setting(False, "Read a hub data set as it comes, without storing it.")
    pair_strategy: Literal["best_worst", "all_pairs"] = setting(
        "best_worst", f"Pairs of a ranked list: {' or '.join(STRATEGIES)}.", fixed_on_resume=True
    )
    min_margin: float = setting(0.0, "Leave out pairs whose scores differ by less.", fixed_on_resume=True, least=0)
    min_confidence: float = setting(
        0.0, "Leave out pairs that a smaller share of the votes prefers, 0..1.", fixed_on_resume=True, least=0, most=1
    )
    merge_annotators: bool = setting(
        False, "Several rows judge one and the same pair: take the majority.", fixed_on_resume=True
    )

    def _read(self, name: str, split: str) -> Iterable[Pair]:
        records: Any = read_preferences(
            resolve_dataset(name),
            split,
            format=self.dataset_format,
            streaming=self.streaming,
            **self._reading(),
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
