"""Reading files row by row: JSON lines, JSON, CSV, parquet, webdataset tars.

A reader yields a :class:`Row` for what it could read. For what it could not read it yields, and does not raise, a
:class:`BadRow`, so that the caller may continue with the next row.
"""

import csv
import json
import lzma
import re
import tarfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import pyarrow as pa
import pyarrow.parquet as pq

from preference_data.images import BadRow

#: Endings of image files.
IMAGE_ENDINGS = (".png", ".jpg", ".jpeg", ".jfif", ".webp", ".avif", ".bmp", ".gif", ".tif", ".tiff", ".jp2", ".j2k",
                 ".ppm", ".pgm", ".pnm", ".tga")  # fmt: skip
#: Endings of pictures that are not read, which is told.
UNREAD_ENDINGS = (".heic", ".heif", ".jxl", ".psd", ".svg", ".eps", ".pdf", ".ico", ".exr", ".hdr", ".dng", ".cr2", ".cr3",
                  ".nef", ".arw", ".mp4", ".webm", ".mov")  # fmt: skip
#: Endings of text files, which hold paths of images and not their bytes.
TEXT_ENDINGS = (".jsonl", ".json", ".csv")
_NOT_JSON = (ValueError, RecursionError)  # a JSONDecodeError or UnicodeDecodeError is a ValueError
_PARQUET_ROWS = 16  # converted to Python objects at once
_CHUNK = 1 << 20
_BETWEEN = re.compile(r"[\s,\[\]\ufeff]*")  # between the objects of a JSON list
csv.field_size_limit(1 << 26)  # a cell may be a data: URL
_LONGEST_OBJECT = 1 << 26  # characters; limits the memory that a file of anything else than rows takes
_LARGEST_SAMPLE = 1 << 28  # bytes of a tar's members of one key; nothing that a few bytes unpack to is larger
#: A row group of more bytes that is so many times smaller on the disk holds no images, and would fill the memory.
_LARGE_GROUP, _TIMES_SMALLER = 1 << 28, 100


@dataclass(frozen=True)
class Row:
    """A row of a file.

    where: its place for messages, "file.parquet, row 3", counted from 0. values: its columns. folder: where its
    relative paths start; None for the working folder. within: the folder that they must stay in; None for any.
    caption_from: where its prompt stands, if not in a column. named_in_file: names in the file of columns that go under
    others here.
    """

    where: str
    values: dict[str, Any]
    folder: Path | None
    within: Path | None = None
    caption_from: str = ""
    named_in_file: Mapping[str, str] = field(default_factory=dict)


def read_rows(file: Path) -> Iterator[Row | BadRow]:
    """Yield the rows of a file with one of the endings in :data:`READERS`; raise OSError if it cannot be opened."""
    ending = ending_of(file)
    assert ending is not None, file
    return READERS[ending](file)


def ending_of(file: Path) -> str | None:
    """Return the file's ending if it is one of :data:`READERS`, else None."""
    return next((ending for ending in READERS if file.name.lower().endswith(ending)), None)


def _json_lines(file: Path) -> Iterator[Row | BadRow]:
    with file.open("rb") as lines:
        for number, line in enumerate(iter(lambda: lines.readline(_LONGEST_OBJECT), b"")):
            where = f"{file}, row {number}"
            if not line.strip():
                continue
            if len(line) == _LONGEST_OBJECT:
                yield BadRow(where, f"a line of more than {_LONGEST_OBJECT} bytes is no row, nor is what follows read")
                return
            try:
                values = json.loads(line.decode("utf-8-sig"))
            except _NOT_JSON as error:
                yield BadRow(where, f"not JSON: {error}")
                continue
            if isinstance(values, dict):
                yield Row(where, values, file.parent)
            else:
                yield BadRow(where, f"expected an object with columns, found {type(values).__name__}")


