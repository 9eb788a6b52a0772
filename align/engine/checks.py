"""Whether a run can work where it is started, asked before a weight is read: its folder, its logs, optimizer, memory."""

import math
import os
import sys
import tempfile
from copy import copy
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import huggingface_hub
import psutil
import torch
from transformers import Trainer
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK
from transformers.optimization import get_scheduler

from align.engine.settings import FlowConfig
from align.models.families import Deferred
from align.models.loading import nearest
from align.parallel.memory import Setup, check_fits
from align.parallel.sharding import zero_stage
from rewards.redaction import foreign

#: float32 numbers that an optimizer keeps per trained parameter; one that is not here counts as none.
MOMENTS = {"adamw_torch": 2, "adamw_torch_fused": 2}
#: What ``report_to`` names, to the module that it needs and the package to install, where they are not called the same.
PACKAGES = {
    "azure_ml": ("azureml", "azureml-core"),
    "comet_ml": ("comet_ml", "comet-ml"),
    "flyte": ("flytekit", "flytekit"),
    "kubeflow": ("", ""),
}


def check_run(args: FlowConfig) -> None:
    """Raise ValueError when the run's folder, its logs, the hub, its optimizer or its schedule cannot be had."""
    if args.should_save:
        check_writable(str(args.output_dir))
    for name in args.report_to:
        check_report(name, asks=args.process_index == 0)
    if args.push_to_hub:
        check_hub(args.hub_token)
    check_optimizer(args)


def check_writable(output_dir: str) -> None:
    """Raise ValueError when nothing can be written to ``output_dir``, which need not be there yet; none is left there."""
    folder = Path(output_dir).expanduser()
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    if not folder.is_dir():
        raise ValueError(f"output_dir {output_dir} cannot be a folder: {folder} is a file. Pass another --output_dir")
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"\0")
    except OSError as error:
        raise ValueError(
            f"output_dir {output_dir} cannot be written ({error.strerror or error}): pass another --output_dir"
        ) from error


def check_report(name: str, asks: bool = True) -> None:
    """Raise ValueError when ``report_to`` names what is not installed, or wandb, which is not logged in and not offline.

    ``asks``: on a terminal wandb may ask for its key now.
    """
    if name not in INTEGRATION_TO_CALLBACK:
        raise ValueError(f"report_to {name!r} is unknown." + nearest(name, INTEGRATION_TO_CALLBACK.keys()))
    module, package = PACKAGES.get(name, (name, name))
    modules = ("tensorboard", "tensorboardX") if name == "tensorboard" else (module,)
    if module and all(find_spec(one) is None for one in modules):
        raise ValueError(
            f"report_to {name} needs the package {package}, which is not installed: pip install {package}, or leave it out"
        )
    if name == "wandb" and asks:
        _check_wandb()


def _check_wandb() -> None:
    import wandb

    if os.environ.get("WANDB_MODE") in ("offline", "dryrun", "disabled") or wandb.run is not None:
        return
    try:
        logged_in = wandb.login(prompt=sys.stdin is not None and sys.stdin.isatty(), verify=False)
    except (TypeError, wandb.errors.Error):
        logged_in = bool(os.environ.get("WANDB_API_KEY"))
    if not logged_in and wandb.setup().settings.mode in ("online", "run", None):
        raise ValueError(
            "report_to wandb is not logged in: run `wandb login`, set WANDB_API_KEY, set WANDB_MODE=offline, or leave it out"
        )


def check_hub(token: str | None) -> None:
    """Raise ValueError when push_to_hub cannot reach the hub, or not as anybody."""
    if huggingface_hub.constants.HF_HUB_OFFLINE:
        raise ValueError("push_to_hub is asked for and HF_HUB_OFFLINE is set: leave one of them out")
    if not (token or huggingface_hub.get_token()):
        raise ValueError("push_to_hub needs a token: run `hf auth login`, set HF_TOKEN, or leave it out")
    hub = huggingface_hub.HfApi(token=token)
    try:
        hub.whoami()
    except Exception as error:  # the hub's own errors, and those of an HTTP library that differs with its version
        what = foreign(" ".join(str(error).split()), token, longest=200)
        raise ValueError(
            f"push_to_hub is asked for, and {hub.endpoint} does not say whose token it is: {what}. Leave it out, or try again"
        ) from error


