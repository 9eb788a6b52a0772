"""Reading preferences and captioned images: :func:`read_preferences` and :func:`read_captioned`.

Both are lazy: they look at the first rows, and raise at once what can be known from them (a missing path, column,
format, caption or image). All rows are read when the result is iterated, and no image is decoded unless asked for.
:meth:`Records.check_files` reads all rows before anything else happens, and keeps them for the iterations that follow.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Generic, TypeVar

from tqdm import tqdm

from preference_data.cells import Cells
from preference_data.digests import data_digest, files_digest, records_digest
from preference_data.formats import IMAGE, PROMPT, captioned, find_layout, join_one_image_rows
from preference_data.hints import did_you_mean, nearest
from preference_data.images import BadRow
from preference_data.rows import Row
from preference_data.schemas import CaptionedImage, Pair, Preference
from preference_data.sources import Files, ImageFolder, Source, open_source

#: What to do with a row that cannot be used.
ON_BAD_ROW = ("error", "skip")
_MESSAGES_KEPT = 1000
_MESSAGES_SHOWN = 20  # in the summary
_ROWS_TRIED = 20  # when the first rows are bad and may be skipped

Item = TypeVar("Item", CaptionedImage, Preference)
#: Makes items of rows: a BadRow where that fails, None of a row that nobody judged.
Convert = Callable[[Iterator[Row | BadRow]], Iterator[Item | BadRow | None]]


@dataclass
class Report:
    """Counts of the last pass over the rows of a :class:`Records`, or of the one in progress.

    rows: rows read. records: records yielded (several rows may make one). unlabelled: rows that nobody judged. ties:
    pairs of which neither image is preferred. bad: rows skipped. skipped: their messages, the first 1000.
    """

    source: str
    format: str
    rows: int = 0
    records: int = 0
    unlabelled: int = 0
    ties: int = 0
    bad: int = 0
    skipped: list[str] = field(default_factory=list)

    def skip(self, error: BadRow) -> None:
        """Count and list a bad row; also for callers that find an image broken later."""
        self.bad += 1
        if len(self.skipped) < _MESSAGES_KEPT:
            self.skipped.append(str(error))

    def __str__(self) -> str:
        counts = [f"{self.rows} rows", f"{self.records} records"]
        counts += [f"{count} {name}" for count, name in ((self.unlabelled, "unlabelled"), (self.ties, "ties")) if count]
        lines = [f"{self.source} ({self.format}): {', '.join(counts)}, {self.bad} bad rows skipped"]
        lines += [f"  {message}" for message in self.skipped[:_MESSAGES_SHOWN]]
        if self.bad > _MESSAGES_SHOWN:
            lines.append(f"  and {self.bad - min(_MESSAGES_SHOWN, len(self.skipped))} more")
        return "\n".join(lines)


class Records(Generic[Item]):
    """Objects of :mod:`preference_data.schemas`, which can be iterated any number of times.

    Every iteration reads the rows again, unless :meth:`check_files` has kept the records. ``report`` counts what the
    last pass over the rows found.
    """

    def __init__(
        self,
        source: Source,
        convert: Convert,
        format_name: str,
        on_bad_row: str,
        verify_images: bool,
        base: Path | None,
    ) -> None:
        self.source = source
        self.format = format_name
        self.on_bad_row = on_bad_row
        self.verify_images = verify_images
        self._convert = convert
        self._base = base
        self._checked: list[Item] | None = None
        self.report = Report(source.name, format_name)

    def __iter__(self) -> Iterator[Item]:
        return self._read() if self._checked is None else iter(self._checked)

    def _read(self) -> Iterator[Item]:
        report = self.report = Report(self.source.name, self.format)

        def rows() -> Iterator[Row | BadRow]:
            for row in self.source:
                report.rows += 1
                yield row

        for item in self._convert(_with_folder(rows(), self._base)):
            try:
                if isinstance(item, BadRow):
                    raise item
                if item is None:
                    report.unlabelled += 1
                    continue
                item.check()
                if self.verify_images:
                    for image in item.sources():
                        image.open()
            except BadRow as error:
                if self.on_bad_row == "error":
                    raise
                report.skip(error)
                continue
            report.records += 1
            report.ties += isinstance(item, Pair) and item.is_tie
            yield item

    def check_files(self, quiet: bool = False) -> None:
        """Read all rows, and raise BadRow for the first that cannot be used or names a bad image file.

        Bad is a file that is missing, empty or has no image's header. No more than the headers are read: whether an
        image is cut short is known when it is decoded. The records (not the images) are kept in memory, about 1.3 kB
        each, so that iterating reads no row again. A progress bar is shown if it takes long, unless ``quiet``.

        Nothing is read where bad rows are skipped, nor where it would not be cheap: rows that contain their images
        (parquet, tars) and hub data sets.
        """
        if self.on_bad_row != "error" or not self.source.by_path or self._checked is not None:
            return
        checked = []
        for record in tqdm(self._read(), desc="checking files", unit=" rows", delay=2, leave=False, disable=quiet):
            for image in record.sources():
                image.check_header()
            checked.append(record)
        self._checked = checked

    def digest(self) -> str | None:
        """Return a digest of the data's content, see :mod:`preference_data.digests`."""
        if self.source.by_path or isinstance(self.source, ImageFolder):
            return records_digest(self)
        return files_digest(self.source.files) if isinstance(self.source, Files) else data_digest(self.source)


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
        image_folder: where relative paths start; None tries the data file's folder, its subfolders SPLIT and
            ``images``, and its parent.
        verify_images: decode every image while iterating, so that broken ones are bad rows too.

    Raises:
        FileNotFoundError: no such path or split. ValueError: no rows, or columns that fit no format.
        BadRow: with "error", the first row or an image of it cannot be used.
    """
    _check_on_bad_row(on_bad_row)
    source = open_source(name, split, config_name=config_name, streaming=streaming)
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
) -> Records[CaptionedImage]:
    """Read captioned images from a folder with metadata, with ``.txt`` beside each image, or from rows of any kind.

    Args:
        trigger: a word that is put before every caption ("TRIGGER, caption") and is the caption where there is none.
            Without it every image needs a caption.
        name, split, on_bad_row, streaming, config_name, image_folder, verify_images: as in :func:`read_preferences`.

    Raises:
        FileNotFoundError: no such path or split. ValueError: no rows, no image column, or an empty trigger.
        BadRow: with "error", an image of the folder has no caption, or the first row cannot be used.
    """
    _check_on_bad_row(on_bad_row)
    if trigger is not None and not trigger.strip():
        raise ValueError("the trigger word is empty")
    source = open_source(name, split, config_name=config_name, streaming=streaming)
    rows = _FirstRows(source)
    first = _first_row(rows, source.name, on_bad_row)
    folder = source if isinstance(source, ImageFolder) else None
    if folder is not None and image_folder is not None:
        raise ValueError(f"image_folder is for files with paths in them; {folder.name} contains the images")
    has_text_files = folder is not None and folder.metadata is None
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
        folder = Path(image_folder).expanduser()
        if not folder.is_dir():
            raise FileNotFoundError(f"image_folder {image_folder} is not a folder")
        return [folder]
    if first.folder is None:
        return [None]
    return [None, first.folder / split, first.folder / "images", first.folder.parent]


def _find_base(rows: _FirstRows, convert: Convert, bases: list[Path | None], on_bad_row: str) -> Path | None:
    """Return the first of ``bases`` that has the images of the first record.

    Raises:
        BadRow: no base has them, and bad rows are not to be skipped.
    """
    first_error = None
    for base in bases:
        error = _first_error(convert(_with_folder(rows, base)), on_bad_row)
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


def _with_folder(rows: Iterable[Row | BadRow], folder: Path | None) -> Iterator[Row | BadRow]:
    """Yield the rows with another folder for their relative paths; None leaves theirs."""
    for row in rows:
        yield row if folder is None or isinstance(row, BadRow) else replace(row, folder=folder)
