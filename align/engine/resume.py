"""Going on from a checkpoint: which one, and whether it is of this run."""

import json
import logging
import shlex
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate.utils import gather_object

import align
from align.engine import checkpoints
from align.engine.settings import FlowConfig, values_of
from align.models.adapters import LORA_FILE
from align.models.loading import INDEX
from align.parallel.sharding import Sharding, sharded_otherwise
from preference_data.digests import data_digest
from rewards import Reward

logger = logging.getLogger(__name__)

#: What a run leaves that ends with its weights exported: a LoRA or a full fine-tune, and its log.
EXPORTED = (LORA_FILE, "transformer", "trainer_state.json")
#: Section of an identity: what decides what an update is made of.
FIXED = "fixed_on_resume"
#: In it: rows of all processes that an update sees. :func:`_check_rows` says what would make them the same.
ROWS_PER_UPDATE = "rows_per_update"
#: Section of an identity: what a resumed run may change, and says so.
FREE = "settings"
#: transformers' settings that a checkpoint's optimizer and schedule hold: others would be ignored, or bend the schedule.
_RESTORED = ("weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "optim", "optim_args",
             "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps")  # fmt: skip
#: transformers' settings that a resumed run takes over and that change its updates.
_TAKEN_OVER = ("max_steps", "num_train_epochs", "max_grad_norm", "bf16", "fp16")
#: What a change of says nothing of the run: settings of the command, and what is compared elsewhere.
_OF_THE_COMMAND = {"overwrite_output_dir", "check_memory", "per_device_train_batch_size", "gradient_accumulation_steps"}  # fmt: skip
#: Schedules that do not depend on the length of the run.
_WITHOUT_END = ("constant", "constant_with_warmup", "inverse_sqrt", "reduce_lr_on_plateau")
#: Name of the digest of the training data.
TRAINING_DATA = "training_data"


@dataclass(frozen=True)
class ResumePlan:
    """The checkpoint that a run goes on from, known to be this run's.

    folder: None starts afresh. written_under: how the run that wrote it was sharded, where this one is sharded otherwise.
    """

    folder: Path | None = None
    written_under: Sharding | None = None


@dataclass(frozen=True)
class Inputs:
    """What tells a run's data and rewards from another's.

    fixed: what a resume must not change. free: what it may.
    """

    fixed: dict[str, Any]
    free: dict[str, Any]


def describe_inputs(
    train_dataset: Any,
    rewards: Sequence[Reward],
    eval_dataset: Any = None,
    eval_prompts: Any = None,
    guard_datasets: Mapping[str, Any] | None = None,
    **others: Any,
) -> Inputs:
    """Describe data by digests of their content, and rewards by name, weight and a digest of what computes them.

    It takes what a trainer takes, and leaves ``others`` out. Of the rest of a reward's entry nothing is kept: it may hold
    a password.
    """
    fixed, free, held_out = {}, {}, [eval_dataset, eval_prompts, *(guard_datasets or {}).values()]
    if (digest := data_digest(train_dataset)) is not None:
        fixed[TRAINING_DATA] = digest
    digests = [data_digest(data) for data in held_out if data is not None]
    free["held_out_data"] = [digest for digest in digests if digest is not None]
    free["rewards"] = [reward.described() for reward in rewards]
    return Inputs(fixed, free)


def run_identity(
    algorithm: str, model: dict[str, dict[str, Any]], args: FlowConfig, inputs: Inputs
) -> dict[str, dict[str, Any]]:
    """Return what a checkpoint of a run belongs to; ``model``: see :meth:`align.models.contract.FlowModel.identity`."""
    fixed = values_of(args, fixed_on_resume=True) | args.fixed_beside | inputs.fixed
    fixed |= {name: getattr(args, name) for name in _RESTORED} | {ROWS_PER_UPDATE: args.rows_per_update()}
    free = {k: v for k, v in values_of(args, fixed_on_resume=False).items() if k not in _OF_THE_COMMAND}
    free |= {name: getattr(args, name) for name in _TAKEN_OVER} | args.free_beside | inputs.free
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
    _check_format(folder)
    if log:
        _log_differences(folder, identity)
    _check_identity(folder, identity)
    _check_rows(folder, args)
    _check_optimizer(folder)
    if not is_within(folder, args.output_dir):
        _check_earlier_run(args)
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


