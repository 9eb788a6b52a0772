"""What the trainers share: ``transformers.Trainer`` over the denoiser of a :class:`~align.models.contract.FlowModel`.

Its checkpoints: align/engine/saving.py. The run folder ends with weights that stock diffusers loads.
"""

import logging
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import PeftConfig
from torch import Tensor
from transformers import TrainerCallback, set_seed

from align.engine import checkpoints, reports, trackers
from align.engine.checks import check_memory, check_run
from align.engine.metrics import RunMetrics
from align.engine.resume import ResumePlan, clear_earlier_run, describe_inputs, is_within, plan_resume, run_identity
from align.engine.saving import CheckpointingTrainer, HandedOn
from align.engine.settings import FlowConfig
from align.engine.signals import InterruptCallback
from align.engine.weights import EMACallback, FiniteCallback
from align.maths.losses import LossResult
from align.models.contract import FlowModel, NotFinite
from align.models.families import Deferred
from align.models.loading import EMBEDDED, nearest
from align.models.trained import without_dropout
from align.parallel.sharding import check_zero, gathered_state, keep_zero3_from_loading, zero_stage
from align.sampling.held_out import as_prompts, check_columns, evaluate_prompts
from preference_data.account import Account
from preference_data.cache import CacheUnusable
from rewards import Reward, RewardError, load_rewards
from rewards.weights import shown

logger = logging.getLogger(__name__)

#: A loaded model, its name, or one that is loaded once everything has been checked.
ModelSource = FlowModel | str | Deferred


class NotMeasured(RuntimeError):
    """The measure by which the best checkpoint is chosen is not among the held-out ones."""


