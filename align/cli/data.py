"""Data arguments of the trainers on their own samples: prompts, held-out prompts, guards."""

from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset

from align.cli.arguments import resolve_dataset
from align.engine.settings import check_settings, setting
from preference_data.prompts import load_prompts
from rewards import load_rewards


def load_guards(names: list[str] | None, split: str) -> dict[str, Dataset]:
    """Load guard data sets, by the name they are logged under."""
    guards: dict[str, Dataset] = {}
    for name in names or []:
        if Path(name).stem in guards:
            raise ValueError(f"two guard data sets are both called {Path(name).stem!r}: rename one of them")
        guards[Path(name).stem] = load_prompts(resolve_dataset(name), split)
    return guards


@dataclass
class DataArguments:
    """Prompts and rewards."""

    dataset_name: str = setting(MISSING, "Prompts: a file, a folder with train.jsonl, a hub name, or tiny/NAME.")
    rewards: list[str] = setting(
        MISSING, "Built-in names, module:attr or file.py:attr; mappings in a config.", mappings=True
    )
    dataset_split: str = setting("train", "Split to train on.")
    eval_dataset_name: str | None = setting(None, "Held-out prompts. Default: none.")
    eval_split: str = setting("test", "Split of the held-out prompts and the guards.")
    guard_dataset_names: list[str] | None = setting(
        None, "Further held-out prompts to watch for damage, logged as eval_NAME_..."
    )

    def __post_init__(self) -> None:
        check_settings(self)
        named(self.dataset_name)

    def load(self) -> dict[str, Any]:
        """Return what an online trainer takes: rewards, the training, the held-out and the guard prompts."""
        rewards, held_out = load_rewards(self.rewards), None  # first: a wrong name is known at once
        if self.eval_dataset_name:
            held_out = load_prompts(resolve_dataset(self.eval_dataset_name), self.eval_split)
        return {
            "rewards": rewards,
            "train_dataset": load_prompts(resolve_dataset(self.dataset_name), self.dataset_split),
            "eval_dataset": held_out,
            "guard_datasets": load_guards(self.guard_dataset_names, self.eval_split),
        }


def named(dataset_name: str) -> str:
    """Return the name of a data set; raises ValueError where none was given."""
    if not dataset_name:
        raise ValueError("no training data was given: pass --dataset_name, or `dataset_name:` in the config")
    return dataset_name
