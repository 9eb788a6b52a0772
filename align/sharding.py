"""DeepSpeed's ZeRO under a trainer: what it can do, gathering what is trained, and the checkpoints of its engine."""

import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import TrainingArguments
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

#: In a checkpoint: how it is shared out over files.
SHARDING = "sharding.json"
#: torch.load heeds it whatever its caller has asked for.
TENSORS_ONLY = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"


def zero_stage(args: TrainingArguments) -> int:
    """ZeRO stage that the launcher asks for; 0 without DeepSpeed."""
    return 0 if args.deepspeed_plugin is None else int(args.deepspeed_plugin.zero_stage)


def keep_models_whole() -> None:
    """Tell transformers nothing of ZeRO-3: it would partition every model of its own that is loaded from here on.

    The text encoder and the rewards' models stay whole; the transformer is partitioned when training begins.
    """
    unset_hf_deepspeed_config()


def check_zero(args: Any, adapter: bool) -> None:
    """Raise ValueError for what a full fine-tune under ZeRO-3 cannot do. ``adapter``: whether an adapter is trained."""
    if zero_stage(args) < 3 or adapter:
        return
    wanted_by = args.wants_reference()
    if wanted_by:
        raise ValueError(
            f"{wanted_by} has nothing to refer to: a full fine-tune needs a frozen copy of the model, which ZeRO-3 "
            "does not shard here. Train an adapter, or use ZeRO-2"
        )
    if args.ema_decay:
        raise ValueError(
            f"ema_decay {args.ema_decay} would keep a second, whole copy of a fully fine-tuned model on every process, "
            "which ZeRO-3 does not shard here. Train an adapter, use ZeRO-2, or leave ema_decay out"
        )


# -- gathering --------------------------------------------------------------------------------------------------------


@contextmanager
def gathered(parameters: Iterable[torch.nn.Parameter], write: bool = False) -> Iterator[None]:
    """Within it, parameters that ZeRO-3 shares out are whole; every process must enter. ``write``: and may be set."""
    shared_out = [p for p in parameters if hasattr(p, "ds_id")]
    if not shared_out:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(shared_out, modifier_rank=0 if write else None):
        yield


def whole_shape(parameter: Tensor) -> torch.Size:
    """The shape of a parameter, that of all its parts together if it is shared out."""
    return getattr(parameter, "ds_shape", parameter.shape)


def whole_state(parameters: dict[str, torch.nn.Parameter], keep: bool) -> dict[str, Tensor]:
    """Copies on the CPU, gathered one at a time; every process must call, and those that do not ``keep`` get none."""
    state = {}
    for name, parameter in parameters.items():
        with gathered([parameter]):
            if keep:
                state[name] = parameter.detach().to("cpu", copy=True).contiguous()
    return state


# -- checkpoints of the engine ----------------------------------------------------------------------------------------


def leave_out_frozen(engine: Any) -> None:
    """Have the engine write only what is trained; the Trainer asks for that with peft's own wrapper alone."""
    engine.save_checkpoint = partial(engine.save_checkpoint, exclude_frozen_parameters=True)


def write_sharding(folder: Path, args: TrainingArguments) -> None:
    """Note in a checkpoint of the engine under what it was written, for :func:`check_sharding`."""
    (folder / SHARDING).write_text(json.dumps({"zero_stage": zero_stage(args), "processes": args.world_size}))


@contextmanager
def tensors_only() -> Iterator[None]:
    """Within it ``torch.load`` refuses every file that would run code, also when DeepSpeed asks it to read anything.

    What DeepSpeed keeps beside tensors, plain data in three classes of its own, is still read.
    """
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    before = os.environ.get(TENSORS_ONLY)
    os.environ[TENSORS_ONLY] = "1"
    try:
        with torch.serialization.safe_globals([LossScaler, DynamicLossScaler, ZeroStageEnum, fragment_address]):
            yield
    finally:
        if before is None:
            del os.environ[TENSORS_ONLY]
        else:
            os.environ[TENSORS_ONLY] = before


def load_engine(engine: Any, folder: Path) -> None:
    """Read a checkpoint of the engine. The frozen weights, which it lacks, are as they were loaded.

    Raises pickle.UnpicklingError for a file of more than tensors: nothing of it is run.
    """
    with tensors_only():
        path, _ = engine.load_checkpoint(str(folder), load_module_strict=False)
    if path is None:
        raise ValueError(f"DeepSpeed finds nothing to resume from in {folder}")


def check_sharding(folder: Path, args: TrainingArguments) -> None:
    """Raise ValueError for a checkpoint that was written under another ZeRO stage, or by other processes under ZeRO."""
    file = folder / SHARDING
    there = json.loads(file.read_text()) if file.is_file() else {"zero_stage": 0, "processes": args.world_size}
    here = {"zero_stage": zero_stage(args), "processes": args.world_size}
    if there == here:
        return
    stage = there["zero_stage"]
    launcher = f"configs/accelerate/zero{stage}.yaml" if stage else "configs/accelerate/ddp.yaml or single.yaml"
    processes = f" and --num_processes {there['processes']}" if stage else ""
    raise ValueError(
        f"checkpoint {folder} was written {_said(there)}, and this run is {_said(here)}: what the optimizer knows cannot "
        f"be carried over. Resume with {launcher}{processes}"
    )


def _said(sharding: dict[str, int]) -> str:
    stage, processes = sharding["zero_stage"], sharding["processes"]
    return f"under DeepSpeed ZeRO-{stage} on {processes} processes" if stage else "without DeepSpeed"
