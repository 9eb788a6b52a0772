"""GRPO for flow-matching image models (Qwen-Image report, arXiv 2508.02324, section 4.2; Flow-GRPO, arXiv 2505.05470).

    accelerate launch align/grpo.py --config configs/tiny/grpo.yaml

One rollout, read top to bottom in :class:`GRPOTrainer`:

1. every prompt of the batch is sampled ``num_generations`` times, by an SDE on some steps and the ODE on the others;
2. the rewards score the images, and each image's advantage is taken against its own prompt's group;
3. every (image, SDE step) is a transition; micro-batches of transitions, steps mixed, go through the clipped loss.

Deviations from the report:

- log-probabilities and KL average over latent dimensions, as every public implementation does, so that published
  clip ranges carry over; ``log_prob_reduction: sum`` is the report's eq. 5;
- only ``sde_window_size`` steps may be stochastic and trained (Flow-GRPO-Fast, MixGRPO); all steps by default;
- the group's standard deviation is the sample one (n - 1), as in TRL;
- a group whose rewards are all equal is not run through the model, so it adds no KL either; the mean is still taken
  over all images, dead ones counting 0;
- a rollout is scored once by the policy that drew it: the log-probability recorded while sampling is the old one.
"""

import json
import logging
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from datasets import Dataset
from peft import PeftConfig
from torch import Tensor
from transformers import TrainerCallback
from transformers.trainer_utils import get_last_checkpoint
from trl.trainer.utils import RepeatSampler

from align import reports
from align.advantages import GroupAdvantages, group_advantages
from align.arguments import ModelArguments, check_launch, parse, plain_errors
from align.buffer import MicroBatch, TransitionBuffer
from align.evaluation import score_rows
from align.flow import Transition
from align.grpo_config import DataArguments, GRPOConfig, check_data
from align.launch import load_model, train_and_finish
from align.losses import gaussian_kl, grpo_policy_loss
from align.models.base import FlowModel
from align.ranking import extra_columns, write_groups
from align.rollout import ImageKey, Rollout, rollout, velocity_fn
from align.trainer import FlowTrainer
from preference_data.writer import RankedWriter
from rewards import RewardError, load_rewards

logger = logging.getLogger(__name__)


#: In a checkpoint: the settings by which a rollout is dealt into updates.
DEALING = "dealing.json"
DEAD_ROLLOUTS_TO_WARN = 5
_NO_DROPOUT = "sampling and replay would see two different policies"


class ConsistencyError(RuntimeError):
    """Replaying a rollout under the policy that drew it does not give ratio 1."""


class EpochRepeatSampler(RepeatSampler):
    """TRL's RepeatSampler, whose order is a function of (seed, epoch), so that a resumed run goes on in order."""

    def set_epoch(self, epoch: int) -> None:
        self.generator.manual_seed((self.seed or 0) + epoch)


