"""Preferences and captioned images out of what people have: :func:`read_preferences` and :func:`read_captioned`.

Both are lazy: rows are read one at a time, each time the result is iterated, and no image is decoded unless asked for.
What can be told beforehand (a missing path, column, format, caption or first image) is told when they are called;
:meth:`Records.check_files` looks at all rows.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Generic, TypeVar

from tqdm import tqdm

from preference_data.cells import Cells
from preference_data.formats import IMAGE, PROMPT, by_prompt, captioned, find_layout
from preference_data.images import BadRow
from preference_data.rows import Row
from preference_data.schemas import CaptionedImage, Pair, Preference
from preference_data.sources import ImageFolder, Source, open_source

#: What to do with a row that cannot be used.
ON_BAD_ROW = ("error", "skip")
_LISTED = 1000  # messages kept
_SHOWN = 20  # messages in the summary
_PROBED = 20  # rows looked at beforehand, where the first ones are bad and may be skipped

Item = TypeVar("Item", CaptionedImage, Preference)
Convert = Callable[[Iterator[Row | BadRow]], Iterator[Item | BadRow | None]]


@dataclass
class Report:
    """What became of the rows in the last pass over a :class:`Records`, or in the one that is under way.

    rows: read. records: yielded (several rows may make one). unlabelled: rows that nobody judged. ties: pairs among the
    records of which neither image is preferred. bad: rows skipped. skipped: their messages, the first 1000.
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
        """Count and list a bad row. Whoever finds an image broken only later may add it here."""
        self.bad += 1
        if len(self.skipped) < _LISTED:
            self.skipped.append(str(error))

    def __str__(self) -> str:
        counts = [f"{self.rows} rows", f"{self.records} records"]
        counts += [f"{count} {name}" for count, name in ((self.unlabelled, "unlabelled"), (self.ties, "ties")) if count]
        lines = [f"{self.source} ({self.format}): {', '.join(counts)}, {self.bad} bad rows skipped"]
        lines += [f"  {message}" for message in self.skipped[:_SHOWN]]
        if self.bad > _SHOWN:
            lines.append(f"  and {self.bad - min(_SHOWN, len(self.skipped))} more")
        return "\n".join(lines)


