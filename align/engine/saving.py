"""How a trainer saves and loads: what is trained, in safetensors, and nothing else of the model.

The Trainer's private methods of saving and loading are overridden here alone; the reason stands in each. What the
trainers override besides is how it draws a batch: ``_get_train_sampler`` and ``_prepare_inputs``.
"""

import logging
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import Trainer

from align.engine import checkpoints
from align.engine.metrics import RunMetrics
from align.engine.resume import ResumePlan
from align.engine.settings import FlowConfig
from align.engine.weights import WEIGHTS, EMACallback, load_trained, read_trained, trained_parameters
from align.models.contract import FlowModel
from align.parallel.sharding import (
    Sharding,
    gathered,
    gathered_state,
    load_engine,
    save_trained_only,
    shard_frozen,
    zero_stage,
)

logger = logging.getLogger(__name__)


@dataclass
class HandedOn:
    """What one override of the Trainer's hooks leaves for another.

    resume: what the run goes on from. optimizer_order: names of what is trained, in the optimizer's order. writing_into:
    where the checkpoint in progress is written before it gets its name. best: the update whose checkpoint was loaded at the
    end of training, as the best one.
    """

    resume: ResumePlan = field(default_factory=ResumePlan)
    optimizer_order: list[str] = field(default_factory=list)
    writing_into: str | None = None
    best: int | None = None


class CheckpointingTrainer(Trainer):
    """A Trainer whose checkpoints are complete or not there, and hold what is trained and nothing else."""

    args: FlowConfig
    flow: FlowModel
    metrics: RunMetrics
    ema: EMACallback | None
    handed_on: HandedOn

    def identity(self) -> dict[str, dict[str, Any]]:
        """Return what a checkpoint of this run belongs to."""
        raise NotImplementedError

    def save_progress(self, folder: Path) -> None:
        """Write into a checkpoint what else an algorithm needs to go on; called on every process."""

    def trained_parameters(self) -> dict[str, torch.nn.Parameter]:
        """Return name to parameter for everything that is trained."""
        return trained_parameters(self.model)

    # -- saving -----------------------------------------------------------------------------------------------------

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        # The Trainer would write into the final folder, and rotate by its own rules.
        args, state, run_folder = self.args, self.state, Path(str(self.args.output_dir))
        final = run_folder / f"checkpoint-{state.global_step}"
        best = str(run_folder / f"checkpoint-{state.best_global_step}") if state.best_global_step else None
        if best is not None and best != str(final) and not Path(best).is_dir():  # not saved, or in another folder
            best = None
        writing = checkpoints.written(final, self.identity(), args.should_save, args.save_total_limit, best)
        with self.metrics.paused(), writing as folder:
            self.handed_on.writing_into = str(folder.parent)
            try:
                super()._save_checkpoint(model, trial)
            finally:
                self.handed_on.writing_into = None
            self.save_progress(folder)
            if best:  # where it will be, not where it is being written; every process loads it at the end
                state.best_model_checkpoint = best
                if args.should_save:
                    state.save_to_json(str(folder / "trainer_state.json"))

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        # The Trainer would choose an update that is evaluated and not saved, and find no checkpoint of it at the end.
        if self.args.load_best_model_at_end and self.args.save_strategy != "best" and not self.control.should_save:
            return False
        return super()._determine_best_metric(metrics, trial)

    def _get_output_dir(self, trial: Any) -> str:
        # Asked for by _save_checkpoint alone: there it is the folder of unfinished checkpoints.
        return self.handed_on.writing_into or super()._get_output_dir(trial)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write what is trained, and nothing else of the model, gathered if it is sharded."""
        self._save(output_dir, gathered_state(self.trained_parameters(), keep=self.args.should_save))

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        # The Trainer would write the whole transformer, the frozen base included.
        if not self.args.should_save:
            return
        assert state_dict is not None
        folder = Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        save_file(state_dict, folder / WEIGHTS, metadata={"format": "pt"})
        if self.ema:
            self.ema.save(folder)
        if self.flow.adapter:  # so that every checkpoint can be tried in stock diffusers
            self.flow.save(str(folder), state_dict)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        # A checkpoint of DeepSpeed's engine does not say how it is sharded.
        super()._save_optimizer_and_scheduler(output_dir)
        if self.is_deepspeed_enabled and self.args.should_save:
            Sharding.of(self.args).write(Path(output_dir))

    # -- loading ----------------------------------------------------------------------------------------------------

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: str | None) -> Any:
        # The Trainer's loading of an engine would miss the frozen weights, which our checkpoints leave out.
        if not self.is_deepspeed_enabled:
            return super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        plan = self.handed_on.resume
        if plan.folder is not None:  # to be sharded anew, they are loaded before the engine shards them
            read = read_trained if plan.written_under is None else load_trained
            read(self.trained_parameters(), plan.folder / WEIGHTS)
        prepared = super()._prepare_for_training(max_steps, train_dataloader, None)
        save_trained_only(self.model_wrapped)
        if zero_stage(self.args) == 3:
            self.flow.share_reference(partial(shard_frozen, args=self.args))
        if plan.folder is not None:
            if plan.written_under is None:
                load_engine(self.model_wrapped, plan.folder)
            self._load_optimizer_and_scheduler(str(plan.folder))
        return prepared

    def create_optimizer(self, model: torch.nn.Module | None = None) -> torch.optim.Optimizer:
        fresh = self.optimizer is None
        optimizer = super().create_optimizer(model)
        if fresh:
            names = {parameter: name for name, parameter in self.model.named_parameters()}
            groups = optimizer.param_groups
            self.handed_on.optimizer_order = [names[parameter] for group in groups for parameter in group["params"]]
        return optimizer

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        # The Trainer cannot load what was written under another sharding.
        written_under = self.handed_on.resume.written_under
        if checkpoint is None or written_under is None:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        from align.parallel.resharding import reshard  # for a run that has moved, alone

        trained = self.trained_parameters()
        ordered = {name: trained[name] for name in self.handed_on.optimizer_order}
        engine = self.model_wrapped if self.is_deepspeed_enabled else None
        reshard(Path(checkpoint), written_under, ordered, self.optimizer, self.lr_scheduler, engine)

    def _load_best_model(self) -> None:
        # The Trainer would look for the whole transformer's weights.
        folder, parameters = Path(str(self.state.best_model_checkpoint)), self.trained_parameters()
        stored = read_trained(parameters, folder / WEIGHTS)
        with torch.no_grad(), gathered(list(parameters.values()), write=True):
            for name, parameter in parameters.items():
                parameter.copy_(stored[name])
        if self.ema:
            self.ema.load(folder)
        self.handed_on.best = self.state.best_global_step
        if self.args.process_index == 0:
            metric, value = self.args.metric_for_best_model, self.state.best_metric
            logger.warning("exported is %s, the best by %s: %.4g", folder, metric, value)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: torch.nn.Module | None = None) -> None:
        # The Trainer would look for the whole transformer's weights.
        load_trained(self.trained_parameters(), Path(resume_from_checkpoint) / WEIGHTS)

    def _run_epoch(self, **where: Any) -> None:
        # The Trainer would add an update to a run that is resumed from its last one.
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        super()._run_epoch(**where)
