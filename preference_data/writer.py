"""Writing ranked preferences: parquet with image bytes, by several processes at once, and on from where a run stopped.

What is written is read back by ``read_preferences(folder)`` and by ``datasets.load_dataset("parquet", data_files=...)``,
which decodes the images.
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

SETTINGS = "writer.json"
_VERSION = 1
_IMAGES = pa.list_(pa.struct([("bytes", pa.binary()), ("path", pa.string())]))
_SCORES = pa.list_(pa.float64())
_GROUP = 8  # rows that a reader takes at once, with their images
#: What makes `datasets` decode the column; it guesses the other columns right.
_METADATA = {
    "huggingface": json.dumps({"info": {"features": {"images": {"feature": {"_type": "Image"}, "_type": "List"}}}})
}
_PART = re.compile(r"part-(\d{5})-of-(\d{5})-(\d{6})\.parquet")


class RankedWriter:
    """Writes rows of ``prompt``, ``images``, ``scores``, one ``scores_NAME`` for each reward, and columns of one's own.

    Each row has an ``index``, by which a run that is started again knows what is there: see :attr:`done`. Rows are
    written in files of ``rows_per_file``; a file gets its name only when it is whole and on the disk, so that a crash
    loses at most the rows of one file and leaves nothing half written. Use it in ``with``, or :meth:`close` it.
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
        """Open the folder, made if it is not there, for writing.

        Args:
            shard: (index, count): which of how many processes this is. Each writes files of its own. A run may go on
                with another count.
            rows_per_file: all of them, images included, are held in memory until the file is written.
            rewards: names of the rewards whose scores are kept beside their sum.
            columns: further columns and their types, for instance ``dataset.features.arrow_schema``.
            settings: whatever must be the same when the run goes on (model, seed, steps, ...), as JSON can hold it.

        Raises:
            ValueError: a shard out of range, a column of a name that is taken, or a folder that was written with other
                settings (naming the first that differs).
        """
        index, count = shard
        if not 0 <= index < count:
            raise ValueError(f"shard {index} of {count} is out of range: they count from 0")
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
        self._check_settings(dict(settings or {}))
        self._clean()
        self._done, self._next = self._find_done()

    @property
    def done(self) -> frozenset[int]:
        """Indices in whole files on the disk, whichever process wrote them and whenever."""
        return frozenset(self._done)

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
        """Add one row; it is on the disk once its file is full, or after :meth:`flush`.

        Args:
            index: of the row, unique in the folder.
            images: PIL images, kept without loss as PNG, or bytes of encoded images, kept as they are.
            scores: one for each image, higher is better; None for one that was not scored.
            rewards: for each of the writer's rewards its scores; one that is left out was not scored.
            extra: the columns of one's own; one that is left out is null.

        Raises:
            ValueError: an index that is there already, an empty prompt, numbers of images and scores that differ, a
                score that is not finite, an unknown reward or column, or a value that is not of its column's type.
        """
        place = f"row {index}"
        if index in self._done or any(row["index"] == index for row in self._rows):
            raise ValueError(f"{place} is written already: skip what is in `done`")
        if not isinstance(prompt, str) or not prompt.strip():
            raise ValueError(f"{place}: the prompt is empty")
        rewards, extra = dict(rewards or {}), dict(extra or {})
        for kind, given, known in (("reward", rewards, self.rewards), ("column", extra, [f.name for f in self._extra])):
            unknown = [name for name in given if name not in known]
            if unknown:
                raise ValueError(f"{place}: unknown {kind} {unknown[0]!r}; the writer has {', '.join(known) or 'none'}")
        for field in self._extra:
            _check_type(extra.get(field.name), field, place)
        row: dict[str, Any] = {"index": int(index), "prompt": prompt, "scores": _checked(scores, images, place)}
        for name in self.rewards:
            row[f"scores_{name}"] = _checked(rewards.get(name, [None] * len(images)), images, f"{place}, {name}")
        row["images"] = [
            {"bytes": _encoded(image), "path": f"{index:06d}-{number}.png"} for number, image in enumerate(images)
        ]
        self._rows.append({**{field.name: extra.get(field.name) for field in self._extra}, **row})
        if len(self._rows) >= self.rows_per_file:
            self.flush()

    def flush(self) -> None:
        """Write the rows that are still in memory to a file of their own, whole or not at all."""
        if not self._rows:
            return
        table = pa.Table.from_pylist(self._rows, schema=self._schema)
        target = self.folder / f"{self._prefix}{self._next:06d}.parquet"
        partial = target.with_name(f".{target.name}.partial")
        with partial.open("wb") as file:
            # No dictionary for the images, which never repeat.
            pq.write_table(table, file, row_group_size=_GROUP, use_dictionary=["prompt"])
            file.flush()
            os.fsync(file.fileno())
        partial.replace(target)
        _sync_folder(self.folder)
        self._done.update(row["index"] for row in self._rows)
        self._rows = []
        self._next += 1

    def close(self) -> None:
        """Write what is left."""
        self.flush()

    def __enter__(self) -> "RankedWriter":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()  # after an error, too: the rows before it are good

    def _check_settings(self, settings: dict[str, Any]) -> None:
        columns = {field.name: str(field.type) for field in self._schema}
        own = json.loads(json.dumps({**settings, "(version)": _VERSION, "(columns)": columns}, sort_keys=True))
        file = self.folder / SETTINGS
        if not file.is_file():
            # Whoever of several processes comes first writes it; each reads it again, so that all compare with one.
            partial = file.with_name(f".{SETTINGS}.{os.getpid()}-{self._shard[0]}.partial")
            with partial.open("w", encoding="utf-8") as text:
                json.dump(own, text, indent=2, sort_keys=True)
                text.flush()
                os.fsync(text.fileno())
            try:
                os.link(partial, file)  # unlike a rename, it leaves a file that is there as it is
            except FileExistsError:
                partial.unlink()
            except OSError:  # a file system without links
                partial.replace(file)
            else:
                partial.unlink()
        try:
            there = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{file} cannot be read: {error}") from error
        for name in sorted(own.keys() | there.keys()):
            if own.get(name) != there.get(name):
                raise ValueError(
                    f"{self.folder} was written with {name} = {there.get(name)!r}, and this run has {own.get(name)!r}: "
                    "give it the same, or another folder"
                )

    def _mine(self, part: re.Match[str]) -> bool:
        """Whether a file is this process's to tidy up; the first one takes care of those of other shard counts."""
        index, count = int(part[1]), int(part[2])
        return index == self._shard[0] if count == self._shard[1] else self._shard[0] == 0

    def _clean(self) -> None:
        """Remove what a crash left half written."""
        for file in self.folder.glob(".part-*.partial"):
            part = _PART.fullmatch(file.name[1 : -len(".partial")])
            if part and self._mine(part):
                file.unlink()

    def _find_done(self) -> tuple[set[int], int]:
        done: set[int] = set()
        number = 0
        for file in sorted(self.folder.glob("part-*.parquet")):
            part = _PART.fullmatch(file.name)
            if not part:
                continue
            if file.name.startswith(self._prefix):
                number = max(number, int(part[3]) + 1)
            try:
                done.update(_indices(file))
            except (pa.ArrowException, OSError) as error:
                # Not by this writer, which gives a file its name last: a copy that was cut short, or a lost disk.
                aside = f"{file.name}.broken"
                if self._mine(part):
                    file.replace(file.with_name(aside))
                warnings.warn(f"{file} is broken ({error}): kept as {aside}, its rows will be made again", stacklevel=3)
        return done, number