class Records(Generic[Item]):
    """Schema objects out of rows; can be iterated again and again. ``report`` tells of the last pass."""

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
        self.report = Report(source.name, format_name)

    def __iter__(self) -> Iterator[Item]:
        report = self.report = Report(self.source.name, self.format)
        for item in self._items(report, self._base):
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
        """Raise BadRow for the first row that cannot be used, or that names a file which is missing, empty or no image.

        One pass over all rows, with a progress bar where it takes long, unless ``quiet``. Of the images' files no more
        than the headers are read: whether one is cut short is known when it is decoded. Where it would not be cheap,
        nothing is checked: rows that hold the images' bytes (parquet, tars) and hub data sets would be read twice.
        Nor is anything where bad rows are skipped.
        """
        if self.on_bad_row != "error" or not self.source.by_path:
            return
        for record in tqdm(self, desc="checking files", unit=" rows", delay=2, leave=False, disable=quiet):
            for image in record.sources():
                image.check_header()

    def _items(self, report: Report, base: Path | None) -> Iterator[Item | BadRow | None]:
        def rows() -> Iterator[Row | BadRow]:
            for row in self.source:
                report.rows += 1
                yield row if base is None or isinstance(row, BadRow) else replace(row, folder=base)

        return self._convert(rows())

    def probe(self, bases: list[Path | None]) -> None:
        """Find the folder that the images' paths start from, and raise beforehand what the first row would raise.

        Raises:
            BadRow: no base has the first record's images, and bad rows are not to be skipped.
        """
        first_error = None
        for base in bases:
            found = self._works(base)
            if found is None:
                self._base = base
                return
            first_error = first_error or found
        if self.on_bad_row == "error" and first_error is not None:
            raise first_error

    def _works(self, base: Path | None) -> BadRow | None:
        """None if a record among the first rows can be used with this base; else what is wrong with the first."""
        first_error = None
        for number, item in enumerate(self._items(Report("", ""), base)):
            try:
                if isinstance(item, BadRow):
                    raise item
                if item is not None:
                    item.check()
                    return first_error if self.on_bad_row == "error" else None
            except BadRow as error:
                first_error = first_error or error
            if number >= _PROBED or (first_error is not None and self.on_bad_row == "error"):
                break
        return first_error


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
    """Preferences, as :class:`Pair`, :class:`Ranked`, :class:`BestWorst` or :class:`ReferenceWorst`.

    Args:
        name: a file (.jsonl, .json, .parquet, .csv, webdataset .tar), a folder of these, an image folder with metadata,
            a hub data set, or a ``datasets.Dataset`` in memory.
        split: which split of a folder or hub data set.
        format: one of ``formats.LAYOUTS``; None to tell it from the columns.
        on_bad_row: "error" raises BadRow at the first row that cannot be used, "skip" counts and lists them in
            ``.report``.
        streaming, config_name: as in ``datasets.load_dataset``, for a hub data set.
        image_folder: where relative paths start; None to look beside the data file, in its folders SPLIT and
            ``images``, and one folder up.
        verify_images: decode every image on the way, so that broken ones are bad rows, too.

    Raises:
        FileNotFoundError: no such path or split. ValueError: no rows, or columns that fit no format.
        BadRow: with "error", the first row or an image of it cannot be used.
    """
    _check_choice(on_bad_row)
    source = open_source(name, split, config_name=config_name, streaming=streaming)
    first = _first_row(source, on_bad_row)
    layout = find_layout(list(first.values), source.name, format)

    def convert(rows: Iterator[Row | BadRow]) -> Iterator[Preference | BadRow | None]:
        for row in by_prompt(rows) if layout.by_prompt else rows:
            try:
                yield row if isinstance(row, BadRow) else layout.build(Cells(row))
            except BadRow as error:
                yield error

    records: Records[Preference] = Records(source, convert, layout.name, on_bad_row, verify_images, None)
    records.probe(_bases(image_folder, first, split))
    return records


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
    """Captioned images: from a folder with metadata, with ``.txt`` beside each image, or anything with those columns.

    Args:
        trigger: a word for all images. It is put before the caption ("TRIGGER, caption"), and stands alone where there
            is none. Without it, every image needs a caption.
        name, split, on_bad_row, streaming, config_name, image_folder, verify_images: as in :func:`read_preferences`.

    Raises:
        FileNotFoundError: no such path or split. ValueError: no rows, no image column, or an empty trigger.
        BadRow: with "error", an image of the folder has no caption, or the first row cannot be used.
    """
    _check_choice(on_bad_row)
    if trigger is not None and not trigger.strip():
        raise ValueError("the trigger word is empty")
    source = open_source(name, split, config_name=config_name, streaming=streaming)
    first = _first_row(source, on_bad_row)
    columns = list(first.values)
    if isinstance(source, ImageFolder) and trigger is None and on_bad_row == "error":
        bare = source.uncaptioned()
        if bare is not None:
            raise BadRow(
                str(bare), f"the image has no caption: write {bare.stem}.txt beside it, or give a trigger word"
            )
    if isinstance(source, ImageFolder) and image_folder is not None:
        raise ValueError(f"image_folder is for files with paths in them; {source.name} holds the images itself")
    beside = isinstance(source, ImageFolder) and source.metadata is None
    needed = (IMAGE,) if beside or trigger is not None else (IMAGE, PROMPT)
    for names in needed:
        if not set(names) & set(columns):
            close = get_close_matches(names[0], columns, n=1, cutoff=0.5)
            hint = f" Did you mean to rename {close[0]!r}?" if close else ""
            raise ValueError(f"{source.name} has no column {names[0]!r}; it has {columns}.{hint}")

    def convert(rows: Iterator[Row | BadRow]) -> Iterator[CaptionedImage | BadRow | None]:
        for row in rows:
            try:
                yield row if isinstance(row, BadRow) else captioned(row, trigger)
            except BadRow as error:
                yield error

    records: Records[CaptionedImage] = Records(source, convert, "captioned", on_bad_row, verify_images, None)
    records.probe([None] if isinstance(source, ImageFolder) else _bases(image_folder, first, split))
    return records


def _check_choice(on_bad_row: str) -> None:
    if on_bad_row not in ON_BAD_ROW:
        close = get_close_matches(on_bad_row, ON_BAD_ROW, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else f" There are: {', '.join(ON_BAD_ROW)}"
        raise ValueError(f"unknown on_bad_row {on_bad_row!r}.{hint}")


def _first_row(source: Source, on_bad_row: str) -> Row:
    error = None
    for row in source:
        if isinstance(row, Row):
            return row
        if on_bad_row == "error":
            raise row
        error = error or row
    raise error or ValueError(f"{source.name} holds no rows")


def _bases(image_folder: str | Path | None, first: Row, split: str) -> list[Path | None]:
    """Folders that relative paths may start from, the likeliest first; None is the data file's own."""
    if image_folder is not None:
        folder = Path(image_folder).expanduser()
        if not folder.is_dir():
            raise FileNotFoundError(f"image_folder {image_folder} is no folder")
        return [folder]
    if first.folder is None:
        return [None]
    return [None, first.folder / split, first.folder / "images", first.folder.parent]
