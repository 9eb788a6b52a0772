"""Folders of images, with captions in metadata files or beside each image."""

import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from preference_data.images import BadRow
from preference_data.places import lies_in
from preference_data.rows import IMAGE_ENDINGS, TEXT_ENDINGS, UNREAD_ENDINGS, Row, ending_of, read_rows

#: Names of the folders and files of a split.
SPLITS = r"train|training|test|testing|validation|valid|val|dev|eval|evaluation|held_out"
#: Endings of the files with an image's caption, the first of which is taken.
_CAPTION_ENDINGS = (".txt", ".caption", ".TXT", ".Txt", ".CAPTION", ".Caption")
METADATA_FILES = ("metadata.jsonl", "metadata.csv", "metadata.parquet")


class ImageFolder:
    """Images in a folder and its subfolders, with metadata files, a ``.txt`` beside each image, or no captions.

    The rows of the metadata, which any subfolder may have, come first, then the images that they do not list. If some rows
    of the metadata do not have one ``file_name`` each, only the metadata is given. ``other_files``: data files beside the
    images that are not taken for data. ``given``: the folder that was named, of which this one is the split's; of its
    metadata those rows are taken that name an image in the split's and no other metadata lists.
    """

    def __init__(self, folder: Path, other_files: Sequence[Path] = (), given: Path | None = None) -> None:
        self.name = str(folder)
        self.folder = self.root = folder
        self.given = folder if given is None else given
        self.other_files = list(other_files)
        folders = [*folders_below(folder), *([self.given] if self.given != folder else [])]
        self.metadata = [found for below in folders if (found := metadata_in(below)) is not None]
        self.by_path = all(ending_of(file) in TEXT_ENDINGS for file in self.metadata)

    def __iter__(self) -> Iterator[Row | BadRow]:
        listed: set[str] = set()
        has_file_names = True
        for file in self.metadata:
            of_all_splits = file.parent == self.given != self.folder
            if not lies_in(file, self.given if of_all_splits else self.root):
                yield BadRow(str(file), f"it is a link to a file outside of the folder {self.root}")
                continue
            for row in read_rows(file):
                if isinstance(row, BadRow):
                    yield row
                    continue
                name = row.values.get("file_name")
                if of_all_splits and not self._is_of_this_split(row.values, listed):
                    continue
                has_file_names = has_file_names and isinstance(name, str)
                row = replace(
                    row, values=rename_file_name_columns(row.values), within=self.root, caption_from=file.name
                )
                if isinstance(name, str):
                    listed.add(os.path.realpath(file.parent / name))
                    row = self._with_caption(row, file.parent / name)
                yield row
        for image in self.images() if has_file_names else ():
            if os.path.realpath(image) not in listed:
                yield self._row(image)

    def _is_of_this_split(self, values: dict[str, Any], listed: set[str]) -> bool:
        """Whether a row of the metadata of all splits names an image in this folder that is not ``listed`` already."""
        named = [value for column, value in values.items() if column.endswith(("file_name", "file_names"))]
        names = [name for value in named for name in (value if isinstance(value, list) else [value])]
        files = [os.path.abspath(self.given / name) for name in names if isinstance(name, str)]
        inside = (file for file in files if Path(file).is_relative_to(os.path.abspath(self.folder)))
        return any(os.path.realpath(file) not in listed for file in inside)

    def images(self) -> Iterator[Path]:
        """Yield every image file, sorted by name; hidden files and folders are left out."""
        return (file for file in files_below(self.folder) if file.name.lower().endswith(IMAGE_ENDINGS))

    def _row(self, image: Path) -> Row | BadRow:
        return self._with_caption(Row(str(image), {"image": image.name}, image.parent, self.root), image)

    def _with_caption(self, row: Row, image: Path) -> Row | BadRow:
        """Return a row with the caption that stands beside its image, unless it has one."""
        if any(row.values.get(name) is not None for name in ("prompt", "caption", "text")):
            return row
        caption = caption_beside(image)
        if caption is None:
            return row
        if not lies_in(caption, self.root):
            return BadRow(str(caption), f"the caption is a link to a file outside of the folder {self.root}")
        try:
            text = caption.read_text(encoding="utf-8-sig").strip()
        except (OSError, UnicodeDecodeError) as error:
            return BadRow(str(caption), f"the caption cannot be read: {error}")
        return replace(row, values=row.values | {"prompt": text}, caption_from=caption.suffix)

    def left_out(self, used: set[Path]) -> list[tuple[str, str]]:
        """List (reason, file) of what lies in the folder and is none of the data; ``used``: files of images that are."""
        listed = [("its rows are no images with captions", str(file)) for file in self.other_files]
        for below in folders_below(self.folder):
            unread = [
                below / name
                for name in METADATA_FILES
                if (below / name).is_file() and below / name not in self.metadata
            ]
            listed += [("another metadata file of the folder is read", str(file)) for file in unread]
            listed += [("a .json beside an image is not read", str(file)) for file in sidecars(below)]
        if self.given != self.folder:
            elsewhere = [file for file in files_below(self.given) if not _in_a_split(file, self.given)]
            listed += not_used(elsewhere, used, f"it is not in the folder {self.folder.name}")
        for below in folders_below(self.folder):
            listed += [
                ("a link to a folder", str(item))
                for item in sorted(below.iterdir())
                if item.is_symlink() and item.is_dir()
            ]
        return listed + not_used(files_below(self.folder), used)

    def first_without_caption(self) -> Path | None:
        """Return the first image that has no ``.txt`` beside it, or None. Opens no file."""
        return next((image for image in self.images() if caption_beside(image) is None), None)


