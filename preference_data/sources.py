"""Sources of rows: files, folders in the usual layouts, hub data sets, and data sets in memory."""

import glob
import itertools
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

from preference_data.digests import data_digest
from preference_data.hints import did_you_mean
from preference_data.image_folders import (
    METADATA_FILES,
    SPLITS,
    ImageFolder,
    has_images,
    is_image,
    is_split_up,
    metadata_in,
    not_used,
    rename_file_name_columns,
    sidecars,
)
from preference_data.images import BadRow
from preference_data.places import lies_in
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
_BATCH = 16
_BRACES = re.compile(r"\{([^{}]*(?:,|\.\.)[^{}]*)\}")
_MOST_FILES = 100_000


class Source(Protocol):
    """Rows that can be iterated any number of times; every iteration reads them again.

    name: for messages. by_path: whether the rows hold only the paths of their images, and are therefore small.
    """

    name: str
    by_path: bool

    def __iter__(self) -> Iterator[Row | BadRow]: ...


class Files:
    """Data files, read one after the other; each is opened when its first row is asked for.

    ``root``: the folder that their rows' paths, and the files themselves, must stay in. ``others``: data files beside them.
    """

    def __init__(self, name: str, files: Iterable[Path], root: Path, others: Iterable[Path] = ()) -> None:
        self.name = name
        self.files, self.others = list(files), list(others)
        self.root = root
        self.by_path = all(ending_of(file) in TEXT_ENDINGS for file in self.files)

    def __iter__(self) -> Iterator[Row | BadRow]:
        for file in self.files:
            for row in read_rows(file):
                if isinstance(row, BadRow):
                    yield row
                else:
                    yield replace(row, values=rename_file_name_columns(row.values), within=self.root)

    def left_out(self, used: set[Path]) -> list[tuple[str, str]]:
        """List (reason, file) of the data files, and pictures, beside those that are used; ``used``: files of images."""
        kinds = {ending_of(file) for file in self.files}
        reasons = {True: "its name is of no split", False: "another kind of file is read"}
        listed = [(reasons[ending_of(file) in kinds], str(file)) for file in self.others]
        if not self.by_path:
            return listed
        folders = sorted({file.parent for file in used})  # not all below the root, which may be anybody's home
        return listed + not_used(
            [file for folder in folders for file in sorted(folder.iterdir()) if file.is_file()], used
        )


class Renamed:
    """Rows of a source with some columns under other names."""

    def __init__(self, source: Source, columns: Mapping[str, str]) -> None:
        self.name, self.by_path, self.source, self.columns = source.name, source.by_path, source, dict(columns)

    def __iter__(self) -> Iterator[Row | BadRow]:
        for number, row in enumerate(self.source):
            if number == 0 and isinstance(row, Row):
                self.check(row)
            if isinstance(row, Row):
                yield replace(row, values=self._renamed(row), named_in_file=self.columns)
            else:
                yield row

    def _renamed(self, row: Row) -> dict[str, Any]:
        kept = {name: value for name, value in row.values.items() if name not in self.columns.values()}
        return kept | {new: row.values[old] for new, old in self.columns.items() if old in row.values}

    def check(self, row: Row) -> None:
        """Raise ValueError when a row, the first one, lacks a column that is named."""
        missing = next((old for old in self.columns.values() if old not in row.values), None)
        if missing is not None:
            raise ValueError(
                f"{row.where} has no column {missing!r}, which --columns names.{did_you_mean(missing, list(row.values))}"
            )


def parse_columns(words: Iterable[str]) -> dict[str, str]:
    """Return what ``NAME=COLUMN ...`` says, for :class:`Renamed`; raise ValueError for anything else."""
    pairs = [word.partition("=") for word in words]
    for name, sign, column in pairs:
        if not (name and sign and column):
            raise ValueError(f"columns: expected NAME=COLUMN, such as chosen=image_a, found {name + sign + column!r}")
    return {name: column for name, _, column in pairs}


class InMemory:
    """A `datasets.Dataset` or `IterableDataset`, with its images as they are stored, not decoded."""

    by_path = False

    def __init__(self, name: str, dataset: Any, within: Path | None = None) -> None:
        if hasattr(dataset, "keys"):
            raise ValueError(f"{name} has several splits, {', '.join(dataset.keys())}: pass one of them")
        self.name = name
        self.dataset = dataset
        self.within = within

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
                    yield row if isinstance(row, BadRow) else self._contained(row)
                else:
                    yield self._contained(Row(where, values, None))

    def _contained(self, row: Row) -> Row:
        return replace(row, values=rename_file_name_columns(row.values), within=self.within)


