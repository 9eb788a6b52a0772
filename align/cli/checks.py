"""What the command line checks before a weight is read, and the trainers do not: launcher, memory, backend."""

import logging
import os

import psutil
import torch
from transformers import TrainingArguments

from align.cli.arguments import DTYPES, ModelArguments
from align.engine.settings import FlowConfig
from align.models.loading import nearest
from align.parallel.memory import Counts, Setup, check_fits
from align.parallel.sharding import zero_stage

logger = logging.getLogger(__name__)

#: float32 numbers that an optimizer keeps per trained parameter; one that is not here counts as none.
MOMENTS = {"adamw_torch": 2, "adamw_torch_fused": 2}


def check_launch(args: TrainingArguments) -> None:
    """Raise ValueError for FSDP, and when the launcher's processes did not find each other; warn when there is only one."""
    if args.fsdp or os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true":
        raise ValueError(
            "the launcher asks for FSDP, under which these trainers cannot save what they train: to shard the model, "
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


def check_attention_backend(name: str | None) -> None:
    """Raise ValueError for an attention backend that diffusers does not know."""
    from diffusers.models.attention_dispatch import AttentionBackendName  # imports diffusers: not with the arguments

    known = {backend.value for backend in AttentionBackendName}
    if name is not None and name not in known:
        raise ValueError(f"unknown attention_backend {name!r}." + nearest(name, known))


def setup_of(model: ModelArguments, args: FlowConfig) -> Setup:
    """Return how a run is launched and what it keeps, without its activations."""
    plugin = args.deepspeed_plugin
    devices = () if plugin is None else (plugin.offload_param_device, plugin.offload_optimizer_device)
    return Setup(
        stage=zero_stage(args),
        processes=args.world_size,
        dtype=DTYPES[model.dtype].itemsize,
        half=args.bf16 or args.fp16,
        moments=MOMENTS.get(str(getattr(args.optim, "value", args.optim)), 0),
        reference=args.keeps_reference(),
        average=args.full_copy() is not None,
        offload=model.offload,
        to_host="cpu" in devices or "nvme" in devices,
    )


def check_memory(counts: Counts, model: ModelArguments, args: FlowConfig) -> None:
    """Raise ValueError, before a weight is read, when what a run keeps is more than there is memory for.

    ``counts``: of the model's outline. Activations are left out: a run that is stopped here could not have fitted. On
    the CPU weights that are not trained count once for all processes, which may map the same files.
    """
    if not args.check_memory:
        return
    setup = setup_of(model, args)
    if args.device.type == "cuda":
        check_fits(counts, setup, torch.cuda.get_device_properties(args.device).total_memory)
    elif args.device.type == "cpu":
        processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        check_fits(counts, setup, psutil.virtual_memory().available, processes)
