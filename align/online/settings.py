"""Settings of the algorithms that learn from groups of their own samples: GRPO, DiffusionNFT and online DPO."""

from dataclasses import dataclass, replace

from datasets import Dataset
from torch import Tensor

from align.engine.settings import FlowConfig, setting
from align.maths.advantages import Aggregation, GroupAdvantages, ScaleRewards, group_advantages
from align.sampling.held_out import check_columns
from align.sampling.rollout import SamplingPlan
from rewards import Reward


@dataclass
class GroupConfig(FlowConfig):
    """Arguments of :class:`align.online.trainer.GroupTrainer`: groups of samples, and how often each rollout is gone over."""

    num_generations: int = setting(16, "Images per prompt: the group.")
    generation_batch_size: int = setting(128, "Images per rollout, over all processes.")
    num_iterations: int = setting(1, "Passes over one rollout.")
    save_rollouts: bool = setting(
        False, "Keep every image of the run with its rewards in output_dir/rollouts, a ranked data set for DPO."
    )

    # Held-out evaluation, by the ODE.
    eval_num_inference_steps: int | None = setting(None, "Denoising steps. Default: as in the rollout.")
    eval_rollout_batch_size: int | None = setting(None, "Images per forward. Default: as in the rollout.")

    def __post_init__(self) -> None:
        super().__post_init__()
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

    def plan(self, update: int) -> SamplingPlan:
        """How the rollout of ``update`` is sampled: by the ODE."""
        return FlowConfig.eval_plan(self)

    def eval_plan(self) -> SamplingPlan:
        return replace(
            super().eval_plan(),
            num_inference_steps=self.eval_num_inference_steps or self.num_inference_steps,
            batch_size=self.eval_rollout_batch_size or self.rollout_batch_size,
        )

    # -- how a rollout becomes optimizer updates --------------------------------------------------------------------

    def micro_batches_per_pass(self, world_size: int) -> int:
        """Micro-batches that one pass over a rollout makes on each process."""
        raise NotImplementedError

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


@dataclass
class AdvantageConfig(GroupConfig):
    """How GRPO and NFT compare the images of a group."""

    advantage_clip: float = setting(5.0, "Bound on the advantage; NFT: at which an image counts as optimal.")
    scale_rewards: ScaleRewards = setting("group", "Divide advantages by the std of the group, the batch, or none.")
    multi_objective_aggregation: Aggregation = setting(
        "sum_then_normalize", "Several rewards: sum raw, or normalize_then_sum within the group first."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_choices(scale_rewards=ScaleRewards, multi_objective_aggregation=Aggregation)
        self.check_positive("advantage_clip")

    def advantages(self, rewards: Tensor, weights: Tensor) -> GroupAdvantages:
        """:func:`align.maths.advantages.group_advantages` under these settings."""
        return group_advantages(
            rewards,
            self.num_generations,
            weights,
            scale_rewards=self.scale_rewards,
            aggregation=self.multi_objective_aggregation,
            clip=self.advantage_clip,
        )


def check_data(
    rewards: list[Reward], args: GroupConfig, train: Dataset, evaluation: Dataset | None, guards: dict[str, Dataset]
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
