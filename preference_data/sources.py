"""Where rows come from: a file, a folder in one of the usual shapes, a hub data set, or one in memory."""

import os
import re
from collections.abc import Iterable, Iterator
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Protocol

from preference_data.images import BadRow
from preference_data.rows import IMAGE_ENDINGS, READERS, TEXT, Row, ending_of, read_rows, sample_row

#: Files that tell about a data set and hold no rows of it.
_NO_ROWS = {"writer.json", "dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json", "package.json"}
_METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
_BATCH = 16


class Source(Protocol):
    """Rows that can be read again and again.

    name: for messages. by_path: whether the rows only name the files of their images, so that reading them is cheap.
    """

    name: str
    by_path: bool

    def __iter__(self) -> Iterator[Row | BadRow]: ...


class Files:
    """Data files, read one behind the other; none is opened before its first row is due."""

    def __init__(self, name: str, files: Iterable[Path]) -> None:
        self.name = name
        self.files = list(files)
        self.by_path = all(ending_of(file) in TEXT for file in self.files)

    def __iter__(self) -> Iterator[Row | BadRow]:
        for file in self.files:
            for row in read_rows(file):
                yield row if isinstance(row, BadRow) else Row(row.where, tidy(row.values), row.folder)


class ImageFolder:
    """Images in a folder and its subfolders, with a metadata file or a ``.txt`` beside each image, or without captions.

    Of a folder with metadata, its rows come first and then the images that it does not list (without a prompt), unless
    the metadata is of another kind than one ``file_name`` a row.
    """

    def __init__(self, folder: Path) -> None:
        self.name = str(folder)
        self.folder = folder
        self.metadata = next((folder / name for name in _METADATA if (folder / name).is_file()), None)
        self.by_path = self.metadata is None or ending_of(self.metadata) in TEXT

    def __iter__(self) -> Iterator[Row | BadRow]:
        listed: set[str] = set()
        if self.metadata is not None:
            by_name = True
            for row in read_rows(self.metadata):
                if isinstance(row, BadRow):
                    yield row
                    continue
                by_name = by_name and isinstance(row.values.get("file_name"), str)
                if by_name:
                    listed.add(os.path.normpath(row.values["file_name"]))
                yield Row(row.where, tidy(row.values), row.folder)
            if not by_name:
                return
        for image in self.images():
            if os.path.relpath(image, self.folder) not in listed:
                yield self._row(image)

    def images(self) -> Iterator[Path]:
        """Every image file, in the order of names; hidden files and folders are left out."""
        for folder, below, files in os.walk(self.folder):
            below[:] = sorted(name for name in below if not name.startswith("."))
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

    def uncaptioned(self) -> Path | None:
        """The first image that has no ``.txt`` beside it, if there is no metadata either. Opens no file."""
        if self.metadata is not None:
            return None
        return next((image for image in self.images() if not image.with_suffix(".txt").is_file()), None)


class InMemory:
    """A `datasets.Dataset` or `IterableDataset`; images are taken as they are stored, not decoded."""

    by_path = False

    def __init__(self, name: str, dataset: Any) -> None:
        if hasattr(dataset, "keys"):
            raise ValueError(f"{name} has several splits, {', '.join(dataset.keys())}: give one of them")
        self.name = name
        self.dataset = dataset

    def __iter__(self) -> Iterator[Row | BadRow]:
        number = 0
        for table in self.dataset.with_format("arrow").iter(batch_size=_BATCH):
            for values in table.to_pylist():
                where = f"{self.name}, row {number}"
                number += 1
                if "__key__" in values:  # the webdataset builder names columns by the members' endings
                    row = sample_row(f"{where}, sample {values['__key__']!r}", values, None)
                    yield row if isinstance(row, BadRow) else Row(row.where, tidy(row.values), None)
                else:
                    yield Row(where, tidy(values), None)


def tidy(values: dict[str, Any]) -> dict[str, Any]:
    """The columns of a metadata file under the names they have elsewhere.

    As `datasets` has it: ``file_name`` is the column ``image``, ``file_names`` is ``images``, ``chosen_file_name`` is
    ``chosen`` and ``other_file_names`` is ``other``.
    """
    renamed = {}
    for column, value in values.items():
        stem, separator, rest = column.rpartition("file_name")
        if separator and rest in ("", "s") and (not stem or stem.endswith("_")):
            renamed[stem.rstrip("_") or f"image{rest}"] = value
    return {**renamed, **values} if renamed else values