def check_optimizer(args: FlowConfig) -> None:
    """Raise ValueError when optimizer or schedule cannot be built, by building them for one small layer.

    An optimizer that takes some layers alone (optim_target_modules) is left to the model, and DeepSpeed's to DeepSpeed.
    """
    if args.deepspeed_plugin is not None or args.optim_target_modules is not None:
        return
    layer = torch.nn.Linear(2, 2).to(args.device)
    try:
        kind, settings = Trainer.get_optimizer_cls_and_kwargs(args, layer)
        changed = not args.optim_args or settings != _settings_alone(args, layer)
        if isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer):
            optimizer = kind(layer.parameters(), **settings)
        else:  # a factory takes the model
            optimizer = kind()(layer, **settings)
    except Exception as error:  # every optimizer has its own types
        ways_out = " (adamw_torch needs no other package; optim_args are NAME=VALUE, with commas between)"
        raise ValueError(_not_built(args, ("optim", "optim_args"), error) + ways_out) from error
    if not changed:
        raise ValueError(
            f"optim_args {args.optim_args} change nothing: optim {_plain(args.optim)} does not read them, or they are its "
            "defaults. Its betas, epsilon and weight decay are adam_beta1, adam_beta2, adam_epsilon and weight_decay"
        )
    try:
        rates = _first_rates(args, optimizer)
    except Exception as error:
        raise ValueError(_not_built(args, ("lr_scheduler_type", "lr_scheduler_kwargs"), error)) from error
    if not all(math.isfinite(rate) and rate >= 0 for rate in rates):
        raise ValueError(
            f"lr_scheduler_type {_plain(args.lr_scheduler_type)}, lr_scheduler_kwargs {args.lr_scheduler_kwargs} give "
            f"learning rates {rates}: they must be finite and not negative"
        )


def _settings_alone(args: FlowConfig, layer: torch.nn.Module) -> dict[str, Any] | None:
    """Return the optimizer's settings without ``optim_args``; None if it cannot do without."""
    without = copy(args)
    without.optim_args = None
    try:
        return Trainer.get_optimizer_cls_and_kwargs(without, layer)[1]
    except (ValueError, KeyError, AttributeError, TypeError):
        return None


def _first_rates(args: FlowConfig, optimizer: torch.optim.Optimizer, count: int = 3) -> list[float]:
    """Return the learning rates of the first updates, and of the last if it is known when that will be."""
    steps = args.max_steps if args.max_steps > 0 else 1000  # with epochs it depends on the data
    schedule = get_scheduler(
        args.lr_scheduler_type,
        optimizer=optimizer,
        num_warmup_steps=args.get_warmup_steps(steps),
        num_training_steps=steps,
        scheduler_specific_kwargs=args.lr_scheduler_kwargs,
    )
    if isinstance(schedule, torch.optim.lr_scheduler.LambdaLR):
        taken = [*range(min(count, steps)), steps - 1]
        return [args.learning_rate * factor(step) for factor in schedule.lr_lambdas for step in taken]
    return [args.learning_rate]


def _plain(value: Any) -> Any:
    """Return an enum's value."""
    return getattr(value, "value", value)


def _not_built(args: FlowConfig, names: tuple[str, ...], error: Exception) -> str:
    shown = ", ".join(f"{name} {_plain(getattr(args, name))}" for name in names if getattr(args, name) is not None)
    return f"{shown} cannot be built: {' '.join(str(error).split()) or type(error).__name__}"


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
