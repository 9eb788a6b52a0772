"""Reading preferences and captioned images: :func:`read_preferences` and :func:`read_captioned`.

Both are lazy: they look at the first rows, and raise at once what can be known from them (a missing path, column,
format, caption or image). All rows are read when the result is iterated, and no image is decoded unless asked for.
:meth:`Records.check_files` reads all rows before anything else happens, and keeps them for the iterations that follow.
"""

import itertools
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from preference_data.cells import Cells
from preference_data.formats import IMAGE, LAYOUTS, PROMPT, captioned, find_layout, join_one_image_rows
from preference_data.hints import did_you_mean, nearest
from preference_data.image_folders import ImageFolder
from preference_data.images import BadRow
from preference_data.records import ON_BAD_ROW, Convert, Records, with_folder
from preference_data.rows import Row
from preference_data.schemas import CaptionedImage, Preference
from preference_data.sources import Renamed, Source, open_source

_ROWS_TRIED = 20  # when the first rows are bad and may be skipped


class _FirstRows:
    """The first rows of a source, which can be iterated again and again but are read once."""

    def __init__(self, source: Source) -> None:
        self._remaining = iter(source)
        self._seen: list[Row | BadRow] = []

    def __iter__(self) -> Iterator[Row | BadRow]:
        for index in itertools.count():
            if index == len(self._seen):
                row = next(self._remaining, None)
                if row is None:
                    return
                self._seen.append(row)
            yield self._seen[index]


def read_preferences(
    name: Any,
    split: str = "train",
    *,
    format: str | None = None,
    on_bad_row: str = "error",
    streaming: bool = False,
    config_name: str | None = None,
    image_folder: str | Path | None = None,
    verify_images: bool = False,
    columns: Mapping[str, str] | None = None,
) -> Records[Preference]:
    """Read preferences as :class:`Pair`, :class:`Ranked`, :class:`BestWorst` or :class:`ReferenceWorst`.

    Args:
        name: a file (.jsonl, .json, .parquet, .csv, webdataset .tar), a folder of these, an image folder with metadata,
            a hub data set, or a ``datasets.Dataset`` in memory.
        split: the split of a folder or hub data set.
        format: one of ``formats.LAYOUTS``; None finds it from the columns.
        on_bad_row: "error" raises BadRow for the first row that cannot be used, "skip" counts and lists such rows in
            ``.report``.
        streaming, config_name: as in ``datasets.load_dataset``, for a hub data set.
        image_folder: where relative paths start, and where all images lie; None tries the data file's folder, its
            subfolders SPLIT and ``images``, and its parent.
        verify_images: decode every image while iterating, so that broken ones are bad rows too.
        columns: the data's names of columns by the names that are looked for: ``{"chosen": "image_a"}``.

    Raises:
        FileNotFoundError: no such path or split. ValueError: no rows, or columns that fit no format.
        BadRow: with "error", the first row or an image of it cannot be used.
    """
    _check_on_bad_row(on_bad_row)
    taken = [LAYOUTS[format]] if format in LAYOUTS else list(LAYOUTS.values())

    def fits(found: list[str]) -> bool:
        return any(not layout.missing([*found, *(columns or {})]) for layout in taken)

    source = open_source(name, split, config_name=config_name, streaming=streaming, fits=fits)
    source = Renamed(source, columns) if columns else source
    rows = _FirstRows(source)
    first = _first_row(rows, source.name, on_bad_row)
    layout = find_layout(list(first.values), source.name, format)

    def convert(rows: Iterator[Row | BadRow]) -> Iterator[Preference | BadRow | None]:
        for row in join_one_image_rows(rows) if layout.one_image_rows else rows:
            try:
                yield row if isinstance(row, BadRow) else layout.build(Cells(row))
            except BadRow as error:
                yield error

    base = _find_base(rows, convert, _bases(image_folder, first, split), on_bad_row)
    return Records(source, convert, layout.name, on_bad_row, verify_images, base)