def _indices(file: Path) -> list[int]:
    with pq.ParquetFile(file) as parquet:
        return parquet.read(columns=["index"])["index"].to_pylist()


def _fields(columns: pa.Schema | Mapping[str, pa.DataType] | None) -> list[pa.Field]:
    if columns is None:
        return []
    if isinstance(columns, pa.Schema):
        return list(columns)
    return [pa.field(name, kind) for name, kind in columns.items()]


def _schema(rewards: Sequence[str], extra: Sequence[pa.Field]) -> pa.Schema:
    own = [pa.field("index", pa.int64()), pa.field("prompt", pa.string()), pa.field("images", _IMAGES)]
    own += [pa.field("scores", _SCORES), *(pa.field(f"scores_{name}", _SCORES) for name in rewards)]
    names = [field.name for field in (*own, *extra)]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"two columns are both called {name!r}: leave it out of `columns`, or rename it")
    return pa.schema([*own, *extra], metadata=_METADATA)


def _checked(scores: Sequence[float | None], images: Sequence[Any], place: str) -> list[float | None]:
    if not images or len(images) != len(scores):
        raise ValueError(f"{place}: {len(images)} images have {len(scores)} scores")
    values = [None if score is None else float(score) for score in scores]
    for value in values:
        if value is not None and not math.isfinite(value):
            raise ValueError(f"{place}: the score {value} is not finite; None is for what could not be scored")
    return values


def _check_type(value: Any, field: pa.Field, place: str) -> None:
    try:
        pa.array([value], type=field.type)
    except (pa.ArrowException, TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"{place}, column {field.name!r}: {value!r} is no {field.type}: {error}") from None


def _encoded(image: Image.Image | bytes) -> bytes:
    if isinstance(image, bytes):
        return image
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


def _sync_folder(folder: Path) -> None:
    """Have the new name itself on the disk, where the system can do that for folders."""
    if os.name != "posix":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
