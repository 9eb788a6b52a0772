"""Prompts for GRPO: a column ``prompt``, and any other columns, which are passed to the rewards by name."""

import glob
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple
from weakref import WeakSet

from datasets import Audio, Dataset, Features, Image, Video, load_dataset

from preference_data.hints import did_you_mean
from preference_data.places import lies_in
from preference_data.sources import load_from_hub

#: File endings, and the builder of `datasets` that reads each.
BUILDERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv", ".txt": "text"}


#: Columns that `datasets` decodes when a row is looked at.
MEDIA = (Image, Audio, Video)
#: Data sets that :func:`check_prompts` has passed. They never change, so that reading them once is enough.
_checked: WeakSet[Dataset] = WeakSet()


class PromptFile(NamedTuple):
    """A file with prompts and the builder of `datasets` that reads it."""

    builder: str
    path: str


def find_prompt_file(name: str, split: str) -> PromptFile | None:
    """Return the local file that holds a split, or None if ``name`` is that of a hub data set.

    ``name`` is a file with one of the endings in :data:`BUILDERS` (which is every split), or a folder with SPLIT.jsonl
    and the like. Nothing is loaded.

    Raises:
        FileNotFoundError: no such path, or no file for the split. ValueError: a file with an unknown ending, or one of the
            folder that is a link out of it.
    """
    path = Path(name).expanduser()
    if path.is_file():
        if path.suffix.lower() not in BUILDERS:
            raise ValueError(f"cannot read prompts from {name}: known endings are {', '.join(BUILDERS)}")
        return PromptFile(BUILDERS[path.suffix.lower()], str(path))
    if path.is_dir():
        for suffix, builder in BUILDERS.items():
            file = path / f"{split}{suffix}"
            if file.is_file():
                if not lies_in(file, path):
                    raise ValueError(f"{file} is a link to a file outside of the folder {path}: name that file itself")
                return PromptFile(builder, str(file))
        files = sorted(p.name for p in path.iterdir() if p.suffix in BUILDERS)
        raise FileNotFoundError(
            f"{name} has no file for the split {split!r} ({split}.jsonl, ...). It has: {', '.join(files) or 'none'}"
        )
    if path.is_absolute() or name.startswith((".", "~")) or path.suffix in BUILDERS:
        siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        raise FileNotFoundError(f"data file {name} does not exist.{did_you_mean(path.name, siblings)}")
    return None


def load_prompts(name: str, split: str = "train") -> Dataset:
    """Read prompts from a file, a folder of split files, or a hub data set.

    Raises:
        FileNotFoundError: no such path, or a hub data set that cannot be loaded.
        ValueError: a file that cannot be read, no column ``prompt`` (naming the nearest), or an empty prompt (naming
            file and row).
    """
    file = find_prompt_file(name, split)
    dataset = _read(file) if file is not None else load_from_hub(name, split)
    return check_prompts(_without_decoding(dataset), file.path if file else f"{name} ({split})")


def _read(file: PromptFile) -> Dataset:
    if not Path(file.path).stat().st_size:
        raise ValueError(f"{file.path} holds no rows")
    try:
        # Escaped because `datasets` takes a path as a pattern.
        dataset = load_dataset(file.builder, data_files=glob.escape(file.path), split="train")
        if file.builder == "text":
            lines = [line.removeprefix("\ufeff").strip() for line in dataset["text"]]
            dataset = Dataset.from_dict({"prompt": [line for line in lines if line]})
        return dataset
    except Exception as error:  # each builder has its own types; the reason is mostly in the cause
        raise ValueError(f"cannot read prompts from {file.path}: {error.__cause__ or error}") from error


def _without_decoding(dataset: Dataset) -> Dataset:
    """Leave media columns as they are stored: decoding a row would open whatever path or URL it names."""
    features = Features({name: _stored(feature) for name, feature in dataset.features.items()})
    return dataset if features == dataset.features else dataset.cast(features)


def _stored(feature: Any) -> Any:
    if isinstance(feature, dict):
        return {name: _stored(inner) for name, inner in feature.items()}
    if hasattr(feature, "feature"):  # a list
        return replace(feature, feature=_stored(feature.feature))
    return replace(feature, decode=False) if isinstance(feature, MEDIA) else feature


def check_prompts(dataset: Dataset, source: str = "the data set") -> Dataset:
    """Return ``dataset`` unchanged after checking that its column ``prompt`` holds a prompt in every row.

    Raises:
        ValueError: no such column (naming the nearest), no rows, or a row without text (naming it).
    """
    if dataset in _checked:
        return dataset
    if "prompt" not in dataset.column_names:
        hint = did_you_mean("prompt", dataset.column_names, "Did you mean to rename")
        separator = next((s for s in ";\t" if any(s in name for name in dataset.column_names)), None)
        if separator:
            hint = f" Its columns are separated by {separator!r}: write commas"
        raise ValueError(f"{source} has no column 'prompt'; it has {dataset.column_names}.{hint}")
    for row, prompt in enumerate(dataset["prompt"]):
        if not isinstance(prompt, str):
            raise ValueError(f"{source}, row {row}, column 'prompt': expected text, found {type(prompt).__name__}")
        if not prompt.strip():
            raise ValueError(f"{source}, row {row}, column 'prompt': the prompt is empty")
    if not len(dataset):
        raise ValueError(f"{source} holds no rows")
    _checked.add(dataset)
    return dataset