def read_captioned(
    name: Any,
    split: str = "train",
    *,
    trigger: str | None = None,
    on_bad_row: str = "error",
    streaming: bool = False,
    config_name: str | None = None,
    image_folder: str | Path | None = None,
    verify_images: bool = False,
    columns: Mapping[str, str] | None = None,
) -> Records[CaptionedImage]:
    """Read captioned images from a folder with metadata, with ``.txt`` beside each image, or from rows of any kind.

    Args:
        trigger: a word that is put before every caption ("TRIGGER, caption") and is the caption where there is none.
            Without it every image needs a caption.
        others: as in :func:`read_preferences`.

    Raises:
        FileNotFoundError: no such path or split. ValueError: no rows, no image column, or an empty trigger.
        BadRow: with "error", an image of the folder has no caption, or the first row cannot be used.
    """
    _check_on_bad_row(on_bad_row)
    if trigger is not None and not trigger.strip():
        raise ValueError("the trigger word is empty")

    def fits(found: list[str]) -> bool:
        needed = (IMAGE,) if trigger else (IMAGE, PROMPT)
        return all(set(names) & {*found, *(columns or {})} for names in needed)

    source = open_source(name, split, config_name=config_name, streaming=streaming, fits=fits)
    folder = source if isinstance(source, ImageFolder) else None
    source = Renamed(source, columns) if columns else source
    rows = _FirstRows(source)
    first = _first_row(rows, source.name, on_bad_row)
    if folder is not None and image_folder is not None:
        folder.root = _existing(image_folder)  # links of the folder may lead there
    has_text_files = folder is not None and not folder.metadata
    if folder is not None and has_text_files and trigger is None and on_bad_row == "error":
        image = folder.first_without_caption()
        if image is not None:
            raise BadRow(
                str(image), f"the image has no caption: write {image.stem}.txt beside it, or set a trigger word"
            )
    _check_columns(list(first.values), source.name, (IMAGE,) if has_text_files or trigger else (IMAGE, PROMPT))

    def convert(rows: Iterator[Row | BadRow]) -> Iterator[CaptionedImage | BadRow | None]:
        for row in rows:
            try:
                yield row if isinstance(row, BadRow) else captioned(row, trigger)
            except BadRow as error:
                yield error

    bases: list[Path | None] = [None] if folder is not None else _bases(image_folder, first, split)
    base = _find_base(rows, convert, bases, on_bad_row)
    return Records(source, convert, "captioned", on_bad_row, verify_images, base)


def _check_on_bad_row(on_bad_row: str) -> None:
    if on_bad_row not in ON_BAD_ROW:
        raise ValueError(f"unknown on_bad_row {on_bad_row!r}.{nearest(on_bad_row, ON_BAD_ROW)}")


def _check_columns(columns: list[str], source: str, required: Iterable[tuple[str, ...]]) -> None:
    """Raise ValueError if ``columns`` has none of the names of a required group."""
    for names in required:
        if not set(names) & set(columns):
            hint = did_you_mean(names[0], columns, "Did you mean to rename")
            raise ValueError(f"{source} has no column {names[0]!r}; it has {columns}.{hint}")


def _first_row(rows: _FirstRows, source: str, on_bad_row: str) -> Row:
    """Return the first row that can be read."""
    error = None
    for row in rows:
        if isinstance(row, Row):
            return row
        if on_bad_row == "error":
            raise row
        error = error or row
    raise error or ValueError(f"{source} holds no rows")


def _bases(image_folder: str | Path | None, first: Row, split: str) -> list[Path | None]:
    """Return the folders where relative paths may start, the likeliest first; None is the data file's own folder."""
    if image_folder is not None:
        return [_existing(image_folder)]
    if first.folder is None:
        return [None]
    return [None, first.folder / split, first.folder / "images", first.folder.parent]


def _existing(image_folder: str | Path) -> Path:
    folder = Path(image_folder).expanduser()
    if not folder.is_dir():
        raise FileNotFoundError(f"image_folder {image_folder} is not a folder")
    return folder


def _find_base(rows: _FirstRows, convert: Convert, bases: list[Path | None], on_bad_row: str) -> Path | None:
    """Return the first of ``bases`` that has the images of the first record.

    Raises:
        BadRow: no base has them, and bad rows are not to be skipped.
    """
    first_error = None
    for base in bases:
        error = _first_error(convert(with_folder(rows, base)), on_bad_row)
        if error is None:
            return base
        first_error = first_error or error
    if on_bad_row == "error" and first_error is not None:
        raise first_error
    return None


def _first_error(items: Iterator[Any], on_bad_row: str) -> BadRow | None:
    """Return what is wrong with the first item, or None.

    Where bad rows are skipped it is None as soon as one of the first items can be used.
    """
    first_error = None
    for number, item in enumerate(items):
        try:
            if isinstance(item, BadRow):
                raise item
            if item is not None:
                item.check()
                return None
        except BadRow as error:
            first_error = first_error or error
        if number >= _ROWS_TRIED or (first_error is not None and on_bad_row == "error"):
            break
    return first_error