def _json(file: Path) -> Iterator[Row | BadRow]:
    """Yield the rows of a list of objects, or of objects one after another, holding only a few of them in memory."""
    decoder, buffer, position, row = json.JSONDecoder(), "", 0, 0
    is_list, between = False, ""  # between: the text between the last object and the current position
    with file.open(encoding="utf-8") as text:
        while True:
            start = _BETWEEN.match(buffer, position).end()  # type: ignore[union-attr]  # it matches nothing as well
            between += buffer[position:start]
            try:
                values, position = decoder.raw_decode(buffer, start)
            except RecursionError as error:
                yield BadRow(f"{file}, row {row}", f"not JSON: {error}")
                return
            except json.JSONDecodeError as error:  # mostly because the rest of the object is not read yet
                buffer, position = buffer[start:], 0
                try:
                    more = text.read(max(_CHUNK, len(buffer))) if len(buffer) <= _LONGEST_OBJECT else ""
                except UnicodeDecodeError as undecodable:
                    yield BadRow(f"{file}, row {row}", f"not UTF-8: {undecodable}")
                    return
                if more:
                    buffer += more
                    continue
                if buffer or (is_list and "]" not in between):
                    yield BadRow(f"{file}, row {row}", f"cut short or broken here: {error.msg}")
                return
            is_list, between = is_list or "[" in between, ""
            if not isinstance(values, dict):
                yield BadRow(f"{file}, row {row}", f"expected an object with columns, found {type(values).__name__}")
                return  # whatever this is, it is not a list of rows
            yield Row(f"{file}, row {row}", values, file.parent)
            row += 1


def _csv(file: Path) -> Iterator[Row | BadRow]:
    row = 0
    try:
        with file.open(encoding="utf-8-sig", newline="") as text:
            reader = csv.DictReader(text, strict=True)
            problem = _problem_of_header(reader.fieldnames or ())
            if problem:
                yield BadRow(f"{file}, the first line", problem)
                return
            for values in reader:
                where = f"{file}, row {row}"
                row += 1
                if None in values:
                    yield BadRow(where, "more cells than columns")
                else:  # an empty cell is a missing value
                    yield Row(where, {name: cell or None for name, cell in values.items()}, file.parent)
    except (csv.Error, UnicodeDecodeError) as error:
        yield BadRow(f"{file}, row {row}", f"not valid CSV from here on: {error}")


def _problem_of_header(names: Sequence[str]) -> str | None:
    """Return why the rows under these columns cannot be read, or None."""
    twice = next((name for name in names if name and list(names).count(name) > 1), None)
    if twice is not None:
        return f"two columns are called {twice!r}: only the last of them would be read"
    separator = next((s for s in ";\t" if len(names) == 1 and s in names[0]), None)
    return f"its columns are separated by {separator!r}: write commas" if separator else None


def _parquet(file: Path) -> Iterator[Row | BadRow]:
    """Yield the rows of a parquet file, with about one row group in memory at once."""
    try:
        # Arrow holds at least one row group; these settings avoid a second copy of it.
        parquet = pq.ParquetFile(file, pre_buffer=False, buffer_size=_CHUNK)
    except (pa.ArrowException, OSError) as error:
        if isinstance(error, FileNotFoundError):
            raise
        yield BadRow(str(file), f"no row can be read, the file is cut short or not parquet: {error}")
        return
    with parquet:
        first = 0
        for group in range(parquet.num_row_groups):
            row, about = first, parquet.metadata.row_group(group)
            stored = sum(about.column(column).total_compressed_size for column in range(about.num_columns))
            if about.total_byte_size > max(_LARGE_GROUP, _TIMES_SMALLER * stored):
                yield BadRow(
                    f"{file}, row {row}", f"row group {group} unpacks {stored} bytes to {about.total_byte_size}"
                )
                return
            try:
                for batch in parquet.iter_batches(_PARQUET_ROWS, row_groups=[group], use_threads=False):
                    for values in batch.to_pylist():
                        yield Row(f"{file}, row {row}", values, file.parent)
                        row += 1
            except (pa.ArrowException, OSError) as error:
                yield BadRow(f"{file}, row {row}", f"the rest of row group {group} cannot be read: {error}")
            first += parquet.metadata.row_group(group).num_rows


