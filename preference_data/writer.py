"""Writing ranked preferences to parquet files that contain the images.

Several processes may write at once, and a run that was stopped can be continued. The files are read by
``read_preferences(folder)``, and by ``datasets.load_dataset("parquet", data_files=...)``, which decodes the images.
"""

import io
import json
import math
import os
import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from preference_data.hints import nearest

SETTINGS = "writer.json"
_VERSION = 1
_IMAGES = pa.list_(pa.struct([("bytes", pa.binary()), ("path", pa.string())]))
_SCORES = pa.list_(pa.float64())
_ROW_GROUP = 8  # rows that a reader holds in memory at once, with their images
#: Tells `datasets` to decode the images; it recognises the other columns by itself.
_SCHEMA_METADATA = {
    "huggingface": json.dumps({"info": {"features": {"images": {"feature": {"_type": "Image"}, "_type": "List"}}}})
}
_FILE_NAME = re.compile(r"part-(\d{5})-of-(\d{5})-(\d{6})\.parquet")


class RankedWriter:
    """A writer of rows with ``prompt``, ``images``, ``scores``, ``scores_NAME`` for each reward, and further columns.

    Each row has an ``index``; a run that is continued skips those in :attr:`done`. Rows are written in files of
    ``rows_per_file``. A file gets its final name only when it is complete and on the disk, so that a crash loses at
    most the rows of one file and leaves no incomplete one. Use the writer in a ``with`` statement, or :meth:`close` it.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        shard: tuple[int, int] = (0, 1),
        rows_per_file: int = 16,
        rewards: Sequence[str] = (),
        columns: pa.Schema | Mapping[str, pa.DataType] | None = None,
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        """Open a folder for writing; it is made if it does not exist.

        Args:
            shard: (index, count) of this process; each process writes its own files. A run may be continued with
                another count.
            rows_per_file: these rows, with their images, are held in memory until the file is written.
            rewards: names of the rewards whose scores are written besides their sum.
            columns: further columns and their types, for instance ``dataset.features.arrow_schema``.
            settings: what must be the same when the run is continued (model, seed, steps, ...), as JSON values.

        Raises:
            ValueError: a shard out of range, two columns of one name, or a folder that was written with other settings
                (naming the first that differs).
        """
        index, count = shard
        if not 0 <= index < count:
            raise ValueError(f"shard {index} of {count} is out of range: shards are counted from 0")
        if rows_per_file < 1:
            raise ValueError(f"rows_per_file must be at least 1, found {rows_per_file}")
        self.folder = Path(folder).expanduser()
        self.rewards = tuple(rewards)
        self.rows_per_file = rows_per_file
        self._prefix = f"part-{index:05d}-of-{count:05d}-"
        self._shard = shard
        self._extra = _fields(columns)
        self._schema = _schema(self.rewards, self._extra)
        self._rows: list[dict[str, Any]] = []
        self.folder.mkdir(parents=True, exist_ok=True)
        kinds = {field.name: str(field.type) for field in self._schema}
        agree_on_settings(self.folder, {**(settings or {}), "(version)": _VERSION, "(columns)": kinds}, index)
        self._remove_incomplete()
        self._done, self._next_number = self._find_done()

    @property
    def json_columns(self) -> set[str]:
        """Names of the further columns that :func:`json_column` made."""
        return {field.name for field in self._extra if (field.metadata or {}).get(b"holds") == b"json"}

    @property
    def done(self) -> frozenset[int]:
        """The indices of all rows in complete files, whichever process or run wrote them."""
        return frozenset(self._done)

    def check_prompts(self, prompts: Sequence[str]) -> None:
        """Raise ValueError, naming the row, when a row that is written already has another prompt than the data now."""
        for index in sorted(self._done):
            if index < len(prompts) and prompts[index] != self._done[index]:
                raise ValueError(
                    f"{self.folder} was written from other prompts: its row {index} has {self._done[index][:80]!r}, and "
                    f"the data {prompts[index][:80]!r}: use the same data, or another folder"
                )

    def write(
        self,
        index: int,
        prompt: str,
        images: Sequence[Image.Image | bytes],
        scores: Sequence[float | None],
        *,
        rewards: Mapping[str, Sequence[float | None]] | None = None,
        extra: Mapping[str, Any] | None = None,
    ) -> None:
        """Add a row, which is on the disk once its file is full, or after :meth:`flush`.

        Args:
            index: of the row, unique in the folder.
            images: PIL images, written without loss as PNG, or the bytes of encoded images, written unchanged.
            scores: one for each image, higher is better; None if it was not scored.
            rewards: the scores of each of the writer's rewards; one that is left out was not scored.
            extra: values of the further columns; one that is left out is null.

        Raises:
            ValueError: an index that was written before, an empty prompt, different numbers of images and scores, a
                score that is not finite, an unknown reward or column, or a value that does not have its column's type.
        """
        where = f"row {index}"
        if index in self._done or any(row["index"] == index for row in self._rows):
            raise ValueError(f"{where} was written before: skip the rows in `done`")
        if not isinstance(prompt, str) or not prompt.strip():
            raise ValueError(f"{where}: the prompt is empty")
        rewards, extra = dict(rewards or {}), dict(extra or {})
        _check_names("reward", rewards, self.rewards, where)
        _check_names("column", extra, [field.name for field in self._extra], where)
        for field in self._extra:
            _check_type(extra.get(field.name), field, where)
        row: dict[str, Any] = {"index": int(index), "prompt": prompt, "scores": _finite_scores(scores, images, where)}
        for name in self.rewards:
            row[f"scores_{name}"] = _finite_scores(rewards.get(name, [None] * len(images)), images, f"{where}, {name}")
        row["images"] = [
            {"bytes": _encoded(image), "path": f"{index:06d}-{number}.png"} for number, image in enumerate(images)
        ]
        self._rows.append({**{field.name: extra.get(field.name) for field in self._extra}, **row})
        if len(self._rows) >= self.rows_per_file:
            self.flush()

    def flush(self) -> None:
        """Write the rows in memory to a file, completely or not at all."""
        if not self._rows:
            return
        table = pa.Table.from_pylist(self._rows, schema=self._schema)
        target = self.folder / f"{self._prefix}{self._next_number:06d}.parquet"
        partial = target.with_name(f".{target.name}.partial")
        with partial.open("wb") as file:
            # Images never repeat, so that a dictionary of them would be of no use.
            pq.write_table(table, file, row_group_size=_ROW_GROUP, use_dictionary=["prompt"])
            file.flush()
            os.fsync(file.fileno())
        partial.replace(target)
        _sync_folder(self.folder)
        self._done.update((row["index"], row["prompt"]) for row in self._rows)
        self._rows = []
        self._next_number += 1

    def close(self) -> None:
        """Write the rows in memory."""
        self.flush()

    def __enter__(self) -> "RankedWriter":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()  # also after an error: the rows before it are good

    def _cleans_up(self, file_name: re.Match[str]) -> bool:
        """Whether this process cleans up after a file; the first process does so for files of other shard counts."""
        index, count = int(file_name[1]), int(file_name[2])
        return index == self._shard[0] if count == self._shard[1] else self._shard[0] == 0

    def _remove_incomplete(self) -> None:
        """Remove the incomplete files that a crash left."""
        for file in self.folder.glob(".part-*.partial"):
            file_name = _FILE_NAME.fullmatch(file.name[1 : -len(".partial")])
            if file_name and self._cleans_up(file_name):
                file.unlink()

    def _find_done(self) -> tuple[dict[int, str], int]:
        """Return the prompts in complete files by their index, and the number of this process's next file."""
        done: dict[int, str] = {}
        next_number = 0
        for file in sorted(self.folder.glob("part-*.parquet")):
            file_name = _FILE_NAME.fullmatch(file.name)
            if not file_name:
                continue
            if file.name.startswith(self._prefix):
                next_number = max(next_number, int(file_name[3]) + 1)
            try:
                done.update(_prompts(file))
            except (pa.ArrowException, OSError) as error:
                # Not the work of this writer, which names a file last: an incomplete copy, or a disk failure.
                renamed = f"{file.name}.broken"
                if self._cleans_up(file_name):
                    file.replace(file.with_name(renamed))
                warnings.warn(
                    f"{file} is broken ({error}): kept as {renamed}, its rows will be made again", stacklevel=3
                )
        return done, next_number