def open_source(
    name: Any,
    split: str,
    *,
    config_name: str | None = None,
    streaming: bool = False,
    fits: Callable[[list[str]], bool] = lambda columns: True,
) -> Source:
    """Find the rows that ``name`` refers to, and read at most a first one.

    Args:
        name: a file (which is every split), a pattern of files (``part-{000..009}.tar``, ``*.parquet``), a folder, a hub
            data set, or a data set in memory.
        split: in a folder, the files ``data/SPLIT-*``, ``SPLIT-*`` or ``SPLIT`` with one of the known endings, or a
            folder ``SPLIT/`` of such files, or ``SPLIT/`` or ``data/SPLIT/`` of images. A folder without any split's name is every split.
        config_name, streaming: as in ``datasets.load_dataset``, for a hub data set.
        fits: whether columns are those that are looked for. A file beside images whose rows do not fit is none of the data.

    Raises:
        FileNotFoundError: no such path, no such split, or a hub data set that cannot be loaded.
        ValueError: a file with an unknown ending.
    """
    if not isinstance(name, (str, os.PathLike)):
        return InMemory("the data set", name)
    path = _expanded(name)
    if path.is_file():
        if ending_of(path) is None:
            raise ValueError(f"cannot read rows from {name}: known endings are {', '.join(READERS)}")
        return Files(str(path), [path], path.parent)
    if path.is_dir():
        return _folder(path, split, fits)
    if any(sign in str(name) for sign in "*?{"):
        files = expand_pattern(str(path))
        return Files(str(name), files, Path(os.path.commonpath([file.parent for file in files])))
    if path.is_absolute() or str(name).startswith((".", "~")) or ending_of(path) is not None:
        siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        raise FileNotFoundError(f"{name} does not exist.{did_you_mean(path.name, siblings)}")
    from datasets import config  # its cache is where files of a hub's data set lie

    saved = load_from_hub(str(name), split, config_name, streaming)
    return InMemory(f"{name} ({split})", saved, Path(config.HF_CACHE_HOME))


def _expanded(name: str | os.PathLike[str]) -> Path:
    try:
        return Path(name).expanduser()
    except RuntimeError:  # there is no such user
        return Path(name)


def expand_pattern(pattern: str) -> list[Path]:
    """Return the files that a pattern names, with ``*``, ``?``, and webdataset's ``{000..017}`` and ``{a,b}``.

    Raises:
        FileNotFoundError: one of the files does not exist, or none matches. ValueError: a file with an unknown ending.
    """
    names, files = [pattern], list[Path]()
    while any(_BRACES.search(name) for name in names):
        expanded = list(itertools.islice(itertools.chain.from_iterable(map(_expand_braces, names)), _MOST_FILES + 1))
        if len(expanded) > _MOST_FILES:
            raise ValueError(f"{pattern} names more than {_MOST_FILES} files")
        names = expanded
    for name in names:
        found = [Path(file) for file in sorted(glob.glob(name))]
        if not found:
            raise FileNotFoundError(f"{pattern}: {'no file matches' if len(names) == 1 else f'{name} does not exist'}")
        files += found
    unknown = next((file for file in files if ending_of(file) is None or not file.is_file()), None)
    if unknown is not None:
        raise ValueError(f"{pattern}: cannot read rows from {unknown}: known endings are {', '.join(READERS)}")
    return files


def _expand_braces(name: str) -> list[str]:
    found = _BRACES.search(name)
    if found is None:
        return [name]
    inside = found[1]
    low, dots, high = inside.partition("..")
    if dots and low.isdigit() and high.isdigit():
        first, last = sorted((int(low), int(high)))
        if last - first > _MOST_FILES:
            raise ValueError(f"{{{inside}}} names more than {_MOST_FILES} files")
        choices = [f"{number:0{len(low)}d}" for number in range(first, last + 1)]
    else:
        choices = inside.split(",")
    return [name[: found.start()] + choice + name[found.end() :] for choice in choices]


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


