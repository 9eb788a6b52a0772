"""Digests that tell one data set from another, so that a run does not go on with other data without a word.

A digest is of the content: texts and numbers as a whole, and of an image, or a file with images in it, the length and the
bytes at a few places. Where a file lies, and when it was written, does not matter.
"""

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

from preference_data.images import ImageSource, look_at

#: A table in memory or on disk of more bytes has so many of its rows looked at.
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
    """Return a digest of data files that contain their images."""
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as stored:
            look_at(stored, file.stat().st_size, digest)
    return f"{len(files)} files, {digest.hexdigest()[:12]}"


def _told(value: Any) -> bytes:
    if isinstance(value, ImageSource):
        return value.looked_at()
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
    if table.data.nbytes > _LARGE_TABLE and len(table) > _ROWS_LOOKED_AT:
        raw = raw.select([len(table) * place // _ROWS_LOOKED_AT for place in range(_ROWS_LOOKED_AT)])
    for rows in raw.iter(batch_size=1000):
        for row in rows.to_pylist():
            digest.update(json.dumps(row, default=repr, sort_keys=True).encode())
    return f"{len(table)} rows, {digest.hexdigest()[:12]}"
