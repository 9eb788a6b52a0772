"""Checkpoints that are complete or not there: writing, finding, removing them.

A checkpoint is written under ``.unfinished`` and gets its name, ``checkpoint-N``, in one step when everything in it is on the
disk; its ``checkpoint.json``, written last, lists the files with their sizes and says what the checkpoint belongs to.
"""

import json
import logging
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from accelerate.utils import gather_object
from safetensors import SafetensorError

import align

logger = logging.getLogger(__name__)

#: Version of what a checkpoint holds; goes up when a library of another version could no longer read it.
FORMAT = 3
MANIFEST = "checkpoint.json"
#: In output_dir: where checkpoints are written before they get their names.
UNFINISHED = ".unfinished"
_NAME = re.compile(r"checkpoint-(\d+)")


class CheckpointError(RuntimeError):
    """A checkpoint could not be written; the last good one is still there."""


# -- finding --------------------------------------------------------------------------------------------------


def list_all(output_dir: str | Path) -> list[Path]:
    """List every checkpoint folder in ``output_dir``, complete or not, the latest update first."""
    folder = Path(output_dir)
    found = [p for p in folder.iterdir() if _NAME.fullmatch(p.name) and p.is_dir()] if folder.is_dir() else []
    return sorted(found, key=lambda p: int(p.name.rpartition("-")[2]), reverse=True)


def fault(folder: Path) -> str | None:
    """Say what is wrong with a checkpoint, or return None when it is complete."""
    file = folder / MANIFEST
    if not file.is_file():
        return f"has no {MANIFEST}: its writing was not finished, or another program wrote it"
    try:
        files = json.loads(file.read_text())["files"].items()
    except (ValueError, KeyError, AttributeError):
        return f"has a {MANIFEST} that cannot be read"
    for name, size in files:
        if not (folder / name).is_file():
            return f"lacks {name}"
        found = (folder / name).stat().st_size
        if found != size:
            return f"is damaged: {name} has {found} bytes and was written with {size}"
    return None


def last_good(output_dir: str | Path) -> Path | None:
    """Return the latest complete checkpoint in ``output_dir``, if there is one."""
    return next((folder for folder in list_all(output_dir) if fault(folder) is None), None)


def find(output_dir: str, wanted: str | bool, log: bool = True) -> Path | None:
    """Return the checkpoint that ``wanted`` names: ``true`` is the last complete one in ``output_dir``, if there is one.

    ``log``: name the broken ones that are passed over.

    Raises:
        FileNotFoundError: a path that does not exist.
        ValueError: a path to a broken one, naming what is broken; ``true`` where every checkpoint is broken.
    """
    if str(wanted).lower() != "true":
        folder = Path(wanted if isinstance(wanted, str) else str(wanted))
        if not folder.is_dir():
            raise FileNotFoundError(f"no checkpoint to resume from: {folder}")
        problem = fault(folder)
        if problem:
            good = last_good(folder.parent)
            instead = f": the last good one beside it is {good}" if good else ", and beside it there is no good one"
            raise ValueError(f"checkpoint {folder} {problem}{instead}")
        return folder
    found = list_all(output_dir)
    good, broken = None, []
    for folder in found:
        problem = fault(folder)
        if problem is None:
            good = folder
            break
        broken.append(f"{folder} {problem}")
    if found and good is None:
        raise ValueError(
            f"no checkpoint in {output_dir} is complete: {'; '.join(broken)}. Start afresh with "
            "--resume_from_checkpoint false --overwrite_output_dir true"
        )
    if broken and log:
        logger.warning("passed over: %s. Going on from %s", "; ".join(broken), good)
    return good


# -- writing -------------------------------------------------------------------------------------------------------