def _check_format(folder: Path) -> None:
    """Raise ValueError for a checkpoint of a version that wrote others."""
    stored = _stored(folder)
    if stored["format"] != checkpoints.FORMAT:
        raise ValueError(
            f"checkpoint {folder} was written by flow-align {stored['version']} in format {stored['format']}, and this "
            f"is {align.__version__}, which reads format {checkpoints.FORMAT}: resume with that version"
            f"{_new_run(stored, folder)}"
        )


def _check_identity(folder: Path, identity: dict[str, dict[str, Any]]) -> None:
    """Raise ValueError, naming what differs and what would do, when a checkpoint is not of this run.

    What only one of the two knows is not compared, nor are the rows of an update.
    """
    stored = _stored(folder)
    new_run = _new_run(stored, folder)
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
    # Other data may be the work of another setting (a trigger word): then that is what is told.
    changed = [d for d in changed if d[0] != TRAINING_DATA] or changed
    if changed:
        what = ", ".join(f"{name} is {value!r} and was {before!r}" for name, value, before in changed)
        options = " ".join(_option(name, before) for name, _, before in changed if before is not None)
        ways = [f"with {options}"] if options else []
        ways += [f"without --{name}" for name, _, before in changed if before is None]
        if changed[0][0] == TRAINING_DATA:
            ways = ["with the data as they were"]
        raise ValueError(f"{what} when {folder} was written: resume {' and '.join(ways)}{new_run}")


def _differences(current: dict[str, Any], before: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    """List (name, current value, value before) of what both know and what is not the same."""
    both = [name for name in before if name in current]
    return [(name, current[name], before[name]) for name in both if current[name] != before[name]]


def _option(name: str, value: Any) -> str:
    """Write a setting as on the command line."""
    values = value if isinstance(value, list) else [json.dumps(value) if isinstance(value, dict) else value]
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


def _check_optimizer(folder: Path) -> None:
    """Raise ValueError for a checkpoint of the weights alone: the optimizer would begin anew."""
    stored = _stored(folder)
    if not any(Path(name).parts[0] == "optimizer.pt" or name.startswith("global_step") for name in stored["files"]):
        raise ValueError(
            f"checkpoint {folder} holds weights and no optimizer (save_only_model), which would begin anew: resume from "
            f"one that was saved whole{_new_run(stored, folder)}"
        )


def _new_run(stored: dict[str, Any], folder: Path) -> str:
    """Say how a new run starts from the checkpoint's LoRA, if it has one."""
    lora = stored["run"]["trained"]["tuning"] == "LoRA"
    return f", or start a new run, in another output_dir, from its LoRA with --adapter {folder}" if lora else ""


def _log_differences(folder: Path, identity: dict[str, dict[str, Any]]) -> None:
    """Show in one table all that differs from the checkpoint, and what becomes of it."""
    stored, current, rows = _stored(folder)["run"], json.loads(json.dumps(identity)), []
    schedule = current[FIXED]["lr_scheduler_type"]
    for section in current:
        outcome = "taken over" if section == FREE else "refused"
        for name, value, before in _differences(current[section], stored.get(section, {})):
            becomes = outcome
            if (section, name) == ("model", "name"):
                becomes = "taken over: the same model"
            elif name in ("max_steps", "num_train_epochs") and schedule not in _WITHOUT_END:
                becomes += f"; from here on the {schedule} schedule is that of the new length"
            rows.append((name, _short(before), _short(value), becomes))
    if rows:
        head = ("", f"checkpoint-{folder.name.rpartition('-')[2]}", "this run", "")
        widths = [max(len(row[column]) for row in [head, *rows]) for column in range(3)]
        lines = [
            "  ".join([*(cell.ljust(w) for cell, w in zip(row, widths, strict=False)), row[3]]) for row in [head, *rows]
        ]
        logger.warning("what differs from %s:\n%s", folder, "\n".join("  " + line.rstrip() for line in lines))


def _short(value: Any) -> str:
    """Write a value for a cell of a table."""
    text = " ".join((", ".join(map(str, value)) or "none" if isinstance(value, list) else str(value)).split())
    return text if len(text) <= 60 else text[:57] + "..."
