"""Going on from a checkpoint: which one, and whether it is of this run."""

import json
import logging
import shlex
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate.utils import gather_object

import align
from align.engine import checkpoints
from align.engine.settings import FlowConfig, values_of
from align.models.loading import INDEX
from align.parallel.sharding import Sharding, sharded_otherwise

logger = logging.getLogger(__name__)

#: What a run leaves that ends with its weights exported: a LoRA or a full fine-tune, and its log.
EXPORTED = ("pytorch_lora_weights.safetensors", "transformer", "trainer_state.json")
#: Section of an identity: what decides what an update is made of.
FIXED = "fixed_on_resume"
#: In it: rows of all processes that an update sees. :func:`_check_rows` says what would make them the same.
ROWS_PER_UPDATE = "rows_per_update"
#: Section of an identity: this library's other settings. A resumed run may change them, and says so.
FREE = "settings"
#: What a change of says nothing of the run: settings of the command, and a rate that is restored with the schedule.
_OF_THE_COMMAND = {"overwrite_output_dir", "check_memory", "per_device_train_batch_size", "gradient_accumulation_steps",
                   "learning_rate"}  # fmt: skip


@dataclass(frozen=True)
class ResumePlan:
    """The checkpoint that a run goes on from, known to be this run's.

    folder: None starts afresh. written_under: how the run that wrote it was sharded, where this one is sharded otherwise.
    """

    folder: Path | None = None
    written_under: Sharding | None = None


def run_identity(algorithm: str, model: dict[str, dict[str, Any]], args: FlowConfig) -> dict[str, dict[str, Any]]:
    """Return what a checkpoint of a run belongs to; ``model``: see :meth:`align.models.contract.FlowModel.identity`."""
    fixed = values_of(args, fixed_on_resume=True) | args.fixed_beside | {ROWS_PER_UPDATE: args.rows_per_update()}
    free = {k: v for k, v in values_of(args, fixed_on_resume=False).items() if k not in _OF_THE_COMMAND}
    free |= args.free_beside
    return {"algorithm": {"algorithm": algorithm}, **model, FIXED: fixed, FREE: free}


def plan_resume(args: FlowConfig, identity: dict[str, dict[str, Any]], wanted: str | bool | None) -> ResumePlan:
    """Find the checkpoint that ``wanted`` names and check that this run may go on from it; called on every process.

    Args:
        identity: of this run, see :func:`run_identity`.
        wanted: a folder; ``true`` for the last complete one in output_dir, if there is one; None or ``false`` for none.

    Raises:
        FileNotFoundError, ValueError: see :func:`align.engine.checkpoints.find`; or the processes found different
            checkpoints; or it is of another run.
        FileExistsError: the run starts afresh, and would overwrite an earlier one.
    """
    if wanted is None or str(wanted).lower() == "false":
        _check_earlier_run(args)
        return ResumePlan()
    log = args.process_index == 0
    folder = checkpoints.find(str(args.output_dir), wanted, log)
    _check_agreed(folder)
    if folder is None:
        _check_earlier_run(args)
        if log:
            logger.warning("%s holds no checkpoint to resume from yet: starting afresh", args.output_dir)
        return ResumePlan()
    _check_identity(folder, identity)
    _check_rows(folder, args)
    if not is_within(folder, args.output_dir):
        _check_earlier_run(args)
    if log:
        _log_changes(folder, identity)
    return ResumePlan(folder, sharded_otherwise(folder, args, log))


def _check_agreed(folder: Path | None) -> None:
    """Raise ValueError when the processes found different checkpoints; called on every process."""
    found = gather_object([folder and folder.name])
    if len(set(found)) > 1:
        shown = ", ".join(f"process {index}: {name or 'none'}" for index, name in enumerate(found))
        raise ValueError(
            f"the processes see different checkpoints ({shown}): output_dir must be shared by all machines"
        )


def is_within(path: str | Path, folder: str | Path | None) -> bool:
    """Whether a path is a folder or lies in it."""
    return Path(path).resolve().is_relative_to(Path(str(folder)).resolve())


def _check_earlier_run(args: FlowConfig) -> None:
    """Raise FileExistsError when a run would overwrite an earlier one, or a model."""
    output_dir = Path(str(args.output_dir))
    if (output_dir / INDEX).exists():
        raise FileExistsError(f"{output_dir} holds a model ({INDEX}): pass another --output_dir")
    saved = checkpoints.list_all(output_dir)
    left = [saved[0].name] if saved else [name for name in EXPORTED if (output_dir / name).exists()]
    if left and not args.overwrite_output_dir:
        go_on = "--resume_from_checkpoint true to go on from it, " if saved else ""
        raise FileExistsError(
            f"{output_dir} holds {left[0]} of an earlier run: pass {go_on}--overwrite_output_dir true to "
            "start afresh, or another --output_dir"
        )