def folders_below(folder: Path) -> Iterator[Path]:
    """Yield a folder and its subfolders, sorted; neither hidden ones nor links."""
    for below, subfolders, _ in os.walk(folder):
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        yield Path(below)


def files_below(folder: Path) -> Iterator[Path]:
    """Yield the files of a folder and its subfolders that are not hidden, sorted."""
    for below in folders_below(folder):
        yield from sorted(file for file in below.iterdir() if file.is_file() and not file.name.startswith("."))


def caption_beside(image: Path) -> Path | None:
    """Return the file with an image's caption, ``.txt`` or ``.caption`` in any case, if there is one."""
    candidates = (image.with_suffix(ending) for ending in _CAPTION_ENDINGS)
    return next((file for file in candidates if file.is_file()), None)


def sidecars(folder: Path) -> list[Path]:
    """Return the ``.json`` files in a folder that have the name of an image beside them, sorted."""
    names = sorted(file.name for file in folder.iterdir())
    images = {name.rpartition(".")[0] for name in names if name.lower().endswith(IMAGE_ENDINGS)}
    files = [folder / name for name in names if name.endswith(".json") and not name.startswith(".")]
    return [file for file in files if file.name.partition(".")[0] in images or file.stem in images]


def is_image(file: Path) -> bool:
    """Whether a file has an image's ending and is not hidden."""
    return file.is_file() and file.name.lower().endswith(IMAGE_ENDINGS) and not file.name.startswith(".")


def has_images(folders: Iterable[Path]) -> bool:
    """Whether one of some folders has an image, in it or below."""
    return any(next(ImageFolder(folder).images(), None) is not None for folder in folders)


def is_split_up(folder: Path) -> bool:
    """Whether the images of a folder lie in subfolders with the names of splits, of which a single one has them all."""
    if not folder.is_dir():
        return False
    subfolders = [item for item in folder.iterdir() if item.is_dir() and not item.name.startswith(".")]
    splits = [item for item in subfolders if re.fullmatch(SPLITS, item.name) and has_images([item])]
    if len(splits) != 1:
        return bool(splits)
    return not has_images(item for item in subfolders if item not in splits) and not any(
        map(is_image, folder.iterdir())
    )


def _in_a_split(file: Path, folder: Path) -> bool:
    parts = file.relative_to(folder).parts
    return re.fullmatch(SPLITS, parts[1] if parts[0] == "data" and len(parts) > 2 else parts[0]) is not None


def not_used(files: Iterable[Path], used: set[Path], reason: str = "no row names it") -> list[tuple[str, str]]:
    """List (reason, file) of the pictures among some files that are not used."""
    names = {os.path.realpath(file) for file in used}
    found = []
    for file in files:
        ending = file.suffix.lower()
        if ending in UNREAD_ENDINGS:
            found.append((f"{ending} is not read", str(file)))
        elif ending in IMAGE_ENDINGS and os.path.realpath(file) not in names:
            found.append((reason, str(file)))
    return found


def metadata_in(folder: Path) -> Path | None:
    """Return a folder's metadata file, if it has one."""
    return next((folder / name for name in METADATA_FILES if (folder / name).is_file()), None)


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
