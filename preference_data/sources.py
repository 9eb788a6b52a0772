"""Sources of rows: files, folders in the usual layouts, hub data sets, and data sets in memory."""

import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol

from preference_data.digests import data_digest
from preference_data.hints import did_you_mean
from preference_data.images import BadRow
from preference_data.rows import IMAGE_ENDINGS, READERS, TEXT_ENDINGS, Row, ending_of, read_rows, sample_row

#: Files that describe a data set and hold none of its rows.
_WITHOUT_ROWS = {
    "writer.json",
    "dataset_info.json",
    "dataset_infos.json",
    "dataset_dict.json",
    "state.json",
    "package.json",
}
_METADATA_FILES = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
_BATCH = 16


class Source(Protocol):
    """Rows that can be iterated any number of times; every iteration reads them again.

    name: for messages. by_path: whether the rows hold only the paths of their images, and are therefore small.
    """

    name: str
    by_path: bool

    def __iter__(self) -> Iterator[Row | BadRow]: ...


class Files:
    """Data files, read one after the other; each is opened when its first row is asked for."""

    def __init__(self, name: str, files: Iterable[Path]) -> None:
        self.name = name
        self.files = list(files)
        self.by_path = all(ending_of(file) in TEXT_ENDINGS for file in self.files)

    def __iter__(self) -> Iterator[Row | BadRow]:
        for file in self.files:
            for row in read_rows(file):
                yield (
                    row if isinstance(row, BadRow) else Row(row.where, rename_file_name_columns(row.values), row.folder)
                )


class ImageFolder:
    """Images in a folder and its subfolders, with a metadata file, a ``.txt`` beside each image, or no captions.

    If there is metadata, its rows come first, then the images that it does not list, without a prompt. If the rows of
    the metadata do not have one ``file_name`` each, only they are given.
    """

    def __init__(self, folder: Path) -> None:
        self.name = str(folder)
        self.folder = folder
        self.metadata = next((folder / name for name in _METADATA_FILES if (folder / name).is_file()), None)
        self.by_path = self.metadata is None or ending_of(self.metadata) in TEXT_ENDINGS

    def __iter__(self) -> Iterator[Row | BadRow]:
        listed: set[str] = set()
        if self.metadata is not None:
            has_file_names = True
            for row in read_rows(self.metadata):
                if isinstance(row, BadRow):
                    yield row
                    continue
                has_file_names = has_file_names and isinstance(row.values.get("file_name"), str)
                if has_file_names:
                    listed.add(os.path.normpath(row.values["file_name"]))
                yield Row(row.where, rename_file_name_columns(row.values), row.folder)
            if not has_file_names:
                return
        for image in self.images():
            if os.path.relpath(image, self.folder) not in listed:
                yield self._row(image)

    def images(self) -> Iterator[Path]:
        """Yield every image file, sorted by name; hidden files and folders are left out."""
        for folder, subfolders, files in os.walk(self.folder):
            subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
            for name in sorted(files):
                if name.lower().endswith(IMAGE_ENDINGS) and not name.startswith("."):
                    yield Path(folder, name)

    def _row(self, image: Path) -> Row | BadRow:
        values: dict[str, Any] = {"image": image.name}
        caption = image.with_suffix(".txt")
        if self.metadata is None and caption.is_file():
            try:
                values["prompt"] = caption.read_text(encoding="utf-8-sig").strip()
            except (OSError, UnicodeDecodeError) as error:
                return BadRow(str(caption), f"the caption cannot be read: {error}")
        return Row(str(image), values, image.parent)

    def first_without_caption(self) -> Path | None:
        """Return the first image that has no ``.txt`` beside it, or None. Opens no file."""
        return next((image for image in self.images() if not image.with_suffix(".txt").is_file()), None)


class InMemory:
    """A `datasets.Dataset` or `IterableDataset`, with its images as they are stored, not decoded."""

    by_path = False

    def __init__(self, name: str, dataset: Any) -> None:
        if hasattr(dataset, "keys"):
            raise ValueError(f"{name} has several splits, {', '.join(dataset.keys())}: pass one of them")
        self.name = name
        self.dataset = dataset

    def digest(self) -> str | None:
        """Return a digest of the data's content; None of a data set that streams."""
        return data_digest(self.dataset)

    def __iter__(self) -> Iterator[Row | BadRow]:
        number = 0
        for table in self.dataset.with_format("arrow").iter(batch_size=_BATCH):
            for values in table.to_pylist():
                where = f"{self.name}, row {number}"
                number += 1
                if "__key__" in values:  # the webdataset builder names columns after the members' endings
                    row = sample_row(f"{where}, sample {values['__key__']!r}", values, None)
                    yield row if isinstance(row, BadRow) else Row(row.where, rename_file_name_columns(row.values), None)
                else:
                    yield Row(where, rename_file_name_columns(values), None)


def rename_file_name_columns(values: dict[str, Any]) -> dict[str, Any]:
    """Rename the columns of a metadata file to the names that other files have.

    The convention is that of `datasets`: ``file_name`` becomes ``image``, ``file_names`` becomes ``images``,
    ``chosen_file_name`` becomes ``chosen`` and ``other_file_names`` becomes ``other``. The old names stay as well.
    """
    renamed = {}
    for column, value in values.items():
        stem, separator, rest = column.rpartition("file_name")
        if separator and rest in ("", "s") and (not stem or stem.endswith("_")):
            renamed[stem.rstrip("_") or f"image{rest}"] = value
    return {**renamed, **values} if renamed else values