def clear_earlier_run(output_dir: str | Path, keep_samples: bool) -> None:
    """Remove what an earlier run left in ``output_dir``, which would pass for this run's, and nothing else.

    ``keep_samples``: those that are there are this run's, which was evaluated before it was trained.
    """
    folder = Path(output_dir)
    files = [*folder.glob("rollouts/part-*"), *folder.glob("rollouts/.part-*"), folder / "rollouts/writer.json"]
    if not keep_samples:
        files += folder.glob("samples/step-*")
    if (folder / "trainer_state.json").exists():  # then card and pictures are a run's too
        files += [folder / name for name in ("before_after.png", "reward_curve.png", "README.md")]
    for earlier in [*files, *checkpoints.list_all(folder), *(folder / n for n in (checkpoints.UNFINISHED, *EXPORTED))]:
        if earlier.is_dir():
            shutil.rmtree(earlier, ignore_errors=True)
        else:
            earlier.unlink(missing_ok=True)


# -- whether a checkpoint is of this run -------------------------------------------------------------------------------


def _stored(folder: Path) -> dict[str, Any]:
    """Read what a complete checkpoint says of itself."""
    return json.loads((folder / checkpoints.MANIFEST).read_text())


def _check_identity(folder: Path, identity: dict[str, dict[str, Any]]) -> None:
    """Raise ValueError, naming what differs and what would do, when a checkpoint is not of this run.

    What only one of the two knows is not compared, nor are the rows of an update.
    """
    stored = _stored(folder)
    lora = stored["run"]["trained"]["tuning"] == "LoRA"
    new_run = f", or start a new run, in another output_dir, from its LoRA with --adapter {folder}" if lora else ""
    if stored["format"] != checkpoints.FORMAT:
        raise ValueError(
            f"checkpoint {folder} was written by flow-align {stored['version']} in format {stored['format']}, and this "
            f"is {align.__version__}, which reads format {checkpoints.FORMAT}: resume with that version{new_run}"
        )
    advice = {
        "algorithm": "resume with the trainer that wrote it",
        "model": "resume with the model it was trained on",
        "trained": f"resume with the same{new_run}",
    }
    current = json.loads(json.dumps(identity))
    for section, do in advice.items():
        for name, value, before in _differences(current[section], stored["run"].get(section, {})):
            if name == "name":  # of a model: its folder may have moved
                continue
            what = f"{name} is {value!r} and was {before!r}"
            if section == "model":
                what = f"the model is {current['model']['name']} and was {stored['run']['model']['name']} ({what})"
            raise ValueError(f"{what} when {folder} was written: {do}")
    changed = [d for d in _differences(current[FIXED], stored["run"].get(FIXED, {})) if d[0] != ROWS_PER_UPDATE]
    if changed:
        what = ", ".join(f"{name} is {value!r} and was {before!r}" for name, value, before in changed)
        options = " ".join(_option(name, before) for name, _, before in changed if before is not None)
        ways = [f"with {options}"] if options else []
        ways += [f"without --{name}" for name, _, before in changed if before is None]
        raise ValueError(f"{what} when {folder} was written: resume {' and '.join(ways)}{new_run}")


def _differences(current: dict[str, Any], before: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    """List (name, current value, value before) of what both know and what is not the same."""
    both = [name for name in before if name in current]
    return [(name, current[name], before[name]) for name in both if current[name] != before[name]]


def _option(name: str, value: Any) -> str:
    """Write a setting as on the command line."""
    values = value if isinstance(value, list) else [value]
    return " ".join([f"--{name}", *(shlex.quote(str(v)) for v in values)])


def _check_rows(folder: Path, args: FlowConfig) -> None:
    """Raise ValueError, with values that would do, when an update would see other rows than the checkpoint's did."""
    before, current = _stored(folder)["run"].get(FIXED, {}).get(ROWS_PER_UPDATE), args.rows_per_update()
    if before in (None, current):
        return
    size, accumulation, world = args.per_device_train_batch_size, args.gradient_accumulation_steps, args.world_size
    ways = []
    if before % (accumulation * world) == 0:
        ways.append(f"--per_device_train_batch_size {before // (accumulation * world)}")
    if before % (size * world) == 0:
        ways.append(f"--gradient_accumulation_steps {before // (size * world)}")
    if before % (size * accumulation) == 0:
        ways.append(f"--num_processes {before // (size * accumulation)}")
    if not ways and before % world == 0:
        ways.append(f"--per_device_train_batch_size {before // world} --gradient_accumulation_steps 1")
    if not ways:
        ways.append(f"a number of processes that divides {before}")
    raise ValueError(
        f"per_device_train_batch_size {size} x gradient_accumulation_steps {accumulation} x {world} processes = {current} "
        f"rows an update, and it was {before} when {folder} was written: resume with {' or '.join(ways)}"
    )


def _log_changes(folder: Path, identity: dict[str, dict[str, Any]]) -> None:
    """Name the settings that may change on a resume, and have changed."""
    current = json.loads(json.dumps(identity[FREE]))
    changed = [
        f"{name} {before!r} -> {value!r}"
        for name, value, before in _differences(current, _stored(folder)["run"].get(FREE, {}))
    ]
    if changed:
        logger.warning("settings changed since %s was written: %s", folder, ", ".join(changed))
