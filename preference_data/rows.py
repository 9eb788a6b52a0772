"""Rows out of files, one at a time: JSON lines, JSON, CSV, parquet, webdataset tars.

A reader yields a :class:`Row` for what it could read and a :class:`BadRow` (yielded, not raised) for what it could not,
so that whoever asked may go on behind it.
"""

import csv
import json
import lzma
import re
import tarfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from preference_data.images import BadRow

#: Endings of files that hold an image.
IMAGE_ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
#: Endings of files of text, which hold the paths of images and not their bytes.
TEXT = (".jsonl", ".json", ".csv")
_PARQUET_ROWS = 16  # in memory at once
_CHUNK = 1 << 20
_BETWEEN = re.compile(r"[\s,\[\]\ufeff]*")  # between the objects of a JSON list
_LONGEST_OBJECT = 1 << 26  # a JSON file that is no list of rows must not end up in memory as a whole


@dataclass(frozen=True)
class Row:
    """One row: where it stands ("file.parquet, row 3", from 0), its columns, and the folder its paths start from."""

    where: str
    values: dict[str, Any]
    folder: Path | None


def read_rows(file: Path) -> Iterator[Row | BadRow]:
    """The rows of a file of one of :data:`READERS`, as they are asked for. Raises OSError if it cannot be opened."""
    ending = ending_of(file)
    assert ending is not None, file
    return READERS[ending](file)


def ending_of(file: Path) -> str | None:
    """Which of :data:`READERS` reads this file: the ending, or None."""
    return next((ending for ending in READERS if file.name.lower().endswith(ending)), None)


def _json_lines(file: Path) -> Iterator[Row | BadRow]:
    with file.open("rb") as lines:
        for number, line in enumerate(lines):
            where = f"{file}, row {number}"
            if not line.strip():
                continue
            try:
                values = json.loads(line.decode("utf-8-sig"))
            except ValueError as error:  # a JSONDecodeError or UnicodeDecodeError is one
                yield BadRow(where, f"no JSON: {error}")
                continue
            if isinstance(values, dict):
                yield Row(where, values, file.parent)
            else:
                yield BadRow(where, f"expected an object with columns, found {type(values).__name__}")


def _json(file: Path) -> Iterator[Row | BadRow]:
    """A list of objects, or objects one after another, without holding more than a few of them."""
    decoder, buffer, position, row = json.JSONDecoder(), "", 0, 0
    opened, between = False, ""  # whether it is a list; what stood between the last object and here
    with file.open(encoding="utf-8") as text:
        while True:
            start = _BETWEEN.match(buffer, position).end()  # type: ignore[union-attr]  # it matches nothing as well
            between += buffer[position:start]
            try:
                values, position = decoder.raw_decode(buffer, start)
            except json.JSONDecodeError as error:  # mostly because the rest of the object is not read yet
                buffer, position = buffer[start:], 0
                try:
                    more = text.read(max(_CHUNK, len(buffer))) if len(buffer) <= _LONGEST_OBJECT else ""
                except UnicodeDecodeError as undecodable:
                    yield BadRow(f"{file}, row {row}", f"no UTF-8: {undecodable}")
                    return
                if more:
                    buffer += more
                    continue
                if buffer or (opened and "]" not in between):
                    yield BadRow(f"{file}, row {row}", f"cut short or broken here: {error.msg}")
                return
            opened, between = opened or "[" in between, ""
            if not isinstance(values, dict):
                yield BadRow(f"{file}, row {row}", f"expected an object with columns, found {type(values).__name__}")
                return  # whatever this is, it is no list of rows
            yield Row(f"{file}, row {row}", values, file.parent)
            row += 1


def _csv(file: Path) -> Iterator[Row | BadRow]:
    row = 0
    try:
        with file.open(encoding="utf-8-sig", newline="") as text:
            for values in csv.DictReader(text, strict=True):
                where = f"{file}, row {row}"
                row += 1
                if None in values:
                    yield BadRow(where, "more cells than columns")
                else:  # an empty cell is a missing one
                    yield Row(where, {name: cell or None for name, cell in values.items()}, file.parent)
    except (csv.Error, UnicodeDecodeError) as error:
        yield BadRow(f"{file}, row {row}", f"no CSV from here on: {error}")


