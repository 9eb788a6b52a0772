"""From a command line to a finished run: what the doors' ``main`` functions share."""

import time
from functools import partial
from pathlib import Path
from typing import Any

import torch

from align.cli.arguments import DTYPES, ModelArguments, parse, plain_errors
from align.engine import reports
from align.engine.checkpoints import CheckpointError
from align.engine.resume import ResumePlan, describe_inputs, is_within, plan_resume, run_identity
from align.engine.settings import FlowConfig, values_of
from align.engine.trainer import FlowTrainer
from align.models import families
from align.models.contract import FlowModel, NotFinite
from align.models.loading import nearest
from preference_data.cache import CacheUnusable


def load_model(arguments: ModelArguments) -> FlowModel:
    """Load the model that the arguments name, with the adapter they name."""
    model: Any = families.load_model(arguments.model, DTYPES[arguments.dtype], arguments.offload)
    if arguments.adapter:
        model.load_adapter(arguments.adapter)
    if arguments.attention_backend is not None:
        model.transformer.set_attention_backend(arguments.attention_backend)
    if arguments.compile_blocks:  # each block on its own, in place: its parameters keep their names
        model.transformer.compile_repeated_blocks()
    return model


def defer_model(arguments: ModelArguments) -> families.Deferred:
    """Build the outline of the model that the arguments name, to check things against before it is loaded."""
    check_attention_backend(arguments.attention_backend)
    outline = families.outline(arguments.model, arguments.peft_config(), arguments.adapter)
    load = partial(load_model, arguments)
    return families.Deferred(outline, load, DTYPES[arguments.dtype], arguments.offload)


def check_attention_backend(name: str | None) -> None:
    """Raise ValueError for an attention backend that diffusers does not know."""
    from diffusers.models.attention_dispatch import AttentionBackendName  # imports diffusers: not with the arguments

    known = {backend.value for backend in AttentionBackendName}
    if name is not None and name not in known:
        raise ValueError(f"unknown attention_backend {name!r}." + nearest(name, known))


def try_attention_backend(arguments: ModelArguments, outline: Any, device: torch.device, half: bool = False) -> None:
    """Raise ValueError when the attention backend lacks its package, or cannot compute on ``device``.

    ``half``: the launcher computes in half precision, whatever the weights are in.
    """
    if arguments.attention_backend is None:
        return
    from diffusers.models.attention_dispatch import AttentionBackendName, attention_backend, dispatch_attention_fn

    dtype = torch.bfloat16 if half else DTYPES[arguments.dtype]
    some = torch.zeros(1, 16, 2, 64, dtype=dtype, device=device)  # batch, tokens, heads, channels
    try:
        with attention_backend(arguments.attention_backend):  # which is the process's, not the model's
            outline.transformer.set_attention_backend(arguments.attention_backend)
            dispatch_attention_fn(some, some, some, backend=AttentionBackendName(arguments.attention_backend))
    except Exception as error:  # every backend has its own types
        raise ValueError(
            f"attention_backend {arguments.attention_backend} cannot be used on {device.type} in {str(dtype)[6:]}: "
            f"{' '.join(str(error).split())}"
        ) from error


def run(data_type: type, config_type: type, trainer_type: type[Any], argv: list[str] | None) -> None:
    """Train from a command line; every mistake that can be detected before the model loads is reported then."""
    with plain_errors():
        door = trainer_type.__module__.rpartition(".")[2]
        data, model_args, args = parse((data_type, ModelArguments, config_type), argv, door)
        inputs = data.load()
        args.fixed_beside, args.free_beside = settings_beside(data, model_args)
        model = defer_model(model_args)
        try_attention_backend(model_args, model.outline, args.device, half=args.bf16 or args.fp16)
        identity = run_identity(trainer_type.algorithm, model.outline.identity(), args, describe_inputs(**inputs))
        plan = plan_resume(args, identity, args.resume_from_checkpoint)
        check_adapter_stays(model_args.adapter, args, plan)
        trainer = trainer_type(model, args=args, peft_config=model_args.peft_config(), **inputs)
        del inputs  # the trainer keeps what it needs of them
    settings = reports.changed_settings(data, model_args, args)
    train_and_finish(trainer, plan, model_args.model, data.dataset_name, settings)


def check_adapter_stays(adapter: str | None, args: FlowConfig, plan: ResumePlan) -> None:
    """Raise ValueError for an adapter in ``output_dir``, which a run that starts afresh clears."""
    if adapter is not None and plan.folder is None and is_within(adapter, args.output_dir):
        raise ValueError(
            f"the adapter {adapter} lies in output_dir {args.output_dir}, which a new run clears: pass another --output_dir"
        )


def settings_beside(data: Any, model: ModelArguments) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the settings of data and model that a resume must not change, and those of the data that it may.

    The rewards are not among them: an entry may hold a password.
    """
    fixed = values_of(data, fixed_on_resume=True) | values_of(model, fixed_on_resume=True)
    free = values_of(data, fixed_on_resume=False)
    del free["rewards"]
    return fixed, free


def train_and_finish(
    trainer: FlowTrainer, plan: ResumePlan, base_model: str, data: str, settings: dict[str, Any]
) -> None:
    """Train, export, and print what changed and where to look; a signal or a failing reward ends it resumably."""
    args = trainer.args
    stops: tuple[type[Exception], ...] = (*trainer.stops, CheckpointError, NotFinite, CacheUnusable)
    started = time.perf_counter()
    try:
        trainer.train(resume_from_checkpoint=plan)
        if trainer.interrupted:
            if trainer.is_world_process_zero():
                last = f"{args.output_dir}/checkpoint-{trainer.state.global_step}"
                print(f"interrupted; go on with: --resume_from_checkpoint {last}")
            return
        table = trainer.finish(base_model, data, settings)
    except stops as error:
        raise SystemExit(f"stopped at update {trainer.state.global_step}: {error}") from error
    finally:
        for reward in trainer.rewards:
            reward.close()
    if trainer.is_world_process_zero():
        print(f"\n{table}\n\n{trainer.state.global_step} updates in {time.perf_counter() - started:.0f} s; look at:")
        for path in sorted(p for p in Path(args.output_dir).iterdir() if p.suffix in (".png", ".md")):
            print(f"  {path}")
