"""GRPO for flow-matching image models (Qwen-Image report, arXiv 2508.02324, section 4.2; Flow-GRPO, arXiv 2505.05470).

    accelerate launch align/grpo.py --config configs/tiny/grpo.yaml

One rollout, read top to bottom in :class:`GRPOTrainer`:

1. every prompt of the batch is sampled ``num_generations`` times, by an SDE on some steps and the ODE on the others;
2. the rewards score the images, and each image's advantage is taken against its own prompt's group;
3. every (image, SDE step) is a transition; micro-batches of transitions, steps mixed, go through the clipped loss.

Deviations from the report:

- log-probabilities and KL average over latent dimensions, as every public implementation does, so that published
  clip ranges carry over; ``log_prob_reduction: sum`` is the report's eq. 5;
- only ``sde_window_size`` steps may be stochastic and trained (Flow-GRPO-Fast, MixGRPO); all steps by default; images
  of a group may share their initial noise (``num_prefixes``): then the steps before the window, and the velocity of its
  first step, are computed once for all of them, in training too;
- only the best and the worst images of a group may be trained (DanceGRPO; ``num_trained``); all by default;
- the group's standard deviation is the sample one (n - 1), as in TRL;
- a group whose rewards are all equal is not run through the model, so it adds no KL either; the mean is still taken
  over all images, dead ones counting 0;
- a rollout is scored once by the policy that drew it: the log-probability recorded while sampling is the old one.
"""

from typing import Any

import torch
from torch import Tensor

from align.advantages import extremes
from align.buffer import MicroBatch, TransitionBuffer
from align.data_arguments import DataArguments
from align.flow import Transition
from align.groups import GroupTrainer
from align.grpo_config import GRPOConfig
from align.launch import run_on_groups
from align.losses import gaussian_kl, grpo_policy_loss
from align.rollout import first_alike, velocity_fn
from rewards import RewardError


class ConsistencyError(RuntimeError):
    """Replaying a rollout under the policy that drew it does not give ratio 1."""


class GRPOTrainer(GroupTrainer):
    """Group relative policy optimisation of a flow model.

    Args:
        args: see :class:`GRPOConfig`. All others, and what is raised: see :class:`align.groups.GroupTrainer`.
    """

    args: GRPOConfig
    algorithm = "GRPO"
    buffer_type = TransitionBuffer
    stops = (RewardError, ConsistencyError)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.args.beta > 0:
            self.flow.keep_reference()
        self._consistent = False

    # -- 1 and 2: sample, score, compare ----------------------------------------------------------------------------

    def generate(self, rows: list[dict[str, Any]], update: int) -> TransitionBuffer:
        args = self.args
        result, rewards, weights = self.sample(rows, update, args.num_prefixes)
        group = args.advantages(rewards, weights)
        self.record_rewards(rewards, group.rewards, group.dead_groups)
        if args.num_trained is not None:
            group = extremes(group, args.num_generations, args.num_trained)
        first = args.process_index * len(rows)
        buffer = TransitionBuffer(
            transitions=Transition.cat(result.transitions),
            prompts=[row["prompt"] for row in rows],
            advantages=group.advantages[first : first + len(rows)].to(result.latents.device),
            live=group.live,
            first=first,
            steps=result.steps,
            sampler=result.sampler,
            starts=[first_alike(i, args.num_generations, args.num_prefixes) for i in range(len(rewards))],
            update=update,
            seed=args.seed,
            **self.parts(),
        )
        if not self._consistent:
            self._check_consistency(buffer)
        return buffer

    def _check_consistency(self, buffer: TransitionBuffer) -> None:
        """The gate: replayed under the policy that drew it, every transition has ratio 1."""
        worst = torch.zeros(len(buffer.steps), device=self.accelerator.device)
        for part in range(buffer.micro_batches):  # dealt as for training: another batch can be another kernel
            batch = buffer.micro_batch(part, dead_too=True)
            with torch.no_grad(), self.compute_loss_context_manager():
                replayed = self._replay(buffer, batch, self.model_wrapped)
            deviation = (torch.exp(replayed.log_prob - batch.transition.log_prob) - 1).abs()
            worst.scatter_reduce_(0, batch.step_positions.to(worst.device), deviation, "amax")
            self._count(batch, trained=False)
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
        drawn, rows = batch.transition, batch.distinct  # images that began alike have their first velocity in common
        v = velocity(drawn.latents[rows], drawn.sigma[rows], [conditions[batch.images[row]] for row in rows])
        return v[batch.branch]

    def _count(self, batch: MicroBatch, trained: bool) -> None:
        self.count_forwards(len(batch.distinct), trained=trained, guided=self.args.guidance_scale > 1)

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
        if not len(batch):  # every group was dead: nothing to train on, and no forward is spent
            return self.no_loss()
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
        self._count(batch, trained=True)
        # Dead transitions were left out of the batch and count 0 in the mean over all of them.
        return (loss * batch.weights).sum() / batch.nominal_size

    def _reference_mean(self, buffer: TransitionBuffer, batch: MicroBatch, model: torch.nn.Module) -> Tensor:
        drawn = batch.transition
        # A frozen copy was made before the launcher wrapped the model in its autocast: give it the same.
        with torch.no_grad(), self.accelerator.autocast(), self.flow.reference(model) as reference:
            v = self._velocity(buffer, batch, reference)
        self._count(batch, trained=False)
        return buffer.sampler.moments(drawn.latents, v, drawn.sigma, drawn.sigma_next)[0]

    def _record_kl(self, name: str, mean: Tensor, other: Tensor, std: Tensor) -> None:
        """KL per latent dimension, and of the whole transition in nats."""
        per_dimension = gaussian_kl(mean, other, std, "mean").mean().item()
        self.metrics.record(**{f"{name}_per_dim": per_dimension, f"{name}_total": per_dimension * mean[0].numel()})

    # -- the run ----------------------------------------------------------------------------------------------------

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> Any:
        self._consistent = False
        return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)


def main(argv: list[str] | None = None) -> None:
    """Train from a config."""
    run_on_groups(DataArguments, GRPOConfig, GRPOTrainer, argv)


if __name__ == "__main__":
    # Run by path this file is `__main__`; its classes must be known by their own module's name in what is saved.
    from align.grpo import main as run

    run()