def agree_on_settings(folder: Path, settings: Mapping[str, Any], process: int) -> None:
    """Write the settings that a folder is written with, or compare with those that it was.

    Raises:
        ValueError: naming the first that differs.
    """
    expected = json.loads(json.dumps(settings, sort_keys=True))
    file = folder / SETTINGS
    if not file.is_file():
        # The first of several processes writes the file, and each reads it, so that all compare with the same.
        partial = file.with_name(f".{SETTINGS}.{os.getpid()}-{process}.partial")
        with partial.open("w", encoding="utf-8") as text:
            json.dump(expected, text, indent=2, sort_keys=True)
            text.flush()
            os.fsync(text.fileno())
        try:
            os.link(partial, file)  # unlike a rename, this does not replace an existing file
        except FileExistsError:
            partial.unlink()
        except OSError:  # a file system without links
            partial.replace(file)
        else:
            partial.unlink()
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} cannot be read: {error}") from error
    for name in sorted(expected.keys() | found.keys()):
        if expected.get(name) != found.get(name):
            raise ValueError(
                f"{folder} was written with {name} = {found.get(name)!r}, and this run has "
                f"{expected.get(name)!r}: use the same value, or another folder"
            )


def _prompts(file: Path) -> dict[int, str]:
    with pq.ParquetFile(file) as parquet:
        table = parquet.read(columns=["index", "prompt"])
    return dict(zip(table["index"].to_pylist(), table["prompt"].to_pylist(), strict=True))


