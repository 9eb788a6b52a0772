"""Settings of the algorithms that learn from groups of their own samples: GRPO, DiffusionNFT and online DPO."""

from dataclasses import dataclass, replace

from torch import Tensor

from align.engine.settings import FlowConfig, setting
from align.maths.advantages import Aggregation, GroupAdvantages, ScaleRewards, group_advantages
from align.sampling.rollout import SamplingPlan


@dataclass
class OnlineConfig(FlowConfig):
    """Arguments of :class:`align.online.trainer.OnlineTrainer`: groups of samples, and passes over each rollout."""

    num_inference_steps: int = setting(30, "Denoising steps of a rollout.", fixed_on_resume=True, least=2)
    guidance_scale: float = setting(
        1.0, "True classifier-free guidance; acts above 1, at twice the forwards.", fixed_on_resume=True, least=0
    )
    num_generations: int = setting(16, "Images per prompt: the group.", fixed_on_resume=True)
    generation_batch_size: int = setting(128, "Images per rollout, over all processes.", fixed_on_resume=True, least=1)
    num_iterations: int = setting(1, "Passes over one rollout.", fixed_on_resume=True, least=1)
    save_rollouts: bool = setting(
        False, "Keep every image of the run with its rewards in output_dir/rollouts, a ranked data set for DPO."
    )

    # Held-out evaluation, by the ODE.
    eval_num_inference_steps: int | None = setting(None, "Denoising steps. Default: as in the rollout.", least=2)
    eval_rollout_batch_size: int | None = setting(None, "Images per forward. Default: as in the rollout.", least=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_generations < 2:
            raise ValueError(
                f"num_generations must be at least 2: images of one prompt are compared, found {self.num_generations}"
            )
        if self.generation_batch_size % self.num_generations:
            nearest = max(1, round(self.generation_batch_size / self.num_generations)) * self.num_generations
            raise ValueError(
                f"generation_batch_size {self.generation_batch_size} must be a multiple of num_generations "
                f"{self.num_generations}, for whole groups: the nearest is {nearest}"
            )

    def plan(self, rollout_index: int) -> SamplingPlan:
        """Return how a rollout is sampled: by the ODE."""
        return super().eval_plan()

    def eval_plan(self) -> SamplingPlan:
        return replace(
            super().eval_plan(),
            num_inference_steps=self.eval_num_inference_steps or self.num_inference_steps,
            batch_size=self.eval_rollout_batch_size or self.rollout_batch_size,
        )

    # -- how a rollout becomes optimizer updates --------------------------------------------------------------------

    @property
    def groups_per_rollout(self) -> int:
        """Groups of a rollout, over all processes."""
        return self.generation_batch_size // self.num_generations

    def micro_batches_per_pass(self, world_size: int) -> int:
        """Return the micro-batches that one pass over a rollout makes on each process."""
        raise NotImplementedError

    def micro_batches_per_rollout(self, world_size: int) -> int:
        """Return the micro-batches that all passes over a rollout make on each process."""
        return self.micro_batches_per_pass(world_size) * self.num_iterations

    def check_world(self, world_size: int) -> None:
        """Raise ValueError when a rollout cannot be split evenly over ``world_size`` processes and their updates."""
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
class AdvantageConfig(OnlineConfig):
    """How GRPO and NFT compare the images of a group."""

    advantage_clip: float = setting(
        5.0, "Bound on the advantage; NFT: at which an image counts as optimal.", fixed_on_resume=True, above=0
    )
    scale_rewards: ScaleRewards = setting(
        "group", "Divide advantages by the std of the group, the batch, or none.", fixed_on_resume=True
    )
    multi_objective_aggregation: Aggregation = setting(
        "sum_then_normalize",
        "Several rewards: sum raw, or normalize_then_sum within the group first.",
        fixed_on_resume=True,
    )

    def advantages(self, rewards: Tensor, weights: Tensor) -> GroupAdvantages:
        """Return :func:`align.maths.advantages.group_advantages` under these settings."""
        return group_advantages(
            rewards,
            self.num_generations,
            weights,
            scale_rewards=self.scale_rewards,
            aggregation=self.multi_objective_aggregation,
            clip=self.advantage_clip,
        )
