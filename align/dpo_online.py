"""Online DPO for flow-matching image models (Guo et al., arXiv 2402.04792; Diffusion-DPO, 2311.12908; Qwen-Image report,
2508.02324, section 4.1).

    accelerate launch align/dpo_online.py --config configs/tiny/dpo_online.yaml

One rollout, read top to bottom in :class:`OnlineDPOTrainer`:

1. every prompt of the batch is sampled ``num_generations`` times by the ODE, with the policy as it now is;
2. the rewards score the images; the best and the worst of a prompt are its pair;
3. ``num_iterations`` passes of DPO over the pairs, with fresh noise and a fresh noise level for each pair in each pass.

Deviations from Guo et al.:

- rewards, which anyone can plug in, take the place of the annotating language model, and rank ``num_generations`` images
  where the paper compares two answers: the pair is wider apart;
- a prompt whose images score the same, or of which fewer than two have a score, makes no pair, is not trained on, and
  counts in ``dead_groups``; the mean is still taken over all prompts, those counting 0, so that updates become smaller
  as pairs become rare, and the first loss is log 2 times the share of prompts that made a pair;
- a rollout can be gone over more than once, or in several updates.

A pair's latents are those that the sampler ended on, not the decoded image encoded again as in offline DPO, which has
nothing else. The policy is a distribution of latents; the VAE does not give back what it was given, and an 8-bit image
of it less so. With the round trip one would train on latents that no policy ever drew.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor

from align.cli.data import DataArguments
from align.cli.launch import run_on_groups
from align.dpo import DPOSettings, dpo_errors, dpo_objective
from align.engine.matching import MatchingBatch, NoiseLevels
from align.engine.settings import setting
from align.maths.advantages import best_worst
from align.online.buffers import PairBatch, PairBuffer
from align.online.settings import GroupConfig
from align.online.trainer import GroupTrainer
from align.sampling.noise import seeded_generator, seeded_noise
from preference_data.buckets import Bucket

#: In a checkpoint: what is left of a rollout.
PAIRS = "pairs.safetensors"


@dataclass
class OnlineDPOConfig(DPOSettings, NoiseLevels, GroupConfig):
    """Arguments of :class:`OnlineDPOTrainer`. ``per_device_train_batch_size`` counts groups, a pair each at most."""

    num_generations: int = setting(8, "Images per prompt: the group, of which the best and the worst are trained on.")
    min_margin: float = setting(0.0, "Make no pair of images whose rewards differ by less.")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_least("min_margin", 0)

    @property
    def _groups(self) -> int:
        return self.generation_batch_size // self.num_generations

    def micro_batches_per_pass(self, world_size: int) -> int:
        return self._groups // (self.per_device_train_batch_size * world_size)

    def check_world(self, world_size: int) -> None:
        super().check_world(world_size)
        size, accumulation = self.per_device_train_batch_size, self.gradient_accumulation_steps
        if self._groups % (size * accumulation * world_size):
            raise ValueError(
                f"a rollout is generation_batch_size {self.generation_batch_size} / num_generations "
                f"{self.num_generations} = {self._groups} groups, a pair each, which per_device_train_batch_size {size} "
                f"x gradient_accumulation_steps {accumulation} x {world_size} processes = "
                f"{size * accumulation * world_size} does not divide: one update per rollout would be {self._groups}"
            )

    def dealing(self) -> dict[str, Any]:
        names = (
            *("seed", "data_seed", "num_generations", "generation_batch_size", "num_iterations", "min_margin"),
            *("height", "width", "num_inference_steps", "guidance_scale", "negative_prompt"),
            *("logit_mean", "logit_std"),
        )
        # However processes and micro-batches share an update: its pairs, and their noise, are the same.
        return super().dealing() | {name: getattr(self, name) for name in names}


class OnlineDPOTrainer(GroupTrainer):
    """Direct preference optimisation on pairs of the policy's own images, made as it goes.

    Args:
        model: the policy; its present weights, an adapter already loaded included, are the reference.
        args: see :class:`OnlineDPOConfig`. All others, and what is raised: see :class:`align.online.trainer.GroupTrainer`.
    """

    args: OnlineDPOConfig
    algorithm = "online DPO"

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.flow.keep_reference()

    # -- 1 and 2: sample, score, pair -------------------------------------------------------------------------------

    def generate(self, rows: list[dict[str, Any]], update: int) -> PairBuffer:
        args = self.args
        result, rewards, weights = self.sample(rows, update)
        pairs = best_worst(rewards, args.num_generations, weights, args.min_margin)
        self.record_rewards(rewards, pairs.rewards, 1.0 - pairs.live.float().mean().item())
        # Every process knows all pairs and takes its share of them, wherever they were sampled.
        latents = self.accelerator.gather(result.latents).cpu()
        prompts = gather_object([row["prompt"] for row in rows])
        couples = torch.stack([pairs.best, pairs.worst], 1)[pairs.live]
        return PairBuffer(
            latents=latents[couples],
            prompts=[prompts[best] for best in couples[:, 0].tolist()],
            groups=pairs.live.nonzero().flatten().tolist(),
            update=update,
            seed=args.seed,
            **self._split(),
        )

    def _split(self) -> dict[str, Any]:
        """How a pass over the pairs is shared out."""
        args = self.args
        micro_batches = args.micro_batches_per_pass(args.world_size)
        return {"micro_batches": micro_batches, "process": (args.process_index, args.world_size)}

    # -- 3: the loss ------------------------------------------------------------------------------------------------

    def noised(self, pairs: PairBatch) -> MatchingBatch:
        """The pairs with noise and noise level, the same for both images; keyed by the pair's place in the run."""
        args, bucket = self.args, Bucket(self.args.height, self.args.width)
        streams = [seeded_generator((args.seed, "sigma", *place)) for place in pairs.places]
        noise = [seeded_noise((args.seed, "noise", *place), pairs.latents.shape[2:]) for place in pairs.places]
        sigma, device = args.draw_sigma(streams, self.flow, bucket), self.accelerator.device
        return MatchingBatch(
            pairs.latents.to(device), torch.stack(noise).to(device), sigma.to(device), pairs.prompts, bucket
        )

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: PairBatch,
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Tensor:
        """The mean of :func:`align.dpo.dpo_objective` over the micro-batch's groups, those without a pair counting 0."""
        if not len(inputs):
            return self._keep_in_step(model) if self.in_step else self.no_loss()
        return dpo_objective(self, self.args, self.noised(inputs), model).sum() / self.args.per_device_train_batch_size

    def _keep_in_step(self, model: torch.nn.Module) -> Tensor:
        """No loss, by the forwards that the other processes run: they wait for this one's."""
        latents = torch.zeros(1, 2, *self.flow.latent_shape(self.args.height, self.args.width))
        place_holder = PairBatch(latents, [self.args.negative_prompt], [(0, 0, 0)])
        errors, _ = dpo_errors(self, self.noised(place_holder), model)
        self.count_forwards(errors.numel(), trained=True)
        return 0.0 * errors.sum()

    # -- checkpoints ------------------------------------------------------------------------------------------------

    def save_buffer(self, folder: Path) -> None:
        if self.args.should_save:
            self._buffer.save(folder / PAIRS)

    def load_buffer(self, folder: Path) -> PairBuffer:
        return PairBuffer.load(folder / PAIRS, **self._split())


def main(argv: list[str] | None = None) -> None:
    """Train from a config."""
    run_on_groups(DataArguments, OnlineDPOConfig, OnlineDPOTrainer, argv)


if __name__ == "__main__":
    # Run by path this file is `__main__`; its classes must be known by their own module's name in what is saved.
    from align.dpo_online import main as run

    run()
