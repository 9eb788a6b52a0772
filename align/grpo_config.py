"""Settings of GRPO, named as in TRL and Flow-GRPO, and the sums that batch sizes must satisfy."""

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from datasets import Dataset

from align.advantages import Aggregation, ScaleRewards
from align.arguments import resolve_dataset
from align.data_arguments import load_guards
from align.evaluation import check_columns
from align.flow import Reduction, SDEType, StochasticSampler
from align.flow_config import FlowConfig, setting
from align.rollout import SamplingPlan, seeded_noise
from preference_data.prompts import load_prompts
from rewards import Reward


@dataclass
class GRPOConfig(FlowConfig):
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
        "[first, end): the window's start is drawn once per rollout so that it fits in here. Default: its start is step 0.",
    )
    shared_initial_noise: bool = setting(False, "All images of a group start from the same noise.")

    # Groups and passes.
    num_generations: int = setting(16, "Images per prompt: the group.")
    generation_batch_size: int = setting(128, "Images per rollout, over all processes.")
    num_iterations: int = setting(1, "Passes over one rollout.")
    save_rollouts: bool = setting(
        False, "Keep every image of the run with its rewards in output_dir/rollouts, a ranked data set for DPO."
    )

    # Objective.
    epsilon: float = setting(1e-4, "Clip range below 1. Per latent dimension with log_prob_reduction: mean.")
    epsilon_high: float | None = setting(None, "Clip range above 1. Default: epsilon.")
    beta: float = setting(0.0, "Weight of the KL to the reference. 0 runs no reference.")
    advantage_clip: float = setting(5.0, "Bound on the advantage.")
    scale_rewards: ScaleRewards = setting("group", "Divide advantages by the std of the group, the batch, or none.")
    multi_objective_aggregation: Aggregation = setting(
        "sum_then_normalize", "Several rewards: sum raw, or normalize_then_sum within the group first."
    )
    log_prob_reduction: Reduction = setting(
        "mean", "Over latent dimensions: mean (published clip ranges) or sum (the report)."
    )
    consistency_tolerance: float = setting(
        0.1, "Largest |ratio - 1| of a replayed rollout, as a fraction of the clip range."
    )

    # Held-out evaluation, by the ODE.
    eval_num_inference_steps: int | None = setting(None, "Denoising steps. Default: as in the rollout.")
    eval_rollout_batch_size: int | None = setting(None, "Images per forward. Default: as in the rollout.")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_choices(
            sde_type=SDEType,
            scale_rewards=ScaleRewards,
            multi_objective_aggregation=Aggregation,
            log_prob_reduction=Reduction,
        )
        self.check_positive("epsilon", "epsilon_high", "noise_level", "consistency_tolerance", "advantage_clip")
        self.check_least("beta", 0)
        for name in ("num_iterations", "generation_batch_size", "eval_rollout_batch_size"):
            self.check_least(name, 1)
        self.check_least("eval_num_inference_steps", 2)
        if self.num_generations < 2:
            raise ValueError(
                f"num_generations must be at least 2: images of one prompt are compared, found {self.num_generations}"
            )
        if self.generation_batch_size % self.num_generations:
            near = max(1, round(self.generation_batch_size / self.num_generations)) * self.num_generations
            raise ValueError(
                f"generation_batch_size {self.generation_batch_size} must be a multiple of num_generations "
                f"{self.num_generations}, for whole groups: the nearest is {near}"
            )
        self._check_window()
        StochasticSampler(self.noise_level, self.sde_type, log_prob_reduction=self.log_prob_reduction)

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
        """The stochastic steps of a rollout: one draw for all images and processes, or groups would not compare."""
        first, end = self._window_range()
        starts = end - first - self.window_size + 1
        scores = seeded_noise((self.seed, update, "sde_window"), (starts,))
        start = first + int(scores.argmax())
        return tuple(range(start, start + self.window_size))

    def plan(self, update: int) -> SamplingPlan:
        """How the rollout of ``update`` is sampled."""
        return SamplingPlan(
            height=self.height,
            width=self.width,
            num_inference_steps=self.num_inference_steps,
            guidance_scale=self.guidance_scale,
            negative_prompt=self.negative_prompt,
            sde_steps=self.sde_steps(update),
            noise_level=self.noise_level,
            sde_type=self.sde_type,
            log_prob_reduction=self.log_prob_reduction,
            batch_size=self.rollout_batch_size,
        )

    def eval_plan(self) -> SamplingPlan:
        return replace(
            super().eval_plan(),
            num_inference_steps=self.eval_num_inference_steps or self.num_inference_steps,
            batch_size=self.eval_rollout_batch_size or self.rollout_batch_size,
        )

    def dealing(self) -> dict[str, Any]:
        """What decides which transitions an update is made of: the same when a run is resumed, or it is another run."""
        names = (
            *("seed", "data_seed", "num_generations", "generation_batch_size", "num_iterations", "world_size"),
            *("per_device_train_batch_size", "gradient_accumulation_steps", "height", "width", "num_inference_steps"),
            *("guidance_scale", "negative_prompt", "noise_level", "sde_type", "sde_window_size", "sde_window_range"),
            *("shared_initial_noise", "log_prob_reduction"),
        )
        return {name: getattr(self, name) for name in names}

    def check_dealing(self, file: Path) -> None:
        """Raise ValueError naming the first setting that differs from that of the checkpoint to resume."""
        if not file.is_file():
            raise FileNotFoundError(f"{file.parent} is no GRPO checkpoint: it has no {file.name}")
        now = self.dealing()
        for name, then in json.loads(file.read_text()).items():
            if name in now and now[name] != then:
                raise ValueError(
                    f"{name} is {now[name]!r} and was {then!r} when {file.parent} was written: resume with the same, or "
                    "start a new run from its LoRA with --adapter"
                )

    # -- how a rollout becomes optimizer updates --------------------------------------------------------------------

    def micro_batches_per_pass(self, world_size: int) -> int:
        """Micro-batches that one pass over a rollout makes on each process."""
        transitions = self.generation_batch_size // world_size * self.window_size
        return transitions // self.per_device_train_batch_size

    def micro_batches_per_rollout(self, world_size: int) -> int:
        return self.micro_batches_per_pass(world_size) * self.num_iterations

    def check_world(self, world_size: int) -> None:
        """Raise ValueError when a rollout cannot be dealt evenly over ``world_size`` processes and their updates."""
        if self.generation_batch_size % world_size:
            raise ValueError(
                f"generation_batch_size {self.generation_batch_size} must be a multiple of the {world_size} processes"
            )
        images = self.generation_batch_size // world_size
        if self.save_rollouts and images % self.num_generations:
            raise ValueError(
                f"save_rollouts needs whole groups on each process: {images} images are no multiple of num_generations "
                f"{self.num_generations}"
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


def check_data(
    rewards: list[Reward], args: GRPOConfig, train: Dataset, evaluation: Dataset | None, guards: dict[str, Dataset]
) -> None:
    """Raise ValueError when prompts, columns or sizes cannot work, before anything is loaded."""
    check_columns(rewards, [train, *([evaluation] if evaluation is not None else []), *guards.values()])
    wanted = args.generation_batch_size // args.num_generations
    if len(train) < wanted:
        raise ValueError(
            f"a rollout takes {wanted} prompts (generation_batch_size {args.generation_batch_size} / num_generations "
            f"{args.num_generations}) and the data holds {len(train)}"
        )
    if not any(reward.weight for reward in rewards):
        raise ValueError("every reward has weight 0: nothing would be trained on")
    if guards and evaluation is None:
        raise ValueError("guard data sets are evaluated beside held-out prompts: give --eval_dataset_name too")
    args.check_evaluation(evaluation is not None)


@dataclass
class DataArguments:
    """Prompts and rewards."""

    dataset_name: str = field(
        metadata={"help": "Prompts: a file, a folder with train.jsonl, a hub name, or tiny/NAME."}
    )
    rewards: list[str] = field(metadata={"help": "Built-in names, module:attr or file.py:attr; mappings in a config."})
    dataset_split: str = field(default="train", metadata={"help": "Split to train on."})
    eval_dataset_name: str | None = field(default=None, metadata={"help": "Held-out prompts; default: none."})
    eval_split: str = field(default="test", metadata={"help": "Split of the held-out prompts and the guards."})
    guard_dataset_names: list[str] | None = field(
        default=None, metadata={"help": "Further held-out prompts to watch for damage, logged as eval_NAME_..."}
    )

    def load(self) -> tuple[Dataset, Dataset | None, dict[str, Dataset]]:
        """The training, the held-out and the guard prompts."""
        train = load_prompts(resolve_dataset(self.dataset_name), self.dataset_split)
        held_out = None
        if self.eval_dataset_name:
            held_out = load_prompts(resolve_dataset(self.eval_dataset_name), self.eval_split)
        return train, held_out, load_guards(self.guard_dataset_names, self.eval_split)
