"""Digests that tell one data set from another, so that a run does not go on with other data without a word.

A digest is of the content: texts and numbers as a whole, and of an image, or a file with images in it, the length and the
bytes at a few places. Where a file lies, and when it was written, does not matter.
"""

import hashlib
import json
import tarfile
from collections.abc import Iterable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import pyarrow as pa
import pyarrow.parquet as pq

from preference_data.images import BadRow, ImageSource, look_at

_TEXT_OF_MEMBER, _FIRST_OF_MEMBER = 1 << 20, 4096  # bytes of a tar's members
#: Of a table of more bytes, in memory or on disk, so many rows are looked at, and all texts.
_LARGE_TABLE, _ROWS_LOOKED_AT = 2**28, 256

_known: WeakKeyDictionary[Any, str | None] = WeakKeyDictionary()


def data_digest(data: Any) -> str | None:
    """Return a digest of a data set; None of what can be read only once, or is not stored here.

    ``data``: prompts (``datasets.Dataset``), what a reader of this package returned, or a list of its records.
    """
    if isinstance(data, (list, tuple)):
        return _of_items(data)
    try:
        if data not in _known:
            _known[data] = data.digest() if hasattr(data, "digest") else _of_table(data)
        return _known[data]
    except TypeError:  # it cannot be hashed or referred to weakly: a generator
        return None


def records_digest(records: Iterable[Any]) -> str:
    """Return a digest of records: their texts, their numbers, and a look at each of their images."""
    digest, count = hashlib.sha256(), 0
    for count, record in enumerate(records, 1):  # noqa: B007
        for name in (f.name for f in fields(record) if f.name not in ("where", "origin")):
            digest.update(f"{name} ".encode() + _told(getattr(record, name)))
    return f"{count} records, {digest.hexdigest()[:12]}"


def files_digest(files: Sequence[Path]) -> str:
    """Return a digest of data files that contain their images: of all their texts, and a look at the rest."""
    digest = hashlib.sha256()
    for file in files:
        name = file.name.lower()
        if name.endswith(".tar"):
            _add_tar(file, digest)
        elif name.endswith((".gz", ".tgz")):  # nothing in it can be found without reading it all
            with file.open("rb") as stored:
                digest.update(hashlib.file_digest(stored, "sha256").digest())
        else:
            with file.open("rb") as stored:
                look_at(stored, file.stat().st_size, digest)
            if name.endswith(".parquet"):
                _add_texts(file, digest)
    return f"{len(files)} files, {digest.hexdigest()[:12]}"


def _add_tar(file: Path, digest: Any) -> None:
    """Add the names and sizes of all members, the texts among them, and the first bytes of the others."""
    try:
        with tarfile.open(file, "r:") as archive:
            while (member := archive.next()) is not None:
                archive.members = []  # type: ignore[attr-defined]  # it would keep the headers of all members
                digest.update(f"{member.name} {member.size} ".encode())
                content = archive.extractfile(member) if member.isreg() else None  # of a link it may raise KeyError
                if content is not None:
                    text = member.name.lower().endswith((".txt", ".json", ".caption", ".cls"))
                    digest.update(content.read(_TEXT_OF_MEMBER if text else _FIRST_OF_MEMBER))
    except (tarfile.TarError, OSError) as error:  # what is damaged is told when the rows are read
        digest.update(str(error).encode())


def _add_texts(file: Path, digest: Any) -> None:
    """Add the columns of a parquet file that hold no bytes."""
    try:
        with pq.ParquetFile(file) as parquet:
            names = [field.name for field in parquet.schema_arrow if "binary" not in str(field.type)]
            for batch in parquet.iter_batches(1000, columns=names):
                digest.update(json.dumps(batch.to_pydict(), default=repr, sort_keys=True).encode())
    except (pa.ArrowException, OSError) as error:
        digest.update(str(error).encode())


def _told(value: Any) -> bytes:
    if isinstance(value, ImageSource):
        try:
            return value.looked_at()
        except BadRow as error:  # it is told, or left out, when the data are read
            return str(error).encode()
    if isinstance(value, (list, tuple)):
        return b"".join(_told(item) for item in value)
    return f"{json.dumps(value, default=repr)} ".encode()


def _of_items(items: Sequence[Any]) -> str | None:
    try:
        return records_digest(items)
    except TypeError:  # no records of this package
        return None


def _of_table(table: Any) -> str | None:
    """Digest a ``datasets.Dataset``; None of one that streams."""
    if not hasattr(table, "with_format") or not hasattr(table, "__len__"):
        return None
    digest, raw = hashlib.sha256(), table.with_format("arrow")
    parts = [raw]
    if table.data.nbytes > _LARGE_TABLE and len(table) > _ROWS_LOOKED_AT:
        texts = [field.name for field in table.features.arrow_schema if "binary" not in str(field.type)]
        looked_at = [len(table) * place // _ROWS_LOOKED_AT for place in range(_ROWS_LOOKED_AT)]
        parts = [raw.select_columns(texts), raw.select(looked_at)]
    for rows in (rows for part in parts for rows in part.iter(batch_size=16)):
        for row in rows.to_pylist():
            digest.update(json.dumps(row, default=repr, sort_keys=True).encode())
    return f"{len(table)} rows, {digest.hexdigest()[:12]}"