def open_source(name: Any, split: str, *, config_name: str | None = None, streaming: bool = False) -> Source:
    """Find the rows that ``name`` refers to, without reading any.

    Args:
        name: a file (which is every split), a folder, a hub data set, or a data set in memory.
        split: in a folder, the files ``data/SPLIT-*``, ``SPLIT-*`` or ``SPLIT`` with one of the known endings, or a
            folder ``SPLIT/`` of such files or of images. A folder without any split's name is every split.
        config_name, streaming: as in ``datasets.load_dataset``, for a hub data set.

    Raises:
        FileNotFoundError: no such path, no such split, or a hub data set that cannot be loaded.
        ValueError: a file with an unknown ending.
    """
    if not isinstance(name, (str, os.PathLike)):
        return InMemory("the data set", name)
    path = Path(name).expanduser()
    if path.is_file():
        if ending_of(path) is None:
            raise ValueError(f"cannot read rows from {name}: known endings are {', '.join(READERS)}")
        return Files(str(path), [path])
    if path.is_dir():
        return _folder(path, split)
    if path.is_absolute() or str(name).startswith((".", "~")) or ending_of(path) is not None:
        siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        raise FileNotFoundError(f"{name} does not exist.{did_you_mean(path.name, siblings)}")
    return InMemory(f"{name} ({split})", load_from_hub(str(name), split, config_name, streaming))


def load_from_hub(name: str, split: str, config_name: str | None = None, streaming: bool = False) -> Any:
    """Load a split of a hub data set, or raise FileNotFoundError."""
    from datasets import load_dataset  # takes seconds, and only hub names need it

    try:
        return load_dataset(name, config_name, split=split, streaming=streaming)
    except Exception as error:  # the hub client raises many unrelated types when it cannot reach the hub
        raise FileNotFoundError(
            f"{name!r} is no file or folder here, and could not be loaded from the hub "
            f"({type(error).__name__}: {error}). Give a path, or download it on a machine with a network."
        ) from error


def _folder(path: Path, split: str) -> Source:
    if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
        from datasets import load_from_disk  # what `save_to_disk` wrote

        saved = load_from_disk(str(path if (path / "state.json").is_file() else path / split))
        return InMemory(f"{path} ({split})", saved)
    for folder in (path, path / "data", path / split):
        files = [file for file in _data_files(folder) if _split_of(file.name, split) == split]
        if files:
            return _files(folder, _one_kind(files))
    if any((path / split / name).is_file() for name in _METADATA_FILES):
        return ImageFolder(path / split)
    splits = {_split_of(file.name, split) for folder in (path, path / "data") for file in _data_files(folder)}
    splits |= {item.name for item in path.iterdir() if item.is_dir() and re.fullmatch(_SPLITS, item.name)}
    found = ", ".join(sorted(filter(None, splits)))
    if found and not (path / split).is_dir() and not any((path / name).is_file() for name in _METADATA_FILES):
        raise FileNotFoundError(f"{path} has no data for the split {split!r}. It has: {found}")
    for folder in (path / split, path, path / "data"):
        if any((folder / name).is_file() for name in _METADATA_FILES):
            return ImageFolder(folder)
        files = _one_kind(_data_files(folder))
        if files:
            return _files(folder, files)
        if folder.is_dir() and next(ImageFolder(folder).images(), None) is not None:
            return ImageFolder(folder)
    raise FileNotFoundError(f"{path} has no data: no file ending in {', '.join(READERS)}, and no image")


def _files(folder: Path, files: list[Path]) -> Files:
    return Files(str(files[0] if len(files) == 1 else folder), files)


def _data_files(folder: Path) -> list[Path]:
    """Return the files with rows directly in a folder, sorted; without hidden ones and an image folder's metadata."""
    if not folder.is_dir():
        return []
    skip = _WITHOUT_ROWS.union(_METADATA_FILES)
    files = [file for file in folder.iterdir() if ending_of(file) and not file.name.startswith(".")]
    return sorted(file for file in files if file.name not in skip and file.is_file())


def _one_kind(files: list[Path]) -> list[Path]:
    """Return the files with the first ending in :data:`READERS` that occurs: others would be the same rows twice."""
    for ending in READERS:
        chosen = [file for file in files if ending_of(file) == ending]
        if chosen:
            return chosen
    return []


_SPLITS = r"train|training|test|testing|validation|valid|val|dev|eval|evaluation|held_out"


def _split_of(file: str, split: str) -> str | None:
    """Return the split that a data file's name begins with, ``split`` itself or a common one, or None.

    Examples of names: `train.jsonl`, `train-00000-of-00004.parquet`, `train_017.tar`, `metadata-train.parquet`,
    `validation_unique.json`.
    """
    ending = next(ending for ending in READERS if file.lower().endswith(ending))
    names = rf"{re.escape(split)}|(?:{_SPLITS})(?:_[a-z][a-z0-9_]*)?"
    found = re.fullmatch(rf"(?:metadata-)?({names})(?:[-_.]\d.*)?", file[: -len(ending)])
    return found.group(1) if found else None
