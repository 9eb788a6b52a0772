"""Settings of GRPO, named as in TRL and Flow-GRPO, and the sums that batch sizes must satisfy."""

from dataclasses import dataclass, replace
from typing import Any, Literal

from align.flow import Reduction, SDEType, StochasticSampler
from align.flow_config import setting
from align.group_config import AdvantageConfig
from align.rollout import SamplingPlan, seeded_noise

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