def rows_as_they_are(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Collate a batch as the list of its data rows."""
    return rows


class FlowTrainer(CheckpointingTrainer):
    """A Trainer whose model is a flow model's transformer.

    Args:
        model: the flow model, its name, or a :class:`~align.models.families.Deferred` one, loaded after all checks.
        args: training arguments.
        rewards: score the held-out samples; what :func:`rewards.load_rewards` takes.
        eval_prompts: held-out prompts to sample: logged as ``eval_reward`` and ``eval_NAME``, and drawn on the grid.
        guard_datasets: further held-out prompts, watched for damage; logged as ``eval_GUARD_NAME``.
        peft_config: attach this fresh adapter and train it. Without one, an adapter already loaded is trained further,
            and a model without any is fine-tuned as a whole.
    """

    control: Any
    #: On the model card.
    algorithm = "flow matching"
    #: What the seconds of a run are counted for.
    phases: tuple[str, ...] = ("data", "update")
    #: Errors that end a run with a checkpoint to resume from.
    stops: tuple[type[Exception], ...] = (RewardError, NotMeasured)

    def __init__(
        self,
        model: ModelSource,
        args: FlowConfig,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        rewards: list[Any] | None = None,
        eval_prompts: Dataset | list[dict[str, Any]] | None = None,
        guard_datasets: dict[str, Any] | None = None,
        peft_config: PeftConfig | None = None,
        callbacks: list[TrainerCallback] | None = None,
    ) -> None:
        self.rewards: list[Reward] = load_rewards(rewards) if rewards else []
        eval_prompts = None if eval_prompts is None else as_prompts(eval_prompts, "held-out prompts")
        guard_datasets = {name: as_prompts(rows, f"guard {name}") for name, rows in (guard_datasets or {}).items()}
        self.eval_prompts, self.guard_datasets = eval_prompts, guard_datasets
        prompts = [] if eval_prompts is None else [eval_prompts]
        check_columns(self.rewards, [*prompts, *self.guard_datasets.values()])
        check_run(args)
        self.check_data(args, train_dataset)
        args.check_evaluation(eval_prompts is not None or eval_dataset is not None)
        args.check_best(eval_prompts is not None and bool(self.rewards), eval_dataset is not None)
        self.inputs = describe_inputs(train_dataset, self.rewards, eval_dataset, eval_prompts, guard_datasets)
        deferred = Deferred.of(model, peft_config)
        deferred.outline.latent_shape(args.height, args.width)
        check_zero(args, peft_config is not None or deferred.outline.adapter)
        check_memory(deferred, args)
        self.flow = model = deferred.load()
        self.metrics, self.handed_on = RunMetrics(self.phases), HandedOn()
        self.told: list[str] = []
        self.interrupt, self.finite = InterruptCallback(), FiniteCallback(model.transformer)
        if peft_config is not None and model.adapter:
            raise ValueError("the model has an adapter already: give no peft_config, or load the model without it")
        set_seed(args.seed)  # before the adapter's initial weights are drawn, on every process alike
        dead: list[str] = []
        if peft_config is not None:
            dead = model.add_lora(peft_config)
        elif not model.adapter:
            dead = model.unfreeze()
        if dead and args.process_index == 0:
            logger.warning("not trained, because no gradient can reach them: %s", ", ".join(dead))
        super().__init__(
            model=model.transformer,
            args=args,
            data_collator=rows_as_they_are,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset if eval_dataset is not None else eval_prompts,
            callbacks=[self.finite, self.interrupt, *(callbacks or [])],
        )
        keep_zero3_from_loading()  # once more: the Trainer has set it again
        if self.is_deepspeed_enabled and not args.optim.startswith("adam"):
            # Where the optimizer is offloaded, accelerate would otherwise put DeepSpeed's Adam in place of any other.
            self.accelerator.state.deepspeed_plugin.deepspeed_config["zero_force_ds_cpu_optimizer"] = False
        model.device = self.accelerator.device
        for name, prompts_of_run in {"held-out prompts": eval_prompts, **self.guard_datasets}.items():
            if prompts_of_run is not None:
                self.tell_of_prompts(prompts_of_run, name, always=False)
        self.ema = EMACallback(self) if args.ema_decay else None
        if self.ema:
            self.add_callback(self.ema)

    # -- what an algorithm says -------------------------------------------------------------------------------------

    def check_data(self, args: Any, train_dataset: Any) -> None:
        """Raise ValueError for training data that cannot work; called before the model is loaded."""

    def loss(self, model: torch.nn.Module, batch: Any) -> LossResult:
        """Return the loss of a micro-batch; ``model`` is the launcher's wrapper of the transformer."""
        raise NotImplementedError

    # -- the run ----------------------------------------------------------------------------------------------------

    def train(self, resume_from_checkpoint: str | bool | ResumePlan | None = None, **kwargs: Any) -> Any:
        """Train; ``resume_from_checkpoint``: a folder, True for the last one in output_dir, or a plan made before."""
        plan = resume_from_checkpoint
        if not isinstance(plan, ResumePlan):
            plan = plan_resume(self.args, self.identity(), plan)
        self.handed_on.resume = plan
        if self.args.should_save and (plan.folder is None or not is_within(plan.folder, self.args.output_dir)):
            clear_earlier_run(str(self.args.output_dir), keep_samples=bool(self.state.log_history))
        if self.ema:
            self.ema.resumed_from = plan.folder
        try:
            named = trackers.named_run(self.args, resumed=plan.folder is not None)
            with named, self.metrics.models.attached(self.flow.timed_modules()):
                return super().train(resume_from_checkpoint=plan.folder and str(plan.folder), **kwargs)
        except (NotFinite, CacheUnusable) as error:  # what is in memory is not worth a checkpoint, or others would wait
            good = checkpoints.last_good(Path(str(self.args.output_dir)))
            raise type(error)(
                f"{error}: " + (f"the last good checkpoint is {good}" if good else "there is no checkpoint")
            ) from error
        except self.stops:
            if self.state.global_step:  # nothing is lost: all updates up to here can be resumed from
                self._save_checkpoint(self.model_wrapped, trial=None)
            raise
        finally:
            self.interrupt.restore()

    @property
    def resumed_from(self) -> Path | None:
        """The checkpoint that the run went on from."""
        return self.handed_on.resume.folder

    @property
    def interrupted(self) -> bool:
        """Whether a signal ended the run early."""
        return self.interrupt.stopped

    @property
    def in_step(self) -> bool:
        """Whether processes wait for each other's forwards, or, with sharded weights, for one before every backward."""
        return self.args.world_size > 1 or zero_stage(self.args) == 3

    def averaged_weights(self) -> Any:
        """Enter a context in which the model carries the moving average, if the run keeps one."""
        return self.ema.applied() if self.ema else nullcontext()

    def compute_loss(
        self, model: torch.nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Tensor:
        """Return :meth:`loss` of a micro-batch, and log what it says."""
        result = self.loss(model, inputs)
        self.finite.note(result.loss)
        self.metrics.record(**result.metrics)
        self.metrics.models.begin("backward")  # the Trainer runs it as soon as this returns, and has no hook around it
        return result.loss

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        with self.metrics.timed("update"):
            loss = super().training_step(*args, **kwargs)
            self.metrics.models.end("backward")
            return loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:  # a training log; it comes on all processes
            logs.update(self.metrics.drain())
        super().log(logs, start_time)

    def count_forwards(self, rows: int, trained: bool, guided: bool = False) -> None:
        """Add ``rows`` transformer forwards to ``forward_equivalents``; trained ones with backward and recompute."""
        cost = 1
        if trained:
            cost = 4 if self.args.activation_checkpointing else 3
        self.metrics.forward_equivalents += rows * cost * (2 if guided else 1)

    def tell(self, lines: list[str]) -> None:
        """Show what the data are, on the console and on the model card."""
        if self.args.process_index == 0:
            logger.warning("%s", "\n  ".join(lines))
            self.told += lines

    def tell_of_prompts(self, prompts: Dataset, what: str, always: bool = True) -> None:
        """Say how many prompts there are, and of how many the model reads only the beginning; ``always``: even of none."""
        if self.args.process_index == 0:
            account = Account(what, examples=len(prompts))
            for prompt in dict.fromkeys(prompts["prompt"]):
                account.count_tokens(*self.flow.prompt_tokens(prompt))
            if always or account.cut:
                self.tell(account.lines())

    # -- held-out samples -------------------------------------------------------------------------------------------

    def evaluate_samples(self, prompts: Dataset | None, prefix: str = "eval") -> dict[str, float]:
        """Sample held-out prompts and guards by the ODE, score them, write grid and scores of this update to disk."""
        args = self.args
        metrics: dict[str, float] = {}
        rows: list[dict[str, Any]] = []
        grid: Path | None = None
        if not self.rewards and not args.num_grid_prompts:
            return metrics
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
                step=self.state.global_step,
            )
            metrics |= result.metrics
            rows += result.rows
            if result.images and args.should_save:
                grid = reports.save_grid(result.images, Path(args.output_dir), self.state.global_step)
        if rows and args.should_save:
            reports.save_scores(rows, Path(args.output_dir), self.state.global_step)
        if args.should_save:
            trackers.show_samples(self.callback_handler.callbacks, self.state.global_step, grid, rows)
        return metrics

    def held_out_metrics(self, eval_dataset: Any, prefix: str) -> dict[str, float]:
        """Return what :meth:`evaluate` measures: here samples of held-out prompts, ``eval_dataset`` or the trainer's."""
        return self.evaluate_samples(eval_dataset if eval_dataset is not None else self.eval_prompts, prefix)

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Measure and log, with the moving average of the weights if there is one."""
        with self.averaged_weights(), self.metrics.paused(), without_dropout(self.flow.transformer):
            metrics = self.held_out_metrics(eval_dataset, metric_key_prefix)
        wanted = self.args.metric_for_best_model
        if metric_key_prefix == "eval" and wanted is not None and f"eval_{wanted.removeprefix('eval_')}" not in metrics:
            raise NotMeasured(f"metric_for_best_model {wanted!r} is not measured." + nearest(wanted, metrics.keys()))
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def identity(self) -> dict[str, dict[str, Any]]:
        """Return what a checkpoint of this run belongs to."""
        return run_identity(self.algorithm, self.flow.identity(), self.args, self.inputs)

    # -- the end ----------------------------------------------------------------------------------------------------

    def export(self) -> None:
        """Write to ``output_dir`` what stock diffusers loads: the LoRA, or the whole transformer."""
        # A full fine-tune's folder holds what no gradient reaches too.
        saved = self.trained_parameters() if self.flow.adapter else dict(self.model.named_parameters())
        with self.averaged_weights():
            state = gathered_state(saved, keep=self.args.should_save)
            if self.args.should_save:
                self.flow.save(self.args.output_dir, state)
                checkpoints.usual_modes(Path(str(self.args.output_dir)).rglob("*.safetensors"))

    def finish(self, base_model: str, data: str, settings: dict[str, Any] | None = None) -> str:
        """Export the weights, write the pictures and the model card; return the table of held-out changes.

        ``base_model`` and ``data`` are the names on the card; ``settings`` what it says of the config.
        """
        self.export()  # first: nothing below may lose what was trained
        evaluated = [entry["step"] for entry in self.state.log_history if any(k.startswith("eval_") for k in entry)]
        best = self.handed_on.best
        if self.eval_dataset is not None and best is None and evaluated[-1:] != [self.state.global_step]:
            self.evaluate()
        history, folder = self.state.log_history, Path(self.args.output_dir)
        if self.is_world_process_zero():
            self.state.save_to_json(str(folder / "trainer_state.json"))
            reports.write_run_folder(
                folder,
                history,
                algorithm=self.algorithm,
                base_model=base_model,
                base_on_hub=base_model not in EMBEDDED,
                loading_code=self.flow.loading_code(base_model, "THIS_FOLDER"),
                lora=self.flow.adapter,
                data=data,
                account=self.told,
                guards=list(self.guard_datasets),
                until=best,
                rewards=[f"{reward.name} (weight {shown(reward.weight)})" for reward in self.rewards],
                settings=settings if settings is not None else reports.changed_settings(self.args),
            )
        self.accelerator.wait_for_everyone()
        return reports.changes_table(history, reports.paired_errors(folder, best), best)
