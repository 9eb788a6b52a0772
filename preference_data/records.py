"""Records read from a source, as often as one likes, and the counts of the last pass."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Generic, TypeVar

from tqdm import tqdm

from preference_data.digests import data_digest, files_digest, records_digest
from preference_data.image_folders import ImageFolder
from preference_data.images import BadRow
from preference_data.places import lies_in
from preference_data.rows import Row
from preference_data.schemas import CaptionedImage, Pair, Preference
from preference_data.sources import Files, Renamed, Source

#: What to do with a row that cannot be used.
ON_BAD_ROW = ("error", "skip")
_MESSAGES_KEPT = 1000
_MESSAGES_SHOWN = 20  # in the summary

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
        """Count and list a bad row."""
        self.bad += 1
        if len(self.skipped) < _MESSAGES_KEPT:
            self.skipped.append(str(error))

    def take_back(self, record: CaptionedImage | Preference, error: BadRow) -> None:
        """Count a record that was yielded as a bad row: an image of it turned out to be broken."""
        self.records -= 1
        self.ties -= isinstance(record, Pair) and record.is_tie
        self.skip(error)

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

        for item in self._convert(with_folder(rows(), self._base)):
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
        source = self.source.source if isinstance(self.source, Renamed) else self.source
        if source.by_path or isinstance(source, ImageFolder) or self._names_files():
            return records_digest(self)
        return files_digest(source.files) if isinstance(source, Files) else data_digest(source)

    def _names_files(self) -> bool:
        """Whether the first record names files for its images, as the rows of a parquet file may."""
        report = self.report
        try:
            return any(image.path is not None for record in islice(self._read(), 1) for image in record.sources())
        except BadRow:  # it is told when the data are read
            return False
        finally:
            self.report = report


def with_folder(rows: Iterable[Row | BadRow], folder: Path | None) -> Iterator[Row | BadRow]:
    """Yield the rows with another folder for their relative paths, in which these may lie too; None leaves theirs."""
    for row in rows:
        if folder is None or isinstance(row, BadRow):
            yield row
        else:
            within = row.within if row.within is not None and lies_in(folder, row.within) else folder
            yield replace(row, folder=folder, within=within)
