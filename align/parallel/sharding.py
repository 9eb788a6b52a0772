"""The launcher's processes and DeepSpeed's ZeRO: what they cannot do, gathering what is trained, engine checkpoints."""

import json
import logging
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import TrainingArguments
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

logger = logging.getLogger(__name__)

#: In a checkpoint: how it is sharded over files.
SHARDING = "sharding.json"
#: torch.load heeds it whatever its caller has asked for.
TENSORS_ONLY = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"


def zero_stage(args: TrainingArguments) -> int:
    """Return the ZeRO stage that the launcher asks for; 0 without DeepSpeed."""
    return 0 if args.deepspeed_plugin is None else int(args.deepspeed_plugin.zero_stage)


def keep_zero3_from_loading() -> None:
    """Keep ZeRO-3 from transformers, which would shard every model of its own that is loaded from here on.

    The text encoder and the rewards' models are not sharded; the transformer is when training begins.
    """
    unset_hf_deepspeed_config()


def check_launch(args: TrainingArguments) -> None:
    """Raise ValueError for FSDP, and when the launcher's processes did not find each other; warn when there is only one."""
    if args.fsdp or os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true":
        raise ValueError(
            "the launcher asks for FSDP, under which these trainers cannot save what they train: to shard the model, "
            "launch with configs/accelerate/zero2.yaml or zero3.yaml"
        )
    if "WORLD_SIZE" not in os.environ and os.environ.keys() >= {"ACCELERATE_MIXED_PRECISION", "MASTER_PORT"}:
        logger.warning(
            "the launcher started one process, although more were requested: without an accelerator, accelerate starts "
            "several only by a config: --config_file configs/accelerate/ddp.yaml"
        )
    check_world_size(args.world_size, "--use_cpu true --ddp_backend gloo")


def check_world_size(found: int, way_out: str) -> None:
    """Raise ValueError, with ``way_out``, when this process did not find the others that the launcher started."""
    asked = int(os.environ.get("WORLD_SIZE", "1"))
    if found < asked:
        raise ValueError(
            f"the launcher started {asked} processes, but this process is in a group of {found}: without an accelerator, "
            f"add {way_out}"
        )


def check_zero(args: Any, adapter: bool) -> None:
    """Raise ValueError for what a full fine-tune under ZeRO-3 cannot do. ``adapter``: whether an adapter is trained."""
    copy = args.full_copy()
    if zero_stage(args) == 3 and not adapter and copy is not None:
        raise ValueError(
            f"{copy} would keep a second, full copy of a fully fine-tuned model on every process, which ZeRO-3 does not "
            f"shard here. Train an adapter, use ZeRO-2, or leave {copy.split()[0]} out"
        )


def shard_frozen(model: torch.nn.Module, args: TrainingArguments) -> torch.nn.Module:
    """Shard a frozen model by ZeRO-3, in an engine of its own that runs forward alone.

    Call it after the trained model's engine was made, which completes the settings.
    """
    import deepspeed

    if isinstance(model, deepspeed.DeepSpeedEngine):  # sharded by an earlier call
        return model
    config = deepcopy(args.deepspeed_plugin.deepspeed_config)
    for training in ("optimizer", "scheduler"):
        config.pop(training, None)
    config["zero_optimization"].pop("offload_optimizer", None)
    engine = deepspeed.initialize(model=model, config=config)[0]
    engine.eval()  # which returns nothing
    return engine


# -- gathering --------------------------------------------------------------------------------------------------------


@contextmanager
def gathered(parameters: Iterable[torch.nn.Parameter], write: bool = False) -> Iterator[None]:
    """Enter a context in which parameters that ZeRO-3 shards are gathered; every process must enter.

    ``write``: they may be set in it.
    """
    sharded = [p for p in parameters if hasattr(p, "ds_id")]
    if not sharded:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(sharded, modifier_rank=0 if write else None):
        yield


def full_shape(parameter: Tensor) -> torch.Size:
    """Return the shape of a parameter, before it was sharded."""
    return getattr(parameter, "ds_shape", parameter.shape)


def gathered_state(parameters: dict[str, torch.nn.Parameter], keep: bool) -> dict[str, Tensor]:
    """Copy parameters to the CPU, gathered one at a time; every process must call, and those that do not ``keep`` get none."""
    state = {}
    for name, parameter in parameters.items():
        with gathered([parameter]):
            if keep:
                state[name] = parameter.detach().to("cpu", copy=True).contiguous()
    return state


# -- checkpoints of the engine ----------------------------------------------------------------------------------------


def save_trained_only(engine: Any) -> None:
    """Have the engine write only what is trained; the Trainer asks for that with peft's own wrapper alone.

    DeepSpeed has no setting for it: it is an argument of the call, which is the Trainer's.
    """
    engine.save_checkpoint = partial(engine.save_checkpoint, exclude_frozen_parameters=True)


@dataclass(frozen=True)
class Sharding:
    """How a run is sharded: ZeRO stage (0: not at all), number of processes, and where ZeRO keeps the optimizer."""

    zero_stage: int
    processes: int
    offload: str = "none"

    @classmethod
    def of(cls, args: TrainingArguments) -> "Sharding":
        """Return that of this run."""
        config = {} if args.deepspeed_plugin is None else args.deepspeed_plugin.deepspeed_config
        offload = config.get("zero_optimization", {}).get("offload_optimizer", {}).get("device", "none")
        return cls(zero_stage(args), args.world_size, str(offload))

    @classmethod
    def stored(cls, folder: Path, args: TrainingArguments) -> "Sharding":
        """Return that of a checkpoint. Without ZeRO every process has everything, and their number does not matter."""
        file = folder / SHARDING
        return cls(**json.loads(file.read_text())) if file.is_file() else cls(0, args.world_size)

    def write(self, folder: Path) -> None:
        """Write it into a checkpoint of the engine."""
        offload = {} if self.offload == "none" else {"offload": self.offload}
        note = {"zero_stage": self.zero_stage, "processes": self.processes} | offload
        (folder / SHARDING).write_text(json.dumps(note))

    def describe(self) -> str:
        """Say it in words."""
        offloaded = f" with the optimizer on the {self.offload}" if self.offload != "none" else ""
        stage = f"under DeepSpeed ZeRO-{self.zero_stage} on {self.processes} processes{offloaded}"
        return stage if self.zero_stage else "without DeepSpeed"

    def launch_command(self) -> str:
        """Say how to launch a run that is sharded so."""
        if not self.zero_stage:
            return "with configs/accelerate/ddp.yaml or single.yaml"
        offload = "_offload" if self.offload != "none" and self.zero_stage == 3 else ""
        return f"with configs/accelerate/zero{self.zero_stage}{offload}.yaml and --num_processes {self.processes}"


@contextmanager
def tensors_only() -> Iterator[None]:
    """Enter a context in which ``torch.load`` refuses every file that would run code, also when DeepSpeed calls it.

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


def sharded_otherwise(folder: Path, args: TrainingArguments, log: bool) -> Sharding | None:
    """Return how the run that wrote a checkpoint was sharded, or None where this run is sharded alike."""
    before, this = Sharding.stored(folder, args), Sharding.of(args)
    if before == this:
        return None
    if log:
        logger.warning(
            "%s was written %s, and this run is %s: the optimizer's state is sharded anew",
            folder,
            before.describe(),
            this.describe(),
        )
    return before