def _folder(path: Path, split: str, fits: Callable[[list[str]], bool]) -> Source:
    single = all((path / name).is_file() for name in ("state.json", "dataset_info.json"))
    if single or (path / "dataset_dict.json").is_file():
        from datasets import load_from_disk  # what `save_to_disk` wrote

        return InMemory(f"{path} ({split})", load_from_disk(str(path if single else path / split)), path)
    for folder in (path, path / "data", path / split):
        split_of = {file: _split_of(file.name, split) for file in _data_files(folder, fits)}
        files = _one_kind([file for file in split_of if split_of[file] == split])
        if files:
            others = [file for file in split_of if split_of[file] in (split, None) and file not in files]
            return _files(path, files, others)
    home = path / "data" if is_split_up(path / "data") and not is_split_up(path) else path  # of the splits' folders
    if metadata_in(home / split) is not None:
        return ImageFolder(home / split, given=path)
    splits = {_split_of(file.name, split) for folder in (path, path / "data") for file in _data_files(folder, fits)}
    subfolders = [item.name for item in home.iterdir() if item.is_dir() and not item.name.startswith(".")]
    splits |= {name for name in subfolders if re.fullmatch(SPLITS, name)}
    found = ", ".join(sorted(filter(None, splits)))
    if found and not (home / split).is_dir() and (metadata_in(path) is None or is_split_up(home)):
        raise FileNotFoundError(f"{path} has no data for the split {split!r}. It has: {found}")
    places = [home / split, path, path / "data"]
    others = [home / name for name in subfolders if name != split]
    if splits <= {split, None} and (has_images(others) or any(map(is_image, home.iterdir()))):
        places = [path]  # a subfolder among other images that happens to have the name of a split
    for folder in places:
        if metadata_in(folder) is not None:
            return ImageFolder(folder, given=path)
        beside = _data_files(folder, fits)
        files = _one_kind(beside)
        if files:
            return _files(path, files, [file for file in beside if file not in files])
        if folder.is_dir() and next(ImageFolder(folder).images(), None) is not None:
            return ImageFolder(folder, _data_files(folder), path)
    raise FileNotFoundError(f"{path} has no data: no file ending in {', '.join(READERS)}, and no image")


def _fitting(file: Path, fits: Callable[[list[str]], bool]) -> bool:
    """Whether the first row of a file has the columns that are looked for."""
    row = next(iter(read_rows(file)), None)
    return isinstance(row, Row) and fits(list(rename_file_name_columns(row.values)))


def _files(root: Path, files: list[Path], others: list[Path]) -> Files:
    for file in files:
        if not lies_in(file, root):
            raise ValueError(f"{file} is a link to a file outside of the folder {root}: name that file itself")
    return Files(str(files[0] if len(files) == 1 else files[0].parent), files, root, others)


def _data_files(folder: Path, fits: Callable[[list[str]], bool] | None = None) -> list[Path]:
    """Return the files with rows directly in a folder, sorted.

    They are not: hidden files, an image folder's metadata, the ``.json`` beside an image of the same name; nor, where the
    folder has images, a file whose first row does not have the columns that ``fits`` looks for.
    """
    if not folder.is_dir():
        return []
    skip, names = _WITHOUT_ROWS.union(METADATA_FILES), [file.name for file in folder.iterdir()]
    beside, has_images_beside = sidecars(folder), any(name.lower().endswith(IMAGE_ENDINGS) for name in names)
    files = [folder / name for name in sorted(names) if ending_of(folder / name) and not name.startswith(".")]
    found = [file for file in files if file.name not in skip and file not in beside and file.is_file()]
    return [file for file in found if fits is None or not has_images_beside or _fitting(file, fits)]


def _one_kind(files: list[Path]) -> list[Path]:
    """Return the files with the first ending in :data:`READERS` that occurs: others would be the same rows twice."""
    for ending in READERS:
        chosen = [file for file in files if ending_of(file) == ending]
        if chosen:
            return chosen
    return []


def _split_of(file: str, split: str) -> str | None:
    """Return the split that a data file's name begins with, ``split`` itself or a common one, or None.

    Examples of names: `train.jsonl`, `train-00000-of-00004.parquet`, `train_017.tar`, `metadata-train.parquet`,
    `validation_unique.json`.
    """
    ending = next(ending for ending in READERS if file.lower().endswith(ending))
    names = rf"{re.escape(split)}|(?:{SPLITS})(?:_[a-z][a-z0-9_]*)?"
    found = re.fullmatch(rf"(?:metadata-)?({names})(?:[-_.]\d.*)?", file[: -len(ending)])
    return found.group(1) if found else None
