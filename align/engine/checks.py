"""Whether there is memory for a run, asked before a weight is read."""

import os

import psutil
import torch

from align.engine.settings import FlowConfig
from align.models.families import Deferred
from align.parallel.memory import Setup, check_fits
from align.parallel.sharding import zero_stage

#: float32 numbers that an optimizer keeps per trained parameter; one that is not here counts as none.
MOMENTS = {"adamw_torch": 2, "adamw_torch_fused": 2}


def setup_of(model: Deferred, args: FlowConfig) -> Setup:
    """Return how a run is launched and what it keeps, without its activations."""
    plugin = args.deepspeed_plugin
    devices = () if plugin is None else (plugin.offload_param_device, plugin.offload_optimizer_device)
    return Setup(
        stage=zero_stage(args),
        processes=args.world_size,
        dtype=(model.dtype or torch.float32).itemsize,
        half=args.bf16 or args.fp16,
        moments=MOMENTS.get(str(getattr(args.optim, "value", args.optim)), 0),
        reference=args.keeps_reference(),
        average=args.full_copy() is not None,
        offload=model.offload,
        to_host="cpu" in devices or "nvme" in devices,
    )


def check_memory(model: Deferred, args: FlowConfig) -> None:
    """Raise ValueError, before a weight is read, when what a run keeps is more than there is memory for.

    Activations are left out: a run that is stopped here could not have fitted. On the CPU weights that are not trained
    count once for all processes, which may map the same files. A model that is loaded already is not checked.
    """
    if not args.check_memory or model.dtype is None:
        return
    counts, setup = model.outline.parameter_counts(), setup_of(model, args)
    if args.device.type == "cuda":
        check_fits(counts, setup, torch.cuda.get_device_properties(args.device).total_memory)
    elif args.device.type == "cpu":
        processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        check_fits(counts, setup, psutil.virtual_memory().available, processes)