def open_source(name: Any, split: str, *, config_name: str | None = None, streaming: bool = False) -> Source:
    """Find the rows that ``name`` stands for. Reads none of them.

    Args:
        name: a file (every split is the whole file), a folder, a hub data set, or a data set in memory.
        split: in a folder: ``data/SPLIT-*``, ``SPLIT-*`` or ``SPLIT`` with one of the known endings, ``SPLIT/`` of the
            same or with images. A folder that has no names of splits at all is every split.
        config_name, streaming: as in ``datasets.load_dataset``, for a hub data set.

    Raises:
        FileNotFoundError: no such path, no such split, or a hub that is out of reach.
        ValueError: a file of an unknown ending.
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
        beside = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        close = get_close_matches(path.name, beside, n=1)
        raise FileNotFoundError(f"{name} does not exist." + (f" Did you mean {close[0]!r}?" if close else ""))
    return InMemory(f"{name} ({split})", _from_hub(str(name), split, config_name, streaming))


def _from_hub(name: str, split: str, config_name: str | None, streaming: bool) -> Any:
    from datasets import load_dataset  # seconds, and only a hub name needs it

    try:
        return load_dataset(name, config_name, split=split, streaming=streaming)
    except Exception as error:  # the hub client raises many unrelated types when it cannot reach the hub
        raise FileNotFoundError(
            f"{name!r} is no file or folder here, and the hub did not give it as a data set "
            f"({type(error).__name__}: {error}). Give a path, or download it on a machine with a network."
        ) from error


def _folder(path: Path, split: str) -> Source:
    if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
        from datasets import load_from_disk  # what `save_to_disk` wrote

        saved = load_from_disk(str(path if (path / "state.json").is_file() else path / split))
        return InMemory(f"{path} ({split})", saved)
    for place in (path, path / "data", path / split):
        named = [file for file in _data_files(place) if _split_of(file.name, split) == split]
        if named:
            return _files(place, _one_kind(named))
    if any((path / split / name).is_file() for name in _METADATA):
        return ImageFolder(path / split)
    other = {_split_of(file.name, split) for place in (path, path / "data") for file in _data_files(place)}
    other |= {below.name for below in path.iterdir() if below.is_dir() and re.fullmatch(_SPLITS, below.name)}
    there = ", ".join(sorted(filter(None, other)))
    if there and not (path / split).is_dir() and not any((path / name).is_file() for name in _METADATA):
        raise FileNotFoundError(f"{path} has no data for the split {split!r}. It has: {there}")
    for place in (path / split, path, path / "data"):
        if any((place / name).is_file() for name in _METADATA):
            return ImageFolder(place)
        files = _one_kind(_data_files(place))
        if files:
            return _files(place, files)
        if place.is_dir() and next(ImageFolder(place).images(), None) is not None:
            return ImageFolder(place)
    raise FileNotFoundError(f"{path} has no data: no file ending in {', '.join(READERS)}, and no image")


def _files(place: Path, files: list[Path]) -> Files:
    return Files(str(files[0] if len(files) == 1 else place), files)


def _data_files(folder: Path) -> list[Path]:
    """Files with rows right in a folder, in the order of names; without hidden ones and an image folder's metadata."""
    if not folder.is_dir():
        return []
    skip = _NO_ROWS.union(_METADATA)
    files = [file for file in folder.iterdir() if ending_of(file) and not file.name.startswith(".")]
    return sorted(file for file in files if file.name not in skip and file.is_file())


def _one_kind(files: list[Path]) -> list[Path]:
    """Of several kinds of files the first in the order of :data:`READERS`: they would be the same rows twice."""
    for ending in READERS:
        kind = [file for file in files if ending_of(file) == ending]
        if kind:
            return kind
    return []


_SPLITS = r"train|training|test|testing|validation|valid|val|dev|eval|evaluation|held_out"


def _split_of(file: str, split: str) -> str | None:
    """The split that a data file's name begins with, ``split`` itself or a usual one, or None.

    `train.jsonl`, `train-00000-of-00004.parquet`, `train_017.tar`, `metadata-train.parquet`, `validation_unique.json`.
    """
    ending = next(ending for ending in READERS if file.lower().endswith(ending))
    names = rf"{re.escape(split)}|(?:{_SPLITS})(?:_[a-z][a-z0-9_]*)?"
    found = re.fullmatch(rf"(?:metadata-)?({names})(?:[-_.]\d.*)?", file[: -len(ending)])
    return found.group(1) if found else None