class GRPOTrainer(FlowTrainer):
    """Group relative policy optimisation of a flow model.

    Args:
        model: the policy, see :class:`align.models.base.FlowModel`, or the name of a Qwen-Image.
        rewards: what ``rewards.load_rewards`` takes: names, mappings, or plain functions.
        args: see :class:`GRPOConfig`.
        train_dataset: a ``prompt`` column and whatever columns the rewards ask for by name.
        eval_dataset: held-out prompts; logged as ``eval_reward`` and ``eval_NAME``.
        guard_datasets: further held-out prompts, watched for damage; logged as ``eval_GUARD_NAME``.
        peft_config: train this adapter; without it the whole transformer (or the adapter already loaded).

    Raises:
        ValueError: rewards, columns and batch sizes that do not fit, before any image is drawn.
    """

    args: GRPOConfig
    algorithm = "GRPO"
    phases = ("rollout", "reward", "update")
    stops = (RewardError, ConsistencyError)

    def __init__(
        self,
        model: FlowModel | str,
        rewards: list[Any],
        args: GRPOConfig,
        train_dataset: Dataset,
        eval_dataset: Dataset | None = None,
        guard_datasets: dict[str, Dataset] | None = None,
        peft_config: PeftConfig | None = None,
        callbacks: list[TrainerCallback] | None = None,
    ) -> None:
        scored_by = load_rewards(rewards)
        self.reward_weights = torch.tensor([reward.weight for reward in scored_by])
        check_data(scored_by, args, train_dataset, eval_dataset, guard_datasets or {})
        args.check_world(args.world_size)
        if getattr(peft_config, "lora_dropout", 0):
            raise ValueError(f"lora_dropout must be 0: {_NO_DROPOUT}")
        if isinstance(model, str):
            from align.models.qwen_image import QwenImage

            model = QwenImage.from_pretrained(model)
        super().__init__(
            model,
            args,
            train_dataset,
            rewards=scored_by,
            eval_prompts=eval_dataset,
            guard_datasets=guard_datasets,
            peft_config=peft_config,
            callbacks=callbacks,
        )
        if args.beta > 0:
            self.check_reference("beta > 0")
            model.keep_reference()
        self._buffer: TransitionBuffer | None = None
        self._micro_step: int | None = None  # micro-batches taken since the start of the run
        self._consistent = False
        self._writer: RankedWriter | None = None
        self._dead_in_a_row = 0

    # -- prompts: each rollout's rows are handed out again for every micro-batch taken from it ----------------------

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> RepeatSampler:
        return EpochRepeatSampler(
            data_source=self.train_dataset,
            mini_repeat_count=self.args.num_generations,
            batch_size=self.args.generation_batch_size // self.args.num_generations,
            repeat_count=self.args.micro_batches_per_rollout(self.args.world_size),
            seed=self.args.data_seed if self.args.data_seed is not None else self.args.seed,
        )

    def get_train_dataloader(self) -> Any:
        return self._get_dataloader(
            dataset=self.train_dataset,
            description="Training",
            batch_size=self.args.generation_batch_size // self.args.world_size,
            sampler_fn=self._get_train_sampler,
            is_training=True,
        )

    # -- 1 and 2: sample, score, compare ----------------------------------------------------------------------------

    def _prepare_inputs(self, inputs: list[dict[str, Any]]) -> MicroBatch:
        """A micro-batch of transitions; every so many of them, first a new rollout of the prompts in ``inputs``."""
        per_rollout = self.args.micro_batches_per_rollout(self.args.world_size)
        if self._micro_step is None:
            self._restore()
            assert self._micro_step is not None
        if self._micro_step % per_rollout == 0:
            self._buffer = self._generate(inputs, update=self._micro_step // per_rollout)
        assert self._buffer is not None
        batch = self._buffer.micro_batch(self._micro_step % per_rollout)
        self._micro_step += 1
        return batch

    def _generate(self, rows: list[dict[str, Any]], update: int) -> TransitionBuffer:
        args, prompts = self.args, [row["prompt"] for row in rows]
        with self.metrics.timed("rollout"):
            result = rollout(
                self.flow,
                prompts,
                self._image_keys(update, len(rows)),
                args.plan(update),
                transformer=self.model_wrapped,
                show_progress=self.is_world_process_zero() and not args.disable_tqdm,
            )
        with self.metrics.timed("reward"):
            rewards = self._score(rows, result)
        self.metrics.forward_equivalents += result.forwards
        mine = slice(args.process_index * len(rows), (args.process_index + 1) * len(rows))
        if args.save_rollouts:
            self._save_rollout(rows, result, rewards[mine], update)
        group = group_advantages(
            rewards,
            args.num_generations,
            self.reward_weights,
            scale_rewards=args.scale_rewards,
            aggregation=args.multi_objective_aggregation,
            clip=args.advantage_clip,
        )
        self._record_rewards(rewards, group)
        buffer = TransitionBuffer(
            transitions=Transition.cat(result.transitions),
            prompts=prompts,
            advantages=group.advantages[mine].to(result.latents.device),
            live=group.live,
            first=mine.start,
            steps=result.steps,
            sampler=result.sampler,
            update=update,
            micro_batches=args.micro_batches_per_pass(args.world_size),
            seed=args.seed,
            keep_one=args.world_size > 1,
        )
        if not self._consistent:
            self._check_consistency(buffer)
        return buffer

    def _save_rollout(self, rows: list[dict[str, Any]], result: Rollout, rewards: Tensor, update: int) -> None:
        """Append this process's groups to ``output_dir/rollouts``; a resumed run finds those that are there."""
        args, groups = self.args, len(rows) // self.args.num_generations
        if self._writer is None:
            columns = [*extra_columns(self.train_dataset), pa.field("update", pa.int64())]
            self._writer = RankedWriter(
                Path(args.output_dir) / "rollouts",
                shard=(args.process_index, args.world_size),
                rows_per_file=groups,
                rewards=[reward.name for reward in self.rewards],
                columns=pa.schema(columns),
            )
        first = update * (args.generation_batch_size // args.num_generations) + args.process_index * groups
        if first not in self._writer.done:
            numbers, table = range(first, first + groups), rewards.T.tolist()
            write_groups(
                self._writer,
                numbers,
                rows,
                result.images,
                self.rewards,
                table,
                args.num_generations,
                {"update": update},
            )

    def _record_rewards(self, rewards: Tensor, group: GroupAdvantages) -> None:
        groups = group.rewards.view(-1, self.args.num_generations)
        values = {"reward": group.rewards.nanmean(), "reward_std": _nanstd(groups).nanmean()}
        for column, reward in zip(rewards.unbind(1), self.rewards, strict=True):
            values[f"rewards/{reward.name}/mean"] = column.nanmean()
            values[f"rewards/{reward.name}/std"] = _nanstd(column[None])[0]
            values[f"rewards/{reward.name}/unscored"] = column.isnan().float().mean()
        self.metrics.record(dead_groups=group.dead_groups, **{name: value.item() for name, value in values.items()})
        self.metrics.count_images(len(rewards))
        self._dead_in_a_row = self._dead_in_a_row + 1 if group.dead_groups == 1.0 else 0
        if self._dead_in_a_row and self._dead_in_a_row % DEAD_ROLLOUTS_TO_WARN == 0:
            logger.warning(
                "the last %d rollouts had nothing to learn from: every group's images scored the same, or not at all",
                self._dead_in_a_row,
            )

    def _image_keys(self, update: int, images: int) -> list[ImageKey]:
        """Keys of this process's images by their place in the whole rollout, whatever the number of processes."""
        group, first = self.args.num_generations, self.args.process_index * images
        shared = 0 if self.args.shared_initial_noise else None
        return [ImageKey(self.args.seed, update, i // group, i % group, shared) for i in range(first, first + images)]

    def _score(self, rows: list[dict[str, Any]], result: Rollout) -> Tensor:
        """(images of all processes, rewards) scores, NaN where there is none; raises on every process or on none."""
        table = score_rows(self.rewards, result.images, rows, self.args.max_failed_fraction)
        local = torch.tensor(table, dtype=torch.float32, device=self.accelerator.device).T.contiguous()
        return self.accelerator.gather(local).cpu()

    def _check_consistency(self, buffer: TransitionBuffer) -> None:
        """The gate: replayed under the policy that drew it, every transition has ratio 1."""
        worst = torch.zeros(len(buffer.steps), device=self.accelerator.device)
        for part in range(buffer.micro_batches):  # dealt as for training: another batch can be another kernel
            batch = buffer.micro_batch(part, dead_too=True)
            with torch.no_grad(), self.compute_loss_context_manager():
                replayed = self._replay(buffer, batch, self.model_wrapped)
            deviation = (torch.exp(replayed.log_prob - batch.transition.log_prob) - 1).abs()
            worst.scatter_reduce_(0, batch.step_positions.to(worst.device), deviation, "amax")
            self.count_forwards(len(batch), trained=False, guided=self.args.guidance_scale > 1)
        worst = self.accelerator.gather(worst).view(-1, len(buffer.steps)).amax(0)
        tolerance = self.args.consistency_tolerance * min(self.args.clip_range)
        self.metrics.record(ratio_deviation_at_start=worst.max().item(), ratio_tolerance=tolerance)
        if not bool((worst <= tolerance).all()):
            step = buffer.steps[int(worst.argmax())]
            raise ConsistencyError(
                f"replaying the first rollout gives |ratio - 1| = {worst.max().item():.2e} at denoising step {step}, "
                f"tolerance {tolerance:.2e} ({self.args.consistency_tolerance} of the clip range): sampling and training "
                "do not see the same policy. Lower precision, dropout or another attention kernel are the usual causes"
            )
        self._consistent = True

    # -- 3: the loss ------------------------------------------------------------------------------------------------

    def _velocity(self, buffer: TransitionBuffer, batch: MicroBatch, transformer: torch.nn.Module) -> Tensor:
        conditions = self.flow.encode_prompts(buffer.prompts)  # of the whole rollout, as when it was sampled
        velocity = velocity_fn(self.flow, self.args.plan(buffer.update), transformer)
        return velocity(batch.transition.latents, batch.transition.sigma, [conditions[i] for i in batch.images])

    def _replay(self, buffer: TransitionBuffer, batch: MicroBatch, transformer: torch.nn.Module) -> Transition:
        """The drawn transitions, scored under the policy as it is now."""
        drawn, v = batch.transition, self._velocity(buffer, batch, transformer)
        return buffer.sampler.transition(
            drawn.latents, v, drawn.sigma, drawn.sigma_next, next_latents=drawn.next_latents
        )

    def compute_loss(
        self, model: torch.nn.Module, inputs: MicroBatch, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Tensor:
        """Report eq. 5 over one micro-batch: -mean(min(r A, clip(r) A) - beta KL)."""
        args, batch, buffer = self.args, inputs, self._buffer
        assert buffer is not None
        if not len(batch):  # every group was dead: nothing to train on, and no forward is spent
            return torch.stack([0.0 * p.sum() for p in self.trained_parameters().values()]).sum()
        drawn = batch.transition
        reference_mean = self._reference_mean(buffer, batch, model) if args.beta > 0 else None
        now = self._replay(buffer, batch, model)
        policy = grpo_policy_loss(now.log_prob, drawn.log_prob, batch.advantages, *args.clip_range)
        loss = policy.loss
        if reference_mean is not None:
            kl = gaussian_kl(now.mean, reference_mean, now.std, args.log_prob_reduction)
            loss = loss + args.beta * kl
            self._record_kl("kl", now.mean.detach(), reference_mean, now.std)
        self._record_kl("kl_rollout", now.mean.detach(), drawn.mean, now.std)
        self.metrics.record(
            ratio_min=policy.ratio.min().item(),
            ratio_max=policy.ratio.max().item(),
            clip_share=policy.clipped.float().mean().item(),
        )
        self.count_forwards(len(batch), trained=True, guided=args.guidance_scale > 1)
        # Dead transitions were left out of the batch and count 0 in the mean over all of them.
        return (loss * batch.weights).sum() / batch.nominal_size

    def _reference_mean(self, buffer: TransitionBuffer, batch: MicroBatch, model: torch.nn.Module) -> Tensor:
        drawn = batch.transition
        # A frozen copy was made before the launcher wrapped the model in its autocast: give it the same.
        with torch.no_grad(), self.accelerator.autocast(), self.flow.reference(model) as reference:
            v = self._velocity(buffer, batch, reference)
        self.count_forwards(len(batch), trained=False, guided=self.args.guidance_scale > 1)
        return buffer.sampler.moments(drawn.latents, v, drawn.sigma, drawn.sigma_next)[0]

    # -- logging, evaluation ----------------------------------------------------------------------------------------

    def _record_kl(self, name: str, mean: Tensor, other: Tensor, std: Tensor) -> None:
        """KL per latent dimension, and of the whole transition in nats."""
        per_dimension = gaussian_kl(mean, other, std, "mean").mean().item()
        self.metrics.record(**{f"{name}_per_dim": per_dimension, f"{name}_total": per_dimension * mean[0].numel()})

    # -- the run ----------------------------------------------------------------------------------------------------

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> Any:
        self._micro_step, self._buffer, self._consistent, self._dead_in_a_row = None, None, False, 0
        if resume_from_checkpoint:
            folder = (
                get_last_checkpoint(self.args.output_dir) if resume_from_checkpoint is True else resume_from_checkpoint
            )
            self.args.check_dealing(Path(folder) / DEALING)
        return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)

    def _buffer_file(self, folder: str | Path) -> Path:
        return Path(folder) / f"rollout-{self.args.process_index}-of-{self.args.world_size}.safetensors"

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        if self.args.should_save:
            (folder / DEALING).write_text(json.dumps(self.args.dealing()))
        taken = self.state.global_step * self.args.gradient_accumulation_steps
        if self._buffer is not None and taken % self.args.micro_batches_per_rollout(self.args.world_size):
            self._buffer.save(self._buffer_file(folder))

    def _restore(self) -> None:
        """Counters, and the rest of a rollout that a checkpoint was taken in the middle of."""
        self._micro_step = self.state.global_step * self.args.gradient_accumulation_steps
        counted = reports.series(self.state.log_history, "forward_equivalents")[1]
        if counted and self.is_world_process_zero():
            self.metrics.forward_equivalents = counted[-1]
        if self._micro_step % self.args.micro_batches_per_rollout(self.args.world_size):
            assert self.resumed_from is not None
            self._buffer = TransitionBuffer.load(self._buffer_file(self.resumed_from), self.accelerator.device)


def _nanstd(values: Tensor) -> Tensor:
    """(P, G) to (P,) sample standard deviations over what is not NaN."""
    known = ~values.isnan()
    centred = (values - values.nanmean(1, keepdim=True)).masked_fill(~known, 0.0)
    return (centred.pow(2).sum(1) / (known.sum(1) - 1).clamp(min=1)).sqrt()


def main(argv: list[str] | None = None) -> None:
    """Train from a config; everything that can be known wrong is said before the model is loaded."""
    with plain_errors():
        data, model_args, args = parse((DataArguments, ModelArguments, GRPOConfig), argv)
        rewards = load_rewards(data.rewards)
        train, held_out, guards = data.load()
        check_data(rewards, args, train, held_out, guards)
        check_launch(args)
        args.check_world(args.world_size)
        model_args.check(args.height, args.width)
        if model_args.lora_dropout:
            raise ValueError(f"lora_dropout must be 0, found {model_args.lora_dropout}: {_NO_DROPOUT}")
        checkpoint = args.checkpoint_to_resume()

    with plain_errors():
        model = load_model(model_args)
        trainer = GRPOTrainer(model, rewards, args, train, held_out, guards, peft_config=model_args.peft_config())
    settings = reports.changed_settings(data, model_args, args)
    train_and_finish(trainer, checkpoint, model_args.model, data.dataset_name, settings)


if __name__ == "__main__":
    # Run by path this file is `__main__`; its classes must be known by their own module's name in what is saved.
    from align.grpo import main as run

    run()
