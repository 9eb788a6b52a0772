"""DeepSpeed's ZeRO under a trainer: what it can do, gathering what is trained, and the checkpoints of its engine."""

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
    copy = args.whole_copy()
    if zero_stage(args) == 3 and not adapter and copy is not None:
        raise ValueError(
            f"{copy} would keep a second, whole copy of a fully fine-tuned model on every process, which ZeRO-3 does not "
            f"shard here. Train an adapter, use ZeRO-2, or leave {copy.split()[0]} out"
        )


def share_out_frozen(model: torch.nn.Module, args: TrainingArguments) -> torch.nn.Module:
    """A frozen model, shared out by ZeRO-3 as what is trained is: by an engine of its own, that runs forward alone.

    After the trained model's engine, by which the settings are complete.
    """
    import deepspeed

    if isinstance(model, deepspeed.DeepSpeedEngine):  # by an earlier call
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


@dataclass(frozen=True)
class Sharding:
    """How a run is shared out: ZeRO stage (0: not at all), number of processes, and where ZeRO keeps the optimizer."""

    zero_stage: int
    processes: int
    offload: str = "none"

    @classmethod
    def of(cls, args: TrainingArguments) -> "Sharding":
        """That of this run."""
        config = {} if args.deepspeed_plugin is None else args.deepspeed_plugin.deepspeed_config
        offload = config.get("zero_optimization", {}).get("offload_optimizer", {}).get("device", "none")
        return cls(zero_stage(args), args.world_size, str(offload))

    @classmethod
    def stored(cls, folder: Path, args: TrainingArguments) -> "Sharding":
        """That of a checkpoint. Without ZeRO every process has all there is, and their number does not matter."""
        file = folder / SHARDING
        return cls(**json.loads(file.read_text())) if file.is_file() else cls(0, args.world_size)

    def write(self, folder: Path) -> None:
        """Note it in a checkpoint of the engine."""
        left_out = {} if self.offload == "none" else {"offload": self.offload}
        note = {"zero_stage": self.zero_stage, "processes": self.processes} | left_out
        (folder / SHARDING).write_text(json.dumps(note))

    def said(self) -> str:
        """In words."""
        offloaded = f" with the optimizer on the {self.offload}" if self.offload != "none" else ""
        stage = f"under DeepSpeed ZeRO-{self.zero_stage} on {self.processes} processes{offloaded}"
        return stage if self.zero_stage else "without DeepSpeed"

    def launched(self) -> str:
        """How a run is launched to be shared out so."""
        if not self.zero_stage:
            return "with configs/accelerate/ddp.yaml or single.yaml"
        offload = "_offload" if self.offload != "none" and self.zero_stage == 3 else ""
        return f"with configs/accelerate/zero{self.zero_stage}{offload}.yaml and --num_processes {self.processes}"


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


def moved_from(folder: Path, args: TrainingArguments, say: bool) -> Sharding | None:
    """How the run that wrote a checkpoint was shared out, if otherwise than this one; said aloud if ``say``."""
    there, here = Sharding.stored(folder, args), Sharding.of(args)
    if there == here:
        return None
    if say:
        logger.warning(
            "%s was written %s, and this run is %s: what the optimizer knows is dealt out anew",
            *(folder, there.said(), here.said()),
        )
    return there
