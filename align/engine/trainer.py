"""What the trainers share: ``transformers.Trainer`` over the denoiser of a :class:`~align.models.contract.FlowModel`.

Checkpoints hold what is trained and nothing else; the run folder ends with weights that stock diffusers loads.
"""

import logging
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from datasets import Dataset
from peft import PeftConfig
from safetensors.torch import save_file
from torch import Tensor
from transformers import Trainer, TrainerCallback, set_seed

from align.engine import checkpoints, reports
from align.engine.metrics import RunMetrics
from align.engine.settings import FlowConfig
from align.engine.signals import InterruptCallback
from align.engine.weights import EMACallback, load_trained, read_trained, trained_parameters
from align.models.contract import FlowModel
from align.parallel.resharding import deal_anew
from align.parallel.sharding import (
    Sharding,
    check_zero,
    keep_models_whole,
    leave_out_frozen,
    load_engine,
    moved_from,
    share_out_frozen,
    whole_state,
    zero_stage,
)
from align.sampling.held_out import check_columns, evaluate_prompts
from rewards import Reward, RewardError
from rewards.weights import shown

logger = logging.getLogger(__name__)

WEIGHTS = "model.safetensors"


def rows_as_they_are(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Data collator: a batch is a list of data rows."""
    return rows


class FlowTrainer(Trainer):
    """A Trainer whose model is a flow model's transformer.

    Args:
        model: the flow model; its transformer is what is trained.
        args: training arguments.
        rewards: score the held-out samples; see :func:`rewards.load_rewards`.
        eval_prompts: held-out prompts to sample: logged as ``eval_reward`` and ``eval_NAME``, and drawn on the grid.
        guard_datasets: further held-out prompts, watched for damage; logged as ``eval_GUARD_NAME``.
        peft_config: attach this fresh adapter and train it. Without one, an adapter already loaded goes on, and a
            model without any is fine-tuned whole.
    """

    args: FlowConfig
    control: Any
    #: On the model card.
    algorithm = "flow matching"
    #: What the seconds of a run are counted for.
    phases: tuple[str, ...] = ("data", "update")
    #: Errors that end a run with a checkpoint to resume from.
    stops: tuple[type[Exception], ...] = (RewardError,)

    def __init__(
        self,
        model: FlowModel,
        args: FlowConfig,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        rewards: list[Reward] | None = None,
        eval_prompts: Dataset | None = None,
        guard_datasets: dict[str, Dataset] | None = None,
        peft_config: PeftConfig | None = None,
        callbacks: list[TrainerCallback] | None = None,
    ) -> None:
        self.rewards, self.eval_prompts, self.guard_datasets = rewards or [], eval_prompts, guard_datasets or {}
        prompts = [*([] if eval_prompts is None else [eval_prompts]), *self.guard_datasets.values()]
        check_columns(self.rewards, prompts)
        model.latent_shape(args.height, args.width)
        self.flow = model
        self.metrics = RunMetrics(self.phases)
        self.resumed_from: str | None = None
        self._moved_from: Sharding | None = None  # what wrote the checkpoint, where this run is shared out otherwise
        self._dealt: list[str] = []  # what is trained, in the order of the optimizer
        self._writing_into: str | None = None
        self.interrupt = InterruptCallback()
        if peft_config is not None and model.adapter:
            raise ValueError("the model has an adapter already: give no peft_config, or load the model without it")
        check_zero(args, peft_config is not None or model.adapter)
        set_seed(args.seed)  # before the adapter's initial weights are drawn, on every process alike
        dead = model.add_lora(peft_config) if peft_config is not None else [] if model.adapter else model.unfreeze()
        if dead and args.process_index == 0:
            logger.warning("not trained, because no gradient can reach them: %s", ", ".join(dead))
        transformer = cast(Any, model.transformer)
        # What transformers calls by these names, diffusers has by others.
        transformer.activation_checkpointing_enable = lambda **_: transformer.enable_gradient_checkpointing()
        transformer.config.to_json_string = transformer.to_json_string
        super().__init__(
            model=model.transformer,
            args=args,
            data_collator=rows_as_they_are,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset if eval_dataset is not None else eval_prompts,
            callbacks=[self.interrupt, *(callbacks or [])],
        )
        keep_models_whole()  # said again by the Trainer
        if self.is_deepspeed_enabled and not args.optim.startswith("adam"):
            # Where the optimizer is offloaded, accelerate would otherwise put DeepSpeed's Adam in place of any other.
            self.accelerator.state.deepspeed_plugin.deepspeed_config["zero_force_ds_cpu_optimizer"] = False
        model.device = self.accelerator.device
        self._time_backward()
        self.ema = EMACallback(self) if args.ema_decay else None
        if self.ema:
            self.add_callback(self.ema)

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> Any:
        wanted, say = resume_from_checkpoint, self.is_world_process_zero()
        folder = checkpoints.find(str(self.args.output_dir), wanted, say) if wanted else None
        self.resumed_from, self._moved_from = None if folder is None else str(folder), None
        checkpoints.check_agreed(self.resumed_from)
        if folder is not None:
            checkpoints.check_identity(folder, self.identity())
            self.args.check_batch(folder)
            self._moved_from = moved_from(folder, self.args, say)
        if self.ema:
            self.ema.resumed_from = self.resumed_from
        try:
            with self.metrics.models.attached(self.flow.parts()):
                return super().train(resume_from_checkpoint=self.resumed_from, **kwargs)
        except self.stops:
            if self.state.global_step:  # nothing is lost: all updates up to here can be resumed from
                self._save_checkpoint(self.model_wrapped, trial=None)
            raise
        finally:
            self.interrupt.restore()

    @property
    def interrupted(self) -> bool:
        """Whether a signal ended the run early."""
        return self.interrupt.stopped

    def trained_parameters(self) -> dict[str, torch.nn.Parameter]:
        """Name to parameter, for everything that is trained."""
        return trained_parameters(self.model)

    @property
    def in_step(self) -> bool:
        """Whether a forward waits for other processes', or, of shared-out weights, must come before every backward."""
        return self.args.world_size > 1 or zero_stage(self.args) == 3

    def trained_state(self) -> dict[str, Tensor]:
        """A copy on the CPU of everything that is trained; called on every process, and empty but on those that save."""
        return whole_state(self.trained_parameters(), keep=self.args.should_save)

    def averaged_weights(self) -> Any:
        """Context in which the model carries the moving average, if the run keeps one."""
        return self.ema.applied() if self.ema else nullcontext()

    # -- logging and held-out samples -------------------------------------------------------------------------------

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        with self.metrics.timed("update"):
            return super().training_step(*args, **kwargs)

    def _time_backward(self) -> None:
        """The Trainer has no hook around the backward, which is the launcher's to run."""
        backward = self.accelerator.backward

        def timed(loss: Tensor, **kwargs: Any) -> None:
            with self.metrics.models.timed("backward"):
                backward(loss, **kwargs)

        self.accelerator.backward = timed

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:  # a training log; it comes on all processes
            logs.update(self.metrics.drain())
        super().log(logs, start_time)

    def count_forwards(self, rows: int, trained: bool, guided: bool = False) -> None:
        """Add ``rows`` transformer forwards to ``forward_equivalents``; trained ones with backward and recompute."""
        cost = 1 if not trained else 4 if self.args.activation_checkpointing else 3
        self.metrics.forward_equivalents += rows * cost * (2 if guided else 1)

    def evaluate_samples(self, prompts: Dataset | None, prefix: str = "eval") -> dict[str, float]:
        """Sample held-out prompts and guards by the ODE, score them, write grid and scores of this update to disk."""
        args = self.args
        metrics: dict[str, float] = {}
        rows: list[dict[str, Any]] = []
        named = {} if prompts is None else {prefix: prompts}
        named |= {f"{prefix}_{name}": data for name, data in self.guard_datasets.items()}
        for name, dataset in named.items():
            if not self.rewards:  # nothing to score: the grid alone
                dataset = dataset.select(range(min(len(dataset), args.num_grid_prompts)))
            result = evaluate_prompts(
                self.flow,
                self.rewards,
                dataset,
                args.eval_plan(),
                seed=args.eval_seed,
                samples=args.num_generations_eval,
                prefix=name,
                transformer=self.model_wrapped,
                process=(args.process_index, args.world_size),
                keep_images_of=args.num_grid_prompts if name == prefix else 0,
                max_failed_fraction=args.max_failed_fraction,
            )
            metrics |= result.metrics
            rows += result.rows
            if result.images and args.should_save:
                reports.save_grid(result.images, Path(args.output_dir), self.state.global_step)
        if rows and args.should_save:
            reports.save_scores(rows, Path(args.output_dir), self.state.global_step)
        return metrics

    def held_out_metrics(self, eval_dataset: Any, prefix: str) -> dict[str, float]:
        """What :meth:`evaluate` measures: here the samples of held-out prompts, ``eval_dataset`` or the trainer's."""
        return self.evaluate_samples(eval_dataset if eval_dataset is not None else self.eval_prompts, prefix)

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Measure and log, with the moving average of the weights if there is one."""
        with self.averaged_weights(), self.metrics.paused():
            metrics = self.held_out_metrics(eval_dataset, metric_key_prefix)
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    # -- checkpoints: what is trained, in safetensors ---------------------------------------------------------------

    def identity(self) -> dict[str, dict[str, Any]]:
        """What a checkpoint of this run belongs to."""
        return {"algorithm": {"algorithm": self.algorithm}, **self.flow.identity(), "dealing": self.args.dealing()}

    def save_progress(self, folder: Path) -> None:
        """Write into a checkpoint what else an algorithm needs to go on; called on every process."""

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        args, state, run_folder = self.args, self.state, Path(str(self.args.output_dir))
        final = run_folder / f"checkpoint-{state.global_step}"
        best = str(run_folder / f"checkpoint-{state.best_global_step}") if state.best_global_step else None
        whole = checkpoints.written_whole(final, self.identity(), args.should_save, args.save_total_limit, best)
        with self.metrics.paused(), whole as folder:
            self._writing_into = str(folder.parent)
            try:
                super()._save_checkpoint(model, trial)
            finally:
                self._writing_into = None
            self.save_progress(folder)
            if best and args.should_save:  # where it will be, not where it is being written
                state.best_model_checkpoint = best
                state.save_to_json(str(folder / "trainer_state.json"))

    def _get_output_dir(self, trial: Any) -> str:
        return self._writing_into or super()._get_output_dir(trial)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write what is trained, and nothing else of the model, gathered if it is shared out."""
        self._save(output_dir, self.trained_state())

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        if not self.args.should_save:
            return
        folder = Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        assert state_dict is not None
        state = state_dict
        save_file(state, folder / WEIGHTS, metadata={"format": "pt"})
        if self.ema:
            self.ema.save(folder)
        if self.flow.adapter:  # so that every checkpoint can be tried in stock diffusers
            self.flow.save(str(folder), state)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.is_deepspeed_enabled and self.args.should_save:
            Sharding.of(self.args).write(Path(output_dir))

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: str | None) -> Any:
        if not self.is_deepspeed_enabled:
            return super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        if resume_from_checkpoint is not None:  # dealt anew, they are loaded before the engine shares them out
            read = read_trained if self._moved_from is None else load_trained
            read(self.trained_parameters(), Path(resume_from_checkpoint) / WEIGHTS)
        prepared = super()._prepare_for_training(max_steps, train_dataloader, None)
        leave_out_frozen(self.model_wrapped)
        if zero_stage(self.args) == 3:
            self.flow.share_reference(partial(share_out_frozen, args=self.args))
        if resume_from_checkpoint is not None:
            # Not by the Trainer: it would miss the frozen weights, which our checkpoints leave out.
            if self._moved_from is None:
                load_engine(self.model_wrapped, Path(resume_from_checkpoint))
            self._load_optimizer_and_scheduler(resume_from_checkpoint)
        return prepared

    def create_optimizer(self, model: torch.nn.Module | None = None) -> torch.optim.Optimizer:
        fresh = self.optimizer is None
        optimizer = super().create_optimizer(model)
        if fresh:
            names = {parameter: name for name, parameter in self.model.named_parameters()}
            self._dealt = [names[parameter] for group in optimizer.param_groups for parameter in group["params"]]
        return optimizer

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None or self._moved_from is None:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        trained = self.trained_parameters()
        ordered = {name: trained[name] for name in self._dealt}
        engine = self.model_wrapped if self.is_deepspeed_enabled else None
        deal_anew(Path(checkpoint), self._moved_from, ordered, self.optimizer, self.lr_scheduler, engine)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: torch.nn.Module | None = None) -> None:
        load_trained(self.trained_parameters(), Path(resume_from_checkpoint) / WEIGHTS)

    def export(self) -> None:
        """Write to ``output_dir`` what stock diffusers loads: the LoRA, or the whole transformer."""
        # A full fine-tune's folder holds what no gradient reaches too.
        saved = self.trained_parameters() if self.flow.adapter else dict(self.model.named_parameters())
        with self.averaged_weights():
            state = whole_state(saved, keep=self.args.should_save)
            if self.args.should_save:
                self.flow.save(self.args.output_dir, state)
                checkpoints.usual_modes(Path(str(self.args.output_dir)).rglob("*.safetensors"))

    def finish(self, base_model: str, data: str, settings: dict[str, Any] | None = None) -> str:
        """Export the weights, write the pictures and the model card; returns the table of held-out changes.

        ``base_model`` and ``data`` are the names on the card; ``settings`` what it says of the config.
        """
        self.export()  # first: nothing below may lose what was trained
        evaluated = [entry["step"] for entry in self.state.log_history if any(k.startswith("eval_") for k in entry)]
        if self.eval_dataset is not None and evaluated[-1:] != [self.state.global_step]:
            self.evaluate()
        history, folder = self.state.log_history, Path(self.args.output_dir)
        if self.is_world_process_zero():
            self.state.save_to_json(str(folder / "trainer_state.json"))
            reports.write_run_folder(
                folder,
                history,
                algorithm=self.algorithm,
                base_model=base_model,
                lora=self.flow.adapter,
                data=data,
                rewards=[f"{reward.name} (weight {shown(reward.weight)})" for reward in self.rewards],
                settings=settings if settings is not None else reports.changed_settings(self.args),
            )
        self.accelerator.wait_for_everyone()
        return reports.changes_table(history, reports.paired_errors(folder))