class _Header(tarfile.TarInfo):
    """A member's header, whose absence is an error.

    `tarfile` takes a missing, cut or broken one for the end of the archive, which is an empty block.
    """

    @classmethod
    def fromtarfile(cls, archive: tarfile.TarFile) -> Self:
        """Read the next header of an archive.

        Raises:
            tarfile.ReadError: there is none, nor the empty block.
        """
        try:
            return super().fromtarfile(archive)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]  # the empty block
            raise
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(f"a member or the end of the archive is missing ({error})") from error


def _tar(file: Path) -> Iterator[Row | BadRow]:
    """Yield the samples of a webdataset tar: consecutive members with one key, the name up to its first dot."""
    key, members, count = None, dict[str, bytes](), 0
    last = None  # the key of the last complete sample
    try:
        with tarfile.open(file, "r|*", tarinfo=_Header) as archive:
            while (member := archive.next()) is not None:
                archive.members = []  # type: ignore[attr-defined]  # it would keep the headers of all members
                folder, _, base = member.name.rpartition("/")
                stem, dot, ending = base.partition(".")
                if not stem or not dot or not (member.isreg() or member.islnk() or member.issym()):
                    continue  # a folder, a hidden file, a README
                if not member.isreg():  # what it leads to is not at hand here, and tars of copies have many of them
                    yield BadRow(
                        f"{file}, member {member.name!r}",
                        "it is a link: pack the file itself (tar -h --hard-dereference)",
                    )
                    continue
                if (folder, stem) != key:
                    if key is not None:
                        yield sample_row(f"{file}, sample {_sample_name(key)!r}", members, file.parent)
                        last, count = key, count + 1
                    key, members = (folder, stem), {}
                if sum(map(len, members.values())) + member.size > _LARGEST_SAMPLE:
                    raise tarfile.ReadError(
                        f"{member.name} has {member.size} bytes: a sample has at most {_LARGEST_SAMPLE}"
                    )
                content = archive.extractfile(member)
                assert content is not None
                members[ending] = content.read()
    except (tarfile.TarError, OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        if isinstance(error, FileNotFoundError):
            raise
        place = f"after sample {_sample_name(last)!r}, number {count}" if last else "before the first sample"
        yield BadRow(str(file), f"cut short or damaged {place}: {error}")
        return
    if key is not None:
        yield sample_row(f"{file}, sample {_sample_name(key)!r}", members, file.parent)


def _sample_name(key: tuple[str, str]) -> str:
    """Return a key, the folder and the stem, as a path."""
    return "/".join(filter(None, key))


def sample_row(where: str, members: dict[str, Any], folder: Path | None) -> Row | BadRow:
    """Make a row of a webdataset sample, given as its members by ending.

    | member | column |
    |---|---|
    | ``json`` | each of its keys |
    | ``txt``, ``caption`` | ``prompt``, unless the json has one |
    | ``jpg`` or another image | ``image`` |
    | ``chosen.png`` | ``chosen`` |
    | ``0.jpg``, ``1.jpg``, ... | ``images``, in this order, and ``jpg_0``, ``jpg_1``, ... |
    """
    values: dict[str, Any] = {}
    numbered: dict[int, Any] = {}
    caption_from = ""
    texts = {ending.lower(): content for ending, content in members.items()}
    for ending, content in members.items():
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
            if texts.get(ending) is not None:
                text = texts[ending]
                values["prompt"] = text.decode("utf-8-sig").strip() if isinstance(text, bytes) else text
                caption_from = f".{ending}"
        if texts.get("json") is not None:
            columns = texts["json"]
            columns = json.loads(columns) if isinstance(columns, (bytes, str)) else columns
            if not isinstance(columns, dict):
                return BadRow(where, f"its json holds {type(columns).__name__}, not an object with columns")
            values |= columns
            caption_from = "" if "prompt" in columns else caption_from
    except _NOT_JSON as error:
        return BadRow(where, f"its text or json cannot be read: {error}")
    return Row(where, values, folder, caption_from=caption_from)


#: The reader of each file ending, in the order in which a folder is searched for them.
READERS: dict[str, Callable[[Path], Iterator[Row | BadRow]]] = {
    ".parquet": _parquet,
    ".tar": _tar,
    ".tar.gz": _tar,
    ".tgz": _tar,
    ".jsonl": _json_lines,
    ".json": _json,
    ".csv": _csv,
}
