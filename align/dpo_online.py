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
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor

from align.cli.data import DataArguments
from align.cli.launch import run
from align.dpo import DPOSettings, dpo_errors, dpo_objective
from align.engine.matching import MatchingBatch, NoiseLevels
from align.engine.settings import setting
from align.maths.advantages import best_worst
from align.maths.losses import LossResult
from align.models.contract import Request
from align.online.pairs import PairBatch, PairBuffer
from align.online.settings import OnlineConfig
from align.online.trainer import OnlineTrainer
from align.sampling.noise import seeded_generator, seeded_noise
from align.sampling.scored import requests_of
from preference_data.buckets import Bucket


@dataclass
class OnlineDPOConfig(DPOSettings, NoiseLevels, OnlineConfig):
    """Arguments of :class:`OnlineDPOTrainer`. ``per_device_train_batch_size`` counts groups, a pair each at most."""

    num_generations: int = setting(
        8, "Images per prompt: the group, of which the best and the worst are trained on.", fixed_on_resume=True
    )
    beta: float = setting(
        100.0,
        "How strongly the policy is held to the reference, in the units of DPO; verl's online DPO of Qwen-Image has 100.",
        above=0,
    )
    min_margin: float = setting(
        0.0, "Make no pair of images whose rewards differ by less.", fixed_on_resume=True, least=0
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_objective()

    def keeps_reference(self) -> bool:
        return True

    def micro_batches_per_pass(self, world_size: int) -> int:
        return self.groups_per_rollout // (self.per_device_train_batch_size * world_size)

    def check_world(self, world_size: int) -> None:
        super().check_world(world_size)
        size, accumulation = self.per_device_train_batch_size, self.gradient_accumulation_steps
        if self.groups_per_rollout % (size * accumulation * world_size):
            raise ValueError(
                f"a rollout is generation_batch_size {self.generation_batch_size} / num_generations "
                f"{self.num_generations} = {self.groups_per_rollout} groups, a pair each, which "
                f"per_device_train_batch_size {size} x gradient_accumulation_steps {accumulation} x {world_size} processes "
                f"= {size * accumulation * world_size} does not divide: one update per rollout would be "
                f"{self.groups_per_rollout}"
            )


class OnlineDPOTrainer(OnlineTrainer):
    """Direct preference optimisation on pairs of the policy's own images, made as it goes.

    Args:
        model: the policy; its present weights, an adapter already loaded included, are the reference.
        args: see :class:`OnlineDPOConfig`. All others, and what is raised: see
            :class:`align.online.trainer.OnlineTrainer`.
    """

    args: OnlineDPOConfig
    algorithm = "online DPO"
    buffer_type = PairBuffer

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.flow.keep_reference()

    # -- 1 and 2: sample, score, pair -------------------------------------------------------------------------------

    def collect(self, rows: list[dict[str, Any]], rollout_index: int) -> PairBuffer:
        args = self.args
        drawn, rewards, weights = self.sample(rows, rollout_index)
        pairs = best_worst(rewards, args.num_generations, weights, args.min_margin)
        self.record_rewards(rewards, pairs.rewards, 1.0 - pairs.informative.float().mean().item())
        # Every process knows all pairs and takes its share of them, wherever they were sampled.
        latents = self.accelerator.gather(drawn.latents).cpu()
        requests = gather_object(requests_of(rows))
        indices = torch.stack([pairs.best, pairs.worst], 1)[pairs.informative]
        return PairBuffer(
            latents=latents[indices],
            requests=[requests[best] for best in indices[:, 0].tolist()],
            groups=pairs.informative.nonzero().flatten().tolist(),
            rollout_index=rollout_index,
            seed=args.seed,
            group_count=args.groups_per_rollout,
            batching=self.batching(),
        )

    # -- 3: the loss ------------------------------------------------------------------------------------------------

    def noised(self, pairs: PairBatch) -> MatchingBatch:
        """Add noise to pairs, the same for both images; noise and its level are keyed by the pair's place in the run."""
        args, bucket = self.args, Bucket(self.args.height, self.args.width)
        streams = [seeded_generator((args.seed, "sigma", *place)) for place in pairs.places]
        noise = [seeded_noise((args.seed, "noise", *place), pairs.latents.shape[2:]) for place in pairs.places]
        sigma, device = args.draw_sigma(streams, self.flow, bucket), self.accelerator.device
        return MatchingBatch(
            pairs.latents.to(device), torch.stack(noise).to(device), sigma.to(device), pairs.requests, bucket
        )

    def loss(self, model: torch.nn.Module, batch: PairBatch) -> LossResult:
        """Return :func:`align.dpo.dpo_objective` over the micro-batch's groups, those without a pair counting 0."""
        if not len(batch):
            return LossResult(self._keep_in_step(model)) if self.in_step else self.no_loss()
        noised = self.noised(batch)
        errors, errors_ref = self._errors(noised, model)
        return dpo_objective(errors, errors_ref, noised.sigma, self.args, batch.groups)

    def _keep_in_step(self, model: torch.nn.Module) -> Tensor:
        """Run the forwards that the other processes run, which wait for this one's, and return no loss."""
        latents = torch.zeros(1, 2, *self.flow.latent_shape(self.args.height, self.args.width))
        placeholder = PairBatch(latents, [Request(self.args.negative_prompt)], [(0, 0, 0)], 1)
        return 0.0 * self._errors(self.noised(placeholder), model)[0].sum()

    def _errors(self, noised: MatchingBatch, model: torch.nn.Module) -> tuple[Tensor, Tensor]:
        errors, errors_ref = dpo_errors(self.flow, noised, model, self.accelerator.autocast)
        self.count_forwards(errors_ref.numel(), trained=False)
        self.count_forwards(errors.numel(), trained=True)
        return errors, errors_ref


def main(argv: list[str] | None = None) -> None:
    """Train from a config."""
    run(DataArguments, OnlineDPOConfig, OnlineDPOTrainer, argv)


if __name__ == "__main__":
    # Run by path this file is `__main__`; its classes must be known by their own module's name in what is saved.
    from align.dpo_online import main as by_name

    by_name()