def _parquet(file: Path) -> Iterator[Row | BadRow]:
    """Row group by row group, which is what is in memory at once; rows become Python objects a few at a time."""
    try:
        # What Arrow holds is about one row group, with these settings without a second copy of it; it cannot do less.
        parquet = pq.ParquetFile(file, pre_buffer=False, buffer_size=_CHUNK)
    except (pa.ArrowException, OSError) as error:
        if isinstance(error, FileNotFoundError):
            raise
        yield BadRow(str(file), f"no row can be read, the file is cut short or no parquet: {error}")
        return
    with parquet:
        first = 0
        for group in range(parquet.num_row_groups):
            row = first
            try:
                for batch in parquet.iter_batches(_PARQUET_ROWS, row_groups=[group], use_threads=False):
                    for values in batch.to_pylist():
                        yield Row(f"{file}, row {row}", values, file.parent)
                        row += 1
            except (pa.ArrowException, OSError) as error:
                yield BadRow(f"{file}, row {row}", f"the rest of row group {group} cannot be read: {error}")
            first += parquet.metadata.row_group(group).num_rows


def _tar(file: Path) -> Iterator[Row | BadRow]:
    """Samples of a webdataset tar: consecutive members of one key, which is the name up to its first dot."""
    key, parts, count = None, dict[str, bytes](), 0
    last = None
    try:
        with tarfile.open(file, "r|*") as archive:
            while (member := archive.next()) is not None:
                archive.members = []  # type: ignore[attr-defined]  # it would keep every header
                content = archive.extractfile(member)
                folder, _, base = member.name.rpartition("/")
                stem, dot, ending = base.partition(".")
                if content is None or not stem or not dot:
                    continue  # a folder, a hidden file, a README
                if (folder, stem) != key:
                    if key is not None:
                        yield sample_row(f"{file}, sample {'/'.join(filter(None, key))!r}", parts, file.parent)
                        last, count = key, count + 1
                    key, parts = (folder, stem), {}
                parts[ending] = content.read()
            if _cut_short(file, archive.offset):
                raise tarfile.ReadError("no end of archive where it should be")
    except (tarfile.TarError, OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        if isinstance(error, FileNotFoundError):
            raise
        good = f"behind sample {'/'.join(filter(None, last))!r}, number {count}" if last else "before the first sample"
        yield BadRow(str(file), f"cut short or damaged {good}: {error}")
        return
    if key is not None:
        yield sample_row(f"{file}, sample {'/'.join(filter(None, key))!r}", parts, file.parent)


def _cut_short(file: Path, end: int) -> bool:
    """Whether a plain tar lacks the empty block at its end: `tarfile` takes a missing or broken header for the end."""
    with file.open("rb") as content:
        content.seek(257)
        if content.read(5) != b"ustar":
            return False  # compressed, which has checks of its own
        content.seek(end)
        return content.read(512) != bytes(512)


def sample_row(where: str, parts: dict[str, Any], folder: Path | None) -> Row | BadRow:
    """A webdataset sample as a row.

    ``json`` gives columns; ``txt`` or ``caption`` the prompt, where the json has none; ``jpg`` (or another image) the
    column ``image``; ``chosen.png`` the column ``chosen``; ``0.jpg``, ``1.jpg``, ... both ``images`` in this order and
    ``jpg_0``, ``jpg_1``, ...
    """
    values: dict[str, Any] = {}
    numbered: dict[int, Any] = {}
    for ending, content in parts.items():
        name, _, kind = ending.rpartition(".")
        if f".{kind.lower()}" not in IMAGE_ENDINGS:
            continue
        if name.isdigit():
            numbered[int(name)] = content
        else:
            values[name or "image"] = content
    if numbered:
        values["images"] = [numbered[number] for number in sorted(numbered)]
        values |= {f"jpg_{number}": content for number, content in numbered.items()}
    try:
        for ending in ("txt", "caption"):
            if parts.get(ending) is not None:
                text = parts[ending]
                values["prompt"] = text.decode("utf-8-sig").strip() if isinstance(text, bytes) else text
        if parts.get("json") is not None:
            columns = parts["json"]
            columns = json.loads(columns) if isinstance(columns, (bytes, str)) else columns
            if not isinstance(columns, dict):
                return BadRow(where, f"its json holds {type(columns).__name__}, not an object with columns")
            values |= columns
    except ValueError as error:  # a JSONDecodeError or UnicodeDecodeError is one
        return BadRow(where, f"its text or json cannot be read: {error}")
    return Row(where, values, folder)


#: File endings and their readers, in the order in which a folder is searched for them.
READERS: dict[str, Callable[[Path], Iterator[Row | BadRow]]] = {
    ".parquet": _parquet,
    ".tar": _tar,
    ".tar.gz": _tar,
    ".tgz": _tar,
    ".jsonl": _json_lines,
    ".json": _json,
    ".csv": _csv,
}
