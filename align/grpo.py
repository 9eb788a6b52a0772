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

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from align.cli.data import DataArguments
from align.cli.launch import run_on_groups
from align.engine.settings import setting
from align.maths.advantages import extremes
from align.maths.flow import Reduction, SDEType, StochasticSampler, Transition
from align.maths.losses import gaussian_kl, grpo_policy_loss
from align.online.buffers import MicroBatch, TransitionBuffer
from align.online.settings import AdvantageConfig
from align.online.trainer import GroupTrainer
from align.sampling.noise import seeded_noise
from align.sampling.rollout import SamplingPlan, first_alike, velocity_fn
from rewards import RewardError

WindowSchedule = Literal["random", "sliding"]


@dataclass
class GRPOConfig(AdvantageConfig):
    """Arguments of :class:`align.grpo.GRPOTrainer`, over ``transformers.TrainingArguments``.

    ``per_device_train_batch_size`` counts transitions: (image, trained step) pairs of one forward and backward.
    """

    # Sampling: the policy is the model together with its schedule.
    num_inference_steps: int = setting(10, "Denoising steps of a rollout.")
    guidance_scale: float = setting(
        1.0, "True classifier-free guidance; acts above 1, then trained through, at twice the forwards."
    )
    noise_level: float = setting(0.7, "Strength a of the SDE's noise.")
    sde_type: SDEType = setting("sde", "sde (Flow-GRPO) or cps (coefficient-preserving, Flow-CPS).")
    sde_window_size: int | None = setting(None, "How many steps are stochastic and trained. Default: all.")
    sde_window_range: list[int] | None = setting(
        None,
        "[first, end): where the window may lie, as sde_window_schedule says. Default: it starts at step 0.",
    )
    sde_window_schedule: WindowSchedule = setting(
        "random",
        "In sde_window_range: random (drawn once per rollout, for all images) or sliding (from its first step to its "
        "last, and again), as MixGRPO does.",
    )
    sde_window_interval: int = setting(25, "Sliding: rollouts before the window moves.")
    sde_window_stride: int = setting(1, "Sliding: steps by which it moves.")
    num_prefixes: int | None = setting(
        None,
        "Different initial noises in a group. Images that have one in common are the same up to the window's first noise: "
        "to there every velocity is computed once for all of them, the trained one once a micro-batch. Default: one for "
        "each image.",
    )
    num_trained: int | None = setting(
        None, "Images of a group that are trained: half of them its best, half its worst. Default: all."
    )

    # Objective.
    epsilon: float = setting(1e-4, "Clip range below 1. Per latent dimension with log_prob_reduction: mean.")
    epsilon_high: float | None = setting(None, "Clip range above 1. Default: epsilon.")
    beta: float = setting(0.0, "Weight of the KL to the reference. 0 runs no reference.")
    log_prob_reduction: Reduction = setting(
        "mean", "Over latent dimensions: mean (published clip ranges) or sum (the report)."
    )
    consistency_tolerance: float = setting(
        0.1, "Largest |ratio - 1| of a replayed rollout, as a fraction of the clip range."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_choices(
            sde_type=SDEType,
            sde_window_schedule=WindowSchedule,
            log_prob_reduction=Reduction,
        )
        self.check_positive("epsilon", "epsilon_high", "noise_level", "consistency_tolerance")
        self.check_least("beta", 0)
        for name in ("sde_window_interval", "sde_window_stride"):
            self.check_least(name, 1)
        self._check_window()
        for name, least in (("num_prefixes", 1), ("num_trained", 2)):
            value = getattr(self, name)
            if value is not None and not least <= value <= self.num_generations:
                raise ValueError(
                    f"{name} {value} must lie within [{least}, {self.num_generations}], which is num_generations"
                )
        StochasticSampler(self.noise_level, self.sde_type, log_prob_reduction=self.log_prob_reduction)

    def keeps_reference(self) -> bool:
        return self.beta > 0

    def _trainable_steps(self) -> int:
        """Steps that can be stochastic: the last step of cps has no noise."""
        return self.num_inference_steps - (1 if self.sde_type == "cps" else 0)

    def _check_window(self) -> None:
        trainable, steps = self._trainable_steps(), f"{self.num_inference_steps} steps"
        if self.sde_type == "cps":
            steps += ", the last of cps having no noise"
        if self.sde_window_range is None and not 1 <= self.window_size <= trainable:
            raise ValueError(f"sde_window_size {self.window_size} must lie within [1, {trainable}]: {steps}")
        first, end = self._window_range()
        if not 0 <= first < end <= trainable:
            raise ValueError(f"sde_window_range {[first, end]} must lie within [0, {trainable}]: {steps}")
        if not 1 <= self.window_size <= end - first:
            raise ValueError(
                f"sde_window_size {self.window_size} must be between 1 and the {end - first} steps of sde_window_range"
            )

    @property
    def clip_range(self) -> tuple[float, float]:
        """How far the ratio may go below and above 1."""
        return self.epsilon, self.epsilon if self.epsilon_high is None else self.epsilon_high

    @property
    def window_size(self) -> int:
        """How many steps are stochastic and trained."""
        if self.sde_window_size is not None:
            return self.sde_window_size
        if self.sde_window_range is not None:
            first, end = self._window_range()
            return end - first
        return self._trainable_steps()

    def _window_range(self) -> tuple[int, int]:
        if self.sde_window_range is None:
            return 0, self.window_size
        if len(self.sde_window_range) != 2:
            raise ValueError(f"sde_window_range must be two numbers, [first, end), found {self.sde_window_range}")
        return self.sde_window_range[0], self.sde_window_range[1]

    def sde_steps(self, update: int) -> tuple[int, ...]:
        """The stochastic steps of a rollout: the same for all images and processes, or groups would not compare."""
        first, end = self._window_range()
        starts = end - first - self.window_size + 1
        if self.sde_window_schedule == "sliding":
            start = first + update // self.sde_window_interval * self.sde_window_stride % starts
        else:
            start = first + int(seeded_noise((self.seed, update, "sde_window"), (starts,)).argmax())
        return tuple(range(start, start + self.window_size))

    def plan(self, update: int) -> SamplingPlan:
        """How the rollout of ``update`` is sampled: by an SDE on its stochastic steps."""
        return replace(
            super().plan(update),
            sde_steps=self.sde_steps(update),
            noise_level=self.noise_level,
            sde_type=self.sde_type,
            log_prob_reduction=self.log_prob_reduction,
        )

    def dealing(self) -> dict[str, Any]:
        names = (
            *("seed", "data_seed", "num_generations", "generation_batch_size", "num_iterations", "height", "width"),
            *("num_inference_steps", "guidance_scale", "negative_prompt", "noise_level", "sde_type", "sde_window_size"),
            *("sde_window_range", "sde_window_schedule", "sde_window_interval", "sde_window_stride", "num_prefixes"),
            *("num_trained", "log_prob_reduction"),
        )
        return super().dealing() | {name: getattr(self, name) for name in names}

    # -- how a rollout becomes optimizer updates --------------------------------------------------------------------

    def micro_batches_per_pass(self, world_size: int) -> int:
        """Micro-batches that one pass over a rollout makes on each process."""
        transitions = self.generation_batch_size // world_size * self.window_size
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
        transitions = images * self.window_size
        per_update = self.per_device_train_batch_size * self.gradient_accumulation_steps
        if transitions % per_update:
            raise ValueError(
                f"a rollout is {images} images x {self.window_size} trained steps = {transitions} transitions on each "
                f"process, which per_device_train_batch_size {self.per_device_train_batch_size} x "
                f"gradient_accumulation_steps {self.gradient_accumulation_steps} = {per_update} does not divide: "
                f"one update per rollout would be {transitions} = batch size x accumulation"
            )


class ConsistencyError(RuntimeError):
    """Replaying a rollout under the policy that drew it does not give ratio 1."""


class GRPOTrainer(GroupTrainer):
    """Group relative policy optimisation of a flow model.

    Args:
        args: see :class:`GRPOConfig`. All others, and what is raised: see :class:`align.online.trainer.GroupTrainer`.
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