@contextmanager
def written(
    final: Path, run: dict[str, Any], saves: bool, limit: int | None = None, best: str | None = None
) -> Iterator[Path]:
    """Enter a context that gives a folder to write a checkpoint into; entered on every process.

    When it is left, the complete checkpoint is at ``final``, or nothing has changed.

    Args:
        run: what the checkpoint belongs to.
        saves: this process is the one that writes the list of files and removes old checkpoints.
        limit: how many complete checkpoints to keep, this one and ``best`` among them.

    Raises:
        CheckpointError: on every process, when any of them could not write.
    """
    folder = final.parent / UNFINISHED / final.name
    error: Exception | None = None
    if saves:
        try:
            _settle(final.parent)
            folder.mkdir(parents=True)
        except OSError as problem:
            error = problem
    _agree_written(error, final, saves)
    try:
        yield folder
    except (OSError, RuntimeError, SafetensorError) as problem:  # torch and safetensors say RuntimeError and their own
        error = problem
    _agree_written(error, final, saves)
    if saves:
        try:
            _seal(folder, run)
            _put_in_place(folder, final)
        except OSError as problem:
            error = problem
    _agree_written(error, final, saves)
    if saves:
        _rotate(final.parent, limit, {str(final), best})


def _agree_written(error: Exception | None, final: Path, saves: bool) -> None:
    """Wait for all processes; when one has an error, clean up and raise on all of them."""
    message = None
    if error is not None:
        free = shutil.disk_usage(final.parent).free / 2**20
        message = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}; {free:.1f} MiB were free"
    failed = [(index, text) for index, text in enumerate(gather_object([message])) if text]
    if not failed:
        return
    if saves:
        shutil.rmtree(final.parent / UNFINISHED, ignore_errors=True)
    good, (index, text) = last_good(final.parent), failed[0]
    kept = f"the last good one is {good}" if good else "there is none before it"
    raise CheckpointError(
        f"{final} could not be written by process {index} ({text}) and was removed: {kept}"
    ) from error


def _settle(output_dir: Path) -> None:
    """Remove what an earlier process left half written; name what was written completely but not named yet."""
    unfinished = output_dir / UNFINISHED
    for folder in list_all(unfinished):
        if fault(folder) is None and not (output_dir / folder.name).exists():
            folder.rename(output_dir / folder.name)
    if unfinished.exists():
        shutil.rmtree(unfinished)


def _seal(folder: Path, run: dict[str, Any]) -> None:
    """Bring all files to the disk, then write the list of them."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    usual_modes(files)
    for path in files:
        _sync(path)
    sizes = {str(path.relative_to(folder)): path.stat().st_size for path in files}
    content = {"format": FORMAT, "version": align.__version__, "run": run, "files": sizes}
    (folder / MANIFEST).write_text(json.dumps(content, indent=1))
    _sync(folder / MANIFEST)
    _sync(folder)


def usual_modes(files: Iterable[Path]) -> None:
    """Give files the modes that any new file has: safetensors makes them readable for their owner alone."""
    umask = os.umask(0o077)
    os.umask(umask)
    for file in files:
        if file.stat().st_mode & 0o777 != 0o666 & ~umask:
            file.chmod(0o666 & ~umask)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _put_in_place(folder: Path, final: Path) -> None:
    """Give a complete checkpoint its name; if the process is killed in between, :func:`_settle` does."""
    replaced = folder.with_name("replaced")
    if final.exists():
        final.rename(replaced)
    folder.rename(final)
    _sync(final.parent)
    shutil.rmtree(folder.parent)


def _rotate(output_dir: Path, limit: int | None, keep: set[str | None]) -> None:
    """Remove the oldest checkpoints beyond ``limit``, broken ones first, never those in ``keep``."""
    if not limit or limit < 1:
        return
    found = list_all(output_dir)
    others = [p for p in found if str(p) not in keep]
    others.sort(key=lambda p: (fault(p) is None, p.stat().st_mtime_ns))
    for folder in others[: max(0, len(found) - limit)]:
        shutil.rmtree(folder, ignore_errors=True)
