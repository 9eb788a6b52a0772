"""GRPO for flow-matching image models (Qwen-Image report, arXiv 2508.02324, section 4.2; Flow-GRPO, arXiv 2505.05470).

    accelerate launch align/grpo.py --config configs/tiny/grpo.yaml

One rollout, read top to bottom in :class:`GRPOTrainer`:

1. every prompt of the batch is sampled ``num_generations`` times, by an SDE on some steps and the ODE on the others;
2. the rewards score the images, and each image's advantage is taken against its own prompt's group;
3. every (image, SDE step) is a transition; micro-batches of transitions, steps mixed, go through the clipped loss.

Deviations from the report:

- log-probabilities and KL average over latent dimensions, as every public implementation does, so that clip ranges
  published for ``sde`` carry over (for ``cps`` peers leave a factor out); ``log_prob_reduction: sum`` is the report's eq. 5;
- only ``sde_window_size`` steps may be stochastic and trained (Flow-GRPO-Fast, MixGRPO); all steps by default; images
  of a group may share their initial noise (``num_prefixes``): then the steps before the window, and the velocity of its
  first step, are computed once for all of them, in training too;
- only the best and the worst images of a group may be trained (DanceGRPO; ``num_trained``); all by default;
- the group's standard deviation is the sample one (n - 1), as in TRL;
- a group whose rewards are all equal is not run through the model, so it adds no KL either; the mean is still taken
  over all images, dead ones counting 0;
- a rollout is scored once by the policy that drew it: the log-probability recorded while sampling is the old one.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from align.cli.data import DataArguments
from align.cli.launch import run
from align.engine.settings import setting
from align.maths.advantages import extremes
from align.maths.flow import Reduction, SDEType, StochasticSampler, Transition
from align.maths.losses import LossResult, gaussian_kl, grpo_policy_loss
from align.online.buffers import MicroBatch, TransitionBuffer
from align.online.settings import AdvantageConfig
from align.online.trainer import OnlineTrainer
from align.sampling.noise import first_of_start
from align.sampling.rollout import SamplingPlan
from align.sampling.window import SDEWindow, WindowSchedule


@dataclass
class GRPOConfig(AdvantageConfig):
    """Arguments of :class:`align.grpo.GRPOTrainer`, over ``transformers.TrainingArguments``.

    ``per_device_train_batch_size`` counts transitions: (image, trained step) pairs of one forward and backward.
    """

    # Sampling: the policy is the model together with its schedule.
    num_inference_steps: int = setting(10, "Denoising steps of a rollout.", fixed_on_resume=True, least=2)
    guidance_scale: float = setting(
        1.0,
        "True classifier-free guidance; acts above 1, then trained through, at twice the forwards.",
        fixed_on_resume=True,
        least=0,
    )
    noise_level: float = setting(0.7, "Strength a of the SDE's noise.", fixed_on_resume=True, above=0, most=10)
    sde_type: SDEType = setting(
        "sde", "sde (Flow-GRPO) or cps (coefficient-preserving, Flow-CPS).", fixed_on_resume=True
    )
    sde_window_size: int | None = setting(
        None, "How many steps are stochastic and trained. Default: all.", fixed_on_resume=True
    )
    sde_window_range: list[int] | None = setting(
        None,
        "[first, end): where the window may lie, as sde_window_schedule says. Default: it starts at step 0.",
        fixed_on_resume=True,
    )
    sde_window_schedule: WindowSchedule = setting(
        "random",
        "In sde_window_range: random (drawn once per rollout, for all images) or sliding (from its first step to its "
        "last, and again), as MixGRPO does.",
        fixed_on_resume=True,
    )
    sde_window_interval: int = setting(25, "Sliding: rollouts before the window moves.", fixed_on_resume=True, least=1)
    sde_window_stride: int = setting(1, "Sliding: steps by which it moves.", fixed_on_resume=True, least=1)
    num_prefixes: int | None = setting(
        None,
        "Different initial noises in a group. Images that have one in common are the same up to the window's first noise: "
        "to there every velocity is computed once for all of them, the trained one once a micro-batch. Default: one for "
        "each image.",
        fixed_on_resume=True,
    )
    num_trained: int | None = setting(
        None,
        "Images of a group that are trained: half of them its best, half its worst. Default: all.",
        fixed_on_resume=True,
    )

    # Objective.
    epsilon: float = setting(1e-4, "Clip range below 1. Per latent dimension with log_prob_reduction: mean.", above=0)
    epsilon_high: float | None = setting(None, "Clip range above 1. Default: epsilon.", above=0)
    beta: float = setting(0.0, "Weight of the KL to the reference. 0 runs no reference.", least=0)
    log_prob_reduction: Reduction = setting(
        "mean", "Over latent dimensions: mean (published clip ranges) or sum (the report).", fixed_on_resume=True
    )
    consistency_tolerance: float = setting(
        0.1, "Largest |ratio - 1| of a replayed rollout, as a fraction of the clip range.", above=0
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.window  # noqa: B018 (raises for a window that does not fit)
        for name, least in (("num_prefixes", 1), ("num_trained", 2)):
            value = getattr(self, name)
            if value is not None and not least <= value <= self.num_generations:
                raise ValueError(
                    f"{name} {value} must lie within [{least}, {self.num_generations}], which is num_generations"
                )
        StochasticSampler(self.noise_level, self.sde_type, log_prob_reduction=self.log_prob_reduction)

    def keeps_reference(self) -> bool:
        return self.beta > 0

    @property
    def window(self) -> SDEWindow:
        """The window of stochastic steps; raises ValueError where it does not fit."""
        return SDEWindow(
            num_inference_steps=self.num_inference_steps,
            sde_type=self.sde_type,
            size=self.sde_window_size,
            bounds=None if self.sde_window_range is None else tuple(self.sde_window_range),
            schedule=self.sde_window_schedule,
            interval=self.sde_window_interval,
            stride=self.sde_window_stride,
            seed=self.seed,
        )

    @property
    def clip_range(self) -> tuple[float, float]:
        """How far below and above 1 the ratio may go."""
        return self.epsilon, self.epsilon if self.epsilon_high is None else self.epsilon_high

    def plan(self, rollout_index: int) -> SamplingPlan:
        """Return how a rollout is sampled: by an SDE on its stochastic steps."""
        return replace(
            super().plan(rollout_index),
            sde_steps=self.window.steps(rollout_index),
            noise_level=self.noise_level,
            sde_type=self.sde_type,
            log_prob_reduction=self.log_prob_reduction,
        )

    # -- how a rollout becomes optimizer updates --------------------------------------------------------------------

    def micro_batches_per_pass(self, world_size: int) -> int:
        transitions = self.generation_batch_size // world_size * self.window.width
        return transitions // self.per_device_train_batch_size

    def check_world(self, world_size: int) -> None:
        super().check_world(world_size)
        images = self.generation_batch_size // world_size
        if self.num_prefixes not in (None, self.num_generations) and images % self.num_generations:
            # Processes would begin another number of images: under ZeRO-3 they would wait for each other for ever.
            raise ValueError(
                f"num_prefixes shares steps within a group, and {images} images on each of {world_size} processes do not "
                f"make whole groups of num_generations {self.num_generations}"
            )
        transitions = images * self.window.width
        per_update = self.per_device_train_batch_size * self.gradient_accumulation_steps
        if transitions % per_update:
            raise ValueError(
                f"a rollout is {images} images x {self.window.width} trained steps = {transitions} transitions on each "
                f"process, which per_device_train_batch_size {self.per_device_train_batch_size} x "
                f"gradient_accumulation_steps {self.gradient_accumulation_steps} = {per_update} does not divide: "
                f"one update per rollout would be {transitions} = batch size x accumulation"
            )


class ConsistencyError(RuntimeError):
    """Replaying a rollout under the policy that drew it does not give ratio 1."""


class GRPOTrainer(OnlineTrainer):
    """Group relative policy optimisation of a flow model.

    Args:
        args: see :class:`GRPOConfig`. All others, and what is raised: see :class:`align.online.trainer.OnlineTrainer`.
    """

    args: GRPOConfig
    algorithm = "GRPO"
    buffer_type = TransitionBuffer
    stops = (*OnlineTrainer.stops, ConsistencyError)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.args.beta > 0:
            self.flow.keep_reference()
        self._consistent = False

    # -- 1 and 2: sample, score, compare ----------------------------------------------------------------------------

    def collect(self, rows: list[dict[str, Any]], rollout_index: int) -> TransitionBuffer:
        args = self.args
        drawn, rewards, weights = self.sample(rows, rollout_index, args.num_prefixes)
        group = args.advantages(rewards, weights)
        self.record_rewards(rewards, group.rewards, group.dead_groups)
        if args.num_trained is not None:
            group = extremes(group, args.num_generations, args.num_trained)
        first = args.process_index * len(rows)
        buffer = self.image_buffer(
            rows,
            group.informative,
            rollout_index,
            transitions=Transition.cat(drawn.transitions),
            advantages=group.advantages[first : first + len(rows)].to(drawn.latents.device),
            steps=drawn.steps,
            sampler=drawn.sampler,
            starts=[first_of_start(i, args.num_generations, args.num_prefixes) for i in range(len(rewards))],
        )
        if not self._consistent:
            self._check_consistency(buffer)
        return buffer

    def _check_consistency(self, buffer: TransitionBuffer) -> None:
        """Raise ConsistencyError unless every transition, replayed under the policy that drew it, has ratio 1."""
        worst = torch.zeros(len(buffer.steps), device=self.accelerator.device)
        for index in range(buffer.batching.micro_batches):  # split as for training: another batch can be another kernel
            batch = buffer.micro_batch(index, dead_too=True)
            with torch.no_grad(), self.compute_loss_context_manager():
                replayed = self._replay(batch, self.model_wrapped)
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

    def loss(self, model: torch.nn.Module, batch: MicroBatch) -> LossResult:
        """Return report eq. 5 over one micro-batch: -mean(min(r A, clip(r) A) - beta KL)."""
        if not len(batch):  # every group was dead: nothing to train on, and no forward is spent
            return self.no_loss()
        reference_mean = self._reference_mean(batch, model) if self.args.beta > 0 else None
        replayed = self._replay(batch, model)
        self._count(batch, trained=True)
        return grpo_objective(batch, replayed, reference_mean, self.args)

    def _velocity(self, batch: MicroBatch, transformer: torch.nn.Module) -> Tensor:
        drawn, rows = batch.transition, batch.distinct  # images that began alike have their first velocity in common
        velocity = self.policy_velocity(transformer)(drawn.latents[rows], drawn.sigma[rows], batch.conditions)
        return velocity[batch.velocity_of]

    def _replay(self, batch: MicroBatch, transformer: torch.nn.Module) -> Transition:
        """Score the drawn transitions under the policy as it is now."""
        drawn, v = batch.transition, self._velocity(batch, transformer)
        return batch.sampler.transition(
            drawn.latents, v, drawn.sigma, drawn.sigma_next, next_latents=drawn.next_latents
        )

    def _reference_mean(self, batch: MicroBatch, model: torch.nn.Module) -> Tensor:
        drawn = batch.transition
        # A frozen copy was made before the launcher wrapped the model in its autocast: give it the same.
        with torch.no_grad(), self.accelerator.autocast(), self.flow.reference(model) as reference:
            v = self._velocity(batch, reference)
        self._count(batch, trained=False)
        return batch.sampler.moments(drawn.latents, v, drawn.sigma, drawn.sigma_next)[0]

    def _count(self, batch: MicroBatch, trained: bool) -> None:
        self.count_forwards(len(batch.distinct), trained=trained, guided=self.args.guidance_scale > 1)

    # -- the run ----------------------------------------------------------------------------------------------------

    def train(self, *args: Any, **kwargs: Any) -> Any:
        self._consistent = False
        return super().train(*args, **kwargs)


def grpo_objective(
    batch: MicroBatch, replayed: Transition, reference_mean: Tensor | None, settings: GRPOConfig
) -> LossResult:
    """Return the loss of drawn transitions (report eq. 5).

    Args:
        replayed: the same transitions under the policy as it is now, with gradient.
        reference_mean: their means under the reference, where ``settings.beta`` weighs the KL to it.
    """
    drawn = batch.transition
    policy = grpo_policy_loss(replayed.log_prob, drawn.log_prob, batch.advantages, *settings.clip_range)
    loss = policy.loss
    metrics: dict[str, float | list[float]] = {}
    if reference_mean is not None:
        kl = gaussian_kl(replayed.mean, reference_mean, replayed.std, settings.log_prob_reduction)
        loss = loss + settings.beta * kl
        metrics |= _kl_metrics("kl", replayed, reference_mean)
    metrics |= _kl_metrics("kl_rollout", replayed, drawn.mean)
    metrics |= {
        "ratio_min": policy.ratio.min().item(),
        "ratio_max": policy.ratio.max().item(),
        "clip_share": policy.clipped.float().mean().item(),
    }
    # Dead transitions were left out of the batch and count 0 in the mean over all of them.
    return LossResult((loss * batch.weights).sum() / batch.nominal_size, metrics)


def _kl_metrics(name: str, replayed: Transition, mean: Tensor) -> dict[str, float | list[float]]:
    """Return the KL per latent dimension, and of the whole transition in nats."""
    per_dimension = gaussian_kl(replayed.mean.detach(), mean, replayed.std, "mean").mean().item()
    return {f"{name}_per_dim": per_dimension, f"{name}_total": per_dimension * mean[0].numel()}


def main(argv: list[str] | None = None) -> None:
    """Train from a config."""
    run(DataArguments, GRPOConfig, GRPOTrainer, argv)


if __name__ == "__main__":
    # Run by path this file is `__main__`; its classes must be known by their own module's name in what is saved.
    from align.grpo import main as by_name

    by_name()