def json_column(name: str) -> pa.Field:
    """Return a further column of texts, each the JSON of a value of any type."""
    return pa.field(name, pa.string(), metadata={"holds": "json"})


def _fields(columns: pa.Schema | Mapping[str, pa.DataType] | None) -> list[pa.Field]:
    if columns is None:
        return []
    if isinstance(columns, pa.Schema):
        return list(columns)
    return [pa.field(name, kind) for name, kind in columns.items()]


def _schema(rewards: Sequence[str], extra: Sequence[pa.Field]) -> pa.Schema:
    standard = [pa.field("index", pa.int64()), pa.field("prompt", pa.string()), pa.field("images", _IMAGES)]
    standard += [pa.field("scores", _SCORES), *(pa.field(f"scores_{name}", _SCORES) for name in rewards)]
    names = [field.name for field in (*standard, *extra)]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"two columns are called {name!r}: leave it out of `columns`, or rename it")
    return pa.schema([*standard, *extra], metadata=_SCHEMA_METADATA)


def _check_names(kind: str, given: Mapping[str, Any], known: Sequence[str], where: str) -> None:
    for name in given:
        if name not in known:
            raise ValueError(f"{where}: unknown {kind} {name!r}.{nearest(name, known)}")


def _finite_scores(scores: Sequence[float | None], images: Sequence[Any], where: str) -> list[float | None]:
    if not images or len(images) != len(scores):
        raise ValueError(f"{where}: {len(images)} images have {len(scores)} scores")
    values = [None if score is None else float(score) for score in scores]
    for value in values:
        if value is not None and not math.isfinite(value):
            raise ValueError(f"{where}: the score {value} is not finite; use None for an image that was not scored")
    return values


def _check_type(value: Any, field: pa.Field, where: str) -> None:
    try:
        pa.array([value], type=field.type)
    except (pa.ArrowException, TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"{where}, column {field.name!r}: {value!r} is not of type {field.type}: {error}") from None


def _encoded(image: Image.Image | bytes) -> bytes:
    if isinstance(image, bytes):
        return image
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


def _sync_folder(folder: Path) -> None:
    """Write the folder's entries to the disk, where the system can do that, so that new names survive a crash."""
    if os.name != "posix":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
