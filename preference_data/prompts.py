"""Prompts for GRPO: a ``prompt`` column and any others, which reach the rewards by name."""

import glob
from difflib import get_close_matches
from pathlib import Path

from datasets import Dataset, load_dataset

#: File endings and the `datasets` builder that reads them.
BUILDERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv", ".txt": "text"}


def find_files(name: str, split: str) -> dict[str, str] | None:
    """Where ``name`` keeps ``split`` locally: ``{"builder": ..., "file": ...}``, or None for a hub name.

    ``name`` is a file of one of :data:`BUILDERS` (every split is the whole file), or a folder with SPLIT.jsonl and
    the like. Raises FileNotFoundError for a path that is not there, before anything else is loaded.
    """
    path = Path(name).expanduser()
    if path.is_file():
        if path.suffix not in BUILDERS:
            raise ValueError(f"cannot read prompts from {name}: known endings are {', '.join(BUILDERS)}")
        return {"builder": BUILDERS[path.suffix], "file": str(path)}
    if path.is_dir():
        for suffix, builder in BUILDERS.items():
            if (path / f"{split}{suffix}").is_file():
                return {"builder": builder, "file": str(path / f"{split}{suffix}")}
        there = sorted(p.name for p in path.iterdir() if p.suffix in BUILDERS)
        raise FileNotFoundError(
            f"{name} has no file for the split {split!r} ({split}.jsonl, ...). It has: {', '.join(there) or 'none'}"
        )
    if path.is_absolute() or name.startswith((".", "~")) or path.suffix in BUILDERS:
        beside = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        close = get_close_matches(path.name, beside, n=1)
        raise FileNotFoundError(f"data file {name} does not exist." + (f" Did you mean {close[0]!r}?" if close else ""))
    return None


def load_prompts(name: str, split: str = "train") -> Dataset:
    """Read prompts from a file, a folder of split files, or a hub data set.

    Raises:
        FileNotFoundError: a path that is not there, or a hub name that cannot be reached.
        ValueError: a file that cannot be read, no ``prompt`` column (naming the nearest), or an empty prompt (naming
            file and row).
    """
    found = find_files(name, split)
    if found is not None:
        dataset = _read(found["builder"], found["file"])
        if found["builder"] == "text":
            dataset = dataset.rename_column("text", "prompt")
    else:
        try:
            dataset = load_dataset(name, split=split)
        except Exception as error:  # the hub client raises many unrelated types when it cannot reach the hub
            raise FileNotFoundError(
                f"{name!r} is no file or folder here, and the hub did not give it as a data set "
                f"({type(error).__name__}: {error}). Give a path, or download it on a machine with a network."
            ) from error
    return check_prompts(dataset, found["file"] if found else f"{name} ({split})")


def _read(builder: str, file: str) -> Dataset:
    if not Path(file).stat().st_size:
        raise ValueError(f"{file} holds no rows")
    try:
        return load_dataset(builder, data_files=glob.escape(file), split="train")  # it takes a path as a pattern
    except Exception as error:  # of as many types as there are builders; the reason is mostly in the cause
        raise ValueError(f"cannot read prompts from {file}: {error.__cause__ or error}") from error


def check_prompts(dataset: Dataset, source: str = "the data set") -> Dataset:
    """``dataset`` unchanged, once it is known to hold prompts and nothing but prompts in its ``prompt`` column."""
    if "prompt" not in dataset.column_names:
        close = get_close_matches("prompt", dataset.column_names, n=1, cutoff=0.4)
        hint = f" Did you mean to rename {close[0]!r}?" if close else ""
        raise ValueError(f"{source} has no column 'prompt'; it has {dataset.column_names}.{hint}")
    for row, prompt in enumerate(dataset["prompt"]):
        if not isinstance(prompt, str):
            raise ValueError(f"{source}, row {row}, column 'prompt': expected text, found {type(prompt).__name__}")
        if not prompt.strip():
            raise ValueError(f"{source}, row {row}, column 'prompt': the prompt is empty")
    if not len(dataset):
        raise ValueError(f"{source} holds no rows")
    return dataset
