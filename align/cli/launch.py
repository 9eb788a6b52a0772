"""From a command line to a finished run: what the trainers' ``main`` functions share."""

import time
from pathlib import Path
from typing import Any

from align.cli.arguments import DTYPES, ModelArguments, parse, plain_errors
from align.cli.checks import check_launch, check_memory
from align.engine import reports
from align.engine.checkpoints import CheckpointError, check_identity
from align.engine.settings import FlowConfig
from align.engine.trainer import FlowTrainer
from align.models.loading import latent_cell, resolve_folder
from align.online.settings import check_data
from align.online.trainer import check_dropout
from align.parallel.sharding import check_zero
from preference_data.buckets import make_buckets
from rewards import load_rewards


def load_model(arguments: ModelArguments) -> Any:
    """The Qwen-Image that the arguments name, with the adapter they name."""
    from align.models.qwen_image import QwenImage  # imports diffusers: not before the arguments are known to be right

    model = QwenImage.from_pretrained(arguments.model, DTYPES[arguments.dtype], arguments.offload)
    if arguments.adapter:
        model.load_adapter(arguments.adapter)
    if arguments.attention_backend is not None:
        model.transformer.set_attention_backend(arguments.attention_backend)
    if arguments.compile_blocks:  # each block on its own, in place: its parameters keep their names
        model.transformer.compile_repeated_blocks()
    return model


def find_checkpoint(trainer_type: type[FlowTrainer], model_args: ModelArguments, args: FlowConfig) -> str | None:
    """The checkpoint to go on from, if any; raises ValueError when it is of another run, as far as that shows yet."""
    folder = args.checkpoint_to_resume()
    if folder is not None:
        algorithm = {"algorithm": trainer_type.algorithm}
        run = {"algorithm": algorithm, **model_args.identity(), "dealing": args.dealing()}
        check_identity(Path(folder), run)
        args.check_batch(Path(folder))
    return folder


def train_and_finish(
    trainer: FlowTrainer, checkpoint: str | None, base_model: str, data: str, settings: dict[str, Any]
) -> None:
    """Train, export, and print what changed and where to look; a signal or a failing reward ends it resumably."""
    args = trainer.args
    stops: tuple[type[Exception], ...] = (*trainer.stops, CheckpointError)
    if checkpoint is None and args.should_save:
        args.clear_earlier_run()
    started = time.perf_counter()
    try:
        trainer.train(resume_from_checkpoint=checkpoint)
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


def run_on_images(data_type: type, config_type: type, trainer_type: type[Any], argv: list[str] | None) -> None:
    """``main`` of a trainer on images; everything that can be known wrong is said before the model is loaded."""
    with plain_errors():
        data, model_args, args = parse((data_type, ModelArguments, config_type), argv)
        rewards, prompts, guards = data.load_samples()
        train, held_out = data.load()
        check_launch(args)
        args.check_evaluation(held_out is not None or prompts is not None)
        check_zero(args, model_args.use_peft)
        model_args.check(args.height, args.width)
        cell = latent_cell(resolve_folder(model_args.model))
        make_buckets(args.bucket_resolution(cell), cell, args.max_aspect_ratio)
        checkpoint = find_checkpoint(trainer_type, model_args, args)
        check_memory(model_args, args)
    with plain_errors():
        model = load_model(model_args)
        trainer = trainer_type(
            model,
            args,
            train,
            held_out,
            rewards=rewards,
            eval_prompts=prompts,
            guard_datasets=guards,
            peft_config=model_args.peft_config(),
            on_bad_row=data.on_bad_row,
        )
    settings = reports.changed_settings(data, model_args, args)
    train_and_finish(trainer, checkpoint, model_args.model, data.dataset_name, settings)


def run_on_groups(data_type: type, config_type: type, trainer_type: type[Any], argv: list[str] | None) -> None:
    """``main`` of a trainer on its own samples; everything that can be known wrong is said before the model is loaded."""
    with plain_errors():
        data, model_args, args = parse((data_type, ModelArguments, config_type), argv)
        rewards = load_rewards(data.rewards)
        train, held_out, guards = data.load()
        check_data(rewards, args, train, held_out, guards)
        check_launch(args)
        args.check_world(args.world_size)
        check_zero(args, model_args.use_peft)
        model_args.check(args.height, args.width)
        check_dropout(model_args.lora_dropout)
        checkpoint = find_checkpoint(trainer_type, model_args, args)
        check_memory(model_args, args)
    with plain_errors():
        model = load_model(model_args)
        trainer = trainer_type(model, rewards, args, train, held_out, guards, peft_config=model_args.peft_config())
    settings = reports.changed_settings(data, model_args, args)
    train_and_finish(trainer, checkpoint, model_args.model, data.dataset_name, settings)
