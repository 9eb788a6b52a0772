"""Checkpoints that are whole or not there, and that know which run they belong to.

One is written under ``.unfinished`` and gets its name, ``checkpoint-N``, in one step when everything in it is on the
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

#: Of what a checkpoint holds; goes up when an older library could no longer read it.
FORMAT = 1
MANIFEST = "checkpoint.json"
#: In output_dir: where checkpoints are written before they get their names.
UNFINISHED = ".unfinished"
_NAME = re.compile(r"checkpoint-(\d+)")


class CheckpointError(RuntimeError):
    """A checkpoint could not be written; the last good one is still there."""


# -- what is there -------------------------------------------------------------------------------------------------


def checkpoints(output_dir: str | Path) -> list[Path]:
    """Every checkpoint folder in ``output_dir``, whole or not, the latest update first."""
    folder = Path(output_dir)
    there = [p for p in folder.iterdir() if _NAME.fullmatch(p.name) and p.is_dir()] if folder.is_dir() else []
    return sorted(there, key=lambda p: int(p.name.rpartition("-")[2]), reverse=True)


def fault(folder: Path) -> str | None:
    """What is wrong with a checkpoint, in words, or None when it is whole."""
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
    """The latest whole checkpoint in ``output_dir``, if any."""
    return next((folder for folder in checkpoints(output_dir) if fault(folder) is None), None)


def find(output_dir: str, wanted: str | bool, say: bool = True) -> Path | None:
    """The checkpoint that ``wanted`` means: ``true`` is the last whole one in ``output_dir``, if there is any at all.

    Broken ones that are passed over are named aloud if ``say``.

    Raises:
        FileNotFoundError: for a path that does not exist.
        ValueError: for a path to a broken one, naming what is broken; for ``true`` when all there are are broken.
    """
    if str(wanted).lower() != "true":
        folder = Path(wanted if isinstance(wanted, str) else str(wanted))
        if not folder.is_dir():
            raise FileNotFoundError(f"no checkpoint to resume from: {folder}")
        wrong = fault(folder)
        if wrong:
            good = last_good(folder.parent)
            instead = f": the last good one beside it is {good}" if good else ", and beside it there is no good one"
            raise ValueError(f"checkpoint {folder} {wrong}{instead}")
        return folder
    there = checkpoints(output_dir)
    good, broken = None, []
    for folder in there:
        wrong = fault(folder)
        if wrong is None:
            good = folder
            break
        broken.append(f"{folder} {wrong}")
    if there and good is None:
        raise ValueError(
            f"no checkpoint in {output_dir} is whole: {'; '.join(broken)}. Start afresh with "
            "--resume_from_checkpoint false --overwrite_output_dir true"
        )
    if broken and say:
        logger.warning("passed over: %s. Going on from %s", "; ".join(broken), good)
    return good


def check_agreed(folder: str | None) -> None:
    """Raise ValueError when the processes found different checkpoints; to be called on every process."""
    found = gather_object([folder and Path(folder).name])
    if len(set(found)) > 1:
        shown = ", ".join(f"process {index}: {name or 'none'}" for index, name in enumerate(found))
        raise ValueError(
            f"the processes see different checkpoints ({shown}): output_dir must be shared by all machines"
        )


# -- what one belongs to -------------------------------------------------------------------------------------------

#: By part of an identity: how to go on when it differs.
_ADVICE = {
    "algorithm": "resume with the trainer that wrote it",
    "model": "resume with the model it was trained on",
    "trained": "resume with the same",
    "dealing": "resume with the same",
}
#: Of the dealing: rows of all processes that an update sees. FlowConfig.check_batch says what would make them the same.
ROWS_PER_UPDATE = "rows_per_update"


def check_identity(folder: Path, run: dict[str, dict[str, Any]]) -> None:
    """Raise ValueError, naming what differs and what would do, when a checkpoint is not of this ``run``.

    ``run``: what is known of it so far, as in :meth:`align.engine.trainer.FlowTrainer.identity`. What only one of the two
    knows is not compared, nor are the rows of an update.
    """
    wrong = fault(folder)
    if wrong:
        raise ValueError(f"checkpoint {folder} {wrong}")
    stored = json.loads((folder / MANIFEST).read_text())
    if stored["format"] > FORMAT:
        raise ValueError(
            f"checkpoint {folder} was written by flow-align {stored['version']} (format {stored['format']}) and this is "
            f"{align.__version__}, which reads up to format {FORMAT}: install that version or a later one"
        )
    lora = stored["run"]["trained"]["tuning"] == "LoRA"
    for part, advice in _ADVICE.items():
        now, then = json.loads(json.dumps(run.get(part, {}))), stored["run"].get(part, {})
        for name in [n for n in then if n in now and now[n] != then[n] and n not in ("name", ROWS_PER_UPDATE)]:
            what = f"{name} is {now[name]!r} and was {then[name]!r}"
            if part == "model":
                what = f"the model is {now['name']} and was {then['name']} ({what})"
            elif lora:
                advice += f", or start a new run from its LoRA with --adapter {folder}"
            raise ValueError(f"{what} when {folder} was written: {advice}")


def stored_dealing(folder: Path) -> dict[str, Any]:
    """What decided what an update was made of in the run that wrote a whole checkpoint."""
    return json.loads((folder / MANIFEST).read_text()).get("run", {}).get("dealing", {})


# -- writing -------------------------------------------------------------------------------------------------------


@contextmanager
def written_whole(
    final: Path, run: dict[str, Any], here: bool, limit: int | None = None, best: str | None = None
) -> Iterator[Path]:
    """A folder to write a checkpoint into; behind it the checkpoint is at ``final``, whole, or nothing has changed.

    To be entered on every process. ``run``: its identity. ``here``: this process is the one that keeps order on its
    disk. ``limit``: whole checkpoints to keep, this one and ``best`` among them.

    Raises CheckpointError on every process when any of them could not write.
    """
    folder = final.parent / UNFINISHED / final.name
    error: Exception | None = None
    if here:
        try:
            _settle(final.parent)
            folder.mkdir(parents=True)
        except OSError as problem:
            error = problem
    _agree_written(error, final, here)
    try:
        yield folder
    except (OSError, RuntimeError, SafetensorError) as problem:  # torch and safetensors say RuntimeError and their own
        error = problem
    _agree_written(error, final, here)
    if here:
        try:
            _seal(folder, run)
            _put_in_place(folder, final)
        except OSError as problem:
            error = problem
    _agree_written(error, final, here)
    if here:
        _rotate(final.parent, limit, {str(final), best})


def _agree_written(error: Exception | None, final: Path, here: bool) -> None:
    """Wait for all processes; when one has an error, clean up and raise on all of them."""
    said = None
    if error is not None:
        free = shutil.disk_usage(final.parent).free / 2**20
        said = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}; {free:.1f} MiB were free"
    failed = [(index, text) for index, text in enumerate(gather_object([said])) if text]
    if not failed:
        return
    if here:
        shutil.rmtree(final.parent / UNFINISHED, ignore_errors=True)
    good, (index, text) = last_good(final.parent), failed[0]
    kept = f"the last good one is {good}" if good else "there is none before it"
    raise CheckpointError(
        f"{final} could not be written by process {index} ({text}) and was removed: {kept}"
    ) from error


def _settle(output_dir: Path) -> None:
    """Remove what an earlier process left half written; what lacks nothing but its name gets it."""
    unfinished = output_dir / UNFINISHED
    for folder in checkpoints(unfinished):
        if fault(folder) is None and not (output_dir / folder.name).exists():
            folder.rename(output_dir / folder.name)
    if unfinished.exists():
        shutil.rmtree(unfinished)


def _seal(folder: Path, run: dict[str, Any]) -> None:
    """Bring all files to the disk, then the list of them."""
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
    """Give files the modes of any new one: safetensors makes them readable for their owner alone."""
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
    """Give a sealed checkpoint its name; killed in between, :func:`_settle` does it."""
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
    there = checkpoints(output_dir)
    others = [p for p in there if str(p) not in keep]
    others.sort(key=lambda p: (fault(p) is None, p.stat().st_mtime_ns))
    for folder in others[: max(0, len(there) - limit)]:
        shutil.rmtree(folder, ignore_errors=True)
