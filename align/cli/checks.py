"""What is checked before a weight is read: the launcher, and whether the run fits into memory."""

import logging
import os

import psutil
import torch
from transformers import TrainingArguments

from align.cli.arguments import DTYPES, ModelArguments
from align.engine.settings import FlowConfig
from align.models.loading import resolve_folder
from align.parallel.memory import Setup, check_fits, count
from align.parallel.sharding import zero_stage

logger = logging.getLogger(__name__)

#: float32 numbers that an optimizer keeps per trained parameter; one that is not here counts as none.
MOMENTS = {"adamw_torch": 2, "adamw_torch_fused": 2}


def check_launch(args: TrainingArguments) -> None:
    """Raise ValueError for FSDP, and when the launcher's processes did not find each other; say when it started only one."""
    if args.fsdp or os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true":
        raise ValueError(
            "the launcher asks for FSDP, under which these trainers cannot save what they train: to share the model out, "
            "launch with configs/accelerate/zero2.yaml or zero3.yaml"
        )
    if "WORLD_SIZE" not in os.environ and os.environ.keys() >= {"ACCELERATE_MIXED_PRECISION", "MASTER_PORT"}:
        logger.warning(
            "the launcher started one process, although it was told of more: without an accelerator, accelerate starts "
            "several only by a config: --config_file configs/accelerate/ddp.yaml"
        )
    asked = int(os.environ.get("WORLD_SIZE", "1"))
    if asked != args.world_size:
        raise ValueError(
            f"the launcher started {asked} processes, but this one sees a world of {args.world_size}: without an "
            "accelerator, add --use_cpu true --ddp_backend gloo"
        )


def setup_of(model: ModelArguments, args: FlowConfig) -> Setup:
    """The setup of a run, without its activations."""
    plugin = args.deepspeed_plugin
    devices = () if plugin is None else (plugin.offload_param_device, plugin.offload_optimizer_device)
    return Setup(
        stage=zero_stage(args),
        processes=args.world_size,
        dtype=DTYPES[model.dtype].itemsize,
        half=args.bf16 or args.fp16,
        moments=MOMENTS.get(str(getattr(args.optim, "value", args.optim)), 0),
        reference=args.keeps_reference(),
        average=args.whole_copy() is not None,
        offload=model.offload,
        to_host="cpu" in devices or "nvme" in devices,
    )


def check_memory(model: ModelArguments, args: FlowConfig) -> None:
    """Raise ValueError, before a weight is read, when what a run keeps is more than there is memory for.

    Activations are left out: a run that is stopped here could not have fitted. On the CPU weights that are not trained
    count once for all processes, which may map the same files.
    """
    if not args.check_memory:
        return
    from align.models.outline import outline  # imports diffusers

    lora = model.peft_config()
    counts = count(outline(resolve_folder(model.model), lora, adapter=model.use_peft and lora is None))
    setup = setup_of(model, args)
    if args.device.type == "cuda":
        check_fits(counts, setup, torch.cuda.get_device_properties(args.device).total_memory)
    elif args.device.type == "cpu":
        local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        check_fits(counts, setup, psutil.virtual_memory().available, local)
