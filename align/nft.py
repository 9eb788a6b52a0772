"""DiffusionNFT for flow-matching image models (Diffusion Negative-aware FineTuning, arXiv 2509.16117).

    accelerate launch align/nft.py --config configs/tiny/nft.yaml

One rollout, read top to bottom in :class:`NFTTrainer`:

1. every prompt of the batch is sampled ``num_generations`` times by the ODE, with the weights of the sampling policy,
   v_old, which follow the trained ones slowly;
2. the rewards score the images; an image's optimality r in [0, 1] is 1/2 + A / (2 advantage_clip), of its advantage A
   against its own prompt's group;
3. every image is noised again, to ``num_train_sigmas`` levels: x = (1 - s) x0 + s eps, v = eps - x0. An implicit positive
   policy v+ = (1 - b) v_old + b v_theta is drawn to v with the weight r, an implicit negative one
   v- = (1 + b) v_old - b v_theta with the weight 1 - r. No likelihood, no stochastic step, no trajectory is needed.

Names: the paper's beta, b above, is ``nft_beta``, for ``beta`` is the weight of the KL to the reference, as in GRPO.

Where v_theta = v_old, the gradient is that of A times the (weighted) flow-matching error, whatever ``nft_beta``; away from
there v_theta is drawn back to v_old, the more strongly the larger ``nft_beta`` is. Without memory
(``sampling_decay_rate: 0``) the first update on a rollout has v_theta = v_old. With one update a rollout every update is
then a first one, and v_old costs no forward of its own.

Deviations from the paper and its code:

- a group whose rewards are all equal (r = 1/2), and an image without a score, are not run through the model, as in GRPO;
  the mean is still taken over all images, those counting 0. Where v_theta = v_old the policies' errors give them no
  gradient anyway; elsewhere they would draw v_theta back to v_old, and with ``beta`` above 0 to the reference;
- v_old is taken when the images are drawn, at the very points that are trained on, so that the two sets of weights are
  never swapped in the loss; several passes over a rollout see the same points;
- advantages are divided by the group's standard deviation by default (``scale_rewards: batch`` is the paper's);
- images may be trained at fewer noise levels than the schedule has, and at logit-normal ones;
- with ``guidance_scale`` above 1 the guided velocity is the policy, in sampling and in the loss; the paper uses none.
"""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from align.cli.data import DataArguments
from align.cli.launch import run
from align.engine.matching import NoiseLevels
from align.engine.settings import setting
from align.engine.weights import WeightCopy
from align.maths.flow import Solver, add_noise, velocity_target
from align.maths.losses import LossResult, flow_matching_loss, nft_loss
from align.online.buffers import PointBatch, PointBuffer
from align.online.settings import AdvantageConfig
from align.online.trainer import OnlineTrainer
from align.sampling.noise import seeded_generator, seeded_noise
from align.sampling.rollout import SamplingPlan
from preference_data.buckets import Bucket

TrainSigmas = Literal["schedule", "logit_normal"]

#: In a checkpoint: the weights of the sampling policy.
SAMPLING_POLICY = "sampling_policy.safetensors"


@dataclass
class NFTConfig(NoiseLevels, AdvantageConfig):
    """Arguments of :class:`NFTTrainer`, over ``transformers.TrainingArguments``.

    ``per_device_train_batch_size`` counts points: (image, noise level) pairs of one forward and backward.
    """

    num_inference_steps: int = setting(10, "Denoising steps of a rollout.", fixed_on_resume=True, least=2)
    solver: Solver = setting(
        "euler", "Of the rollout's ODE: euler, or ab2, of second order at no more forwards.", fixed_on_resume=True
    )

    # The sampling policy.
    sampling_decay_rate: float = setting(
        0.001,
        "Before rollout i the sampling policy keeps the share min(rate x i, max) of itself. 0: it is the trained one.",
        fixed_on_resume=True,
        least=0,
    )
    sampling_decay_max: float = setting(0.5, "See sampling_decay_rate.", fixed_on_resume=True, least=0, below=1)

    # Objective.
    nft_beta: float = setting(
        1.0, "The paper's beta: how far the implicit policies lie from the sampling one.", above=0
    )
    beta: float = setting(
        0.0, "Weight of the squared distance to the reference's velocity. 0 runs no reference.", least=0
    )
    adaptive_weighting: bool = setting(True, "Divide each squared error by its image's mean absolute error.")
    train_sigmas: TrainSigmas = setting(
        "schedule",
        "Noise levels trained at: schedule, those of the rollout's steps; or logit_normal (logit_mean, _std).",
        fixed_on_resume=True,
    )
    num_train_sigmas: int | None = setting(
        None,
        "Noise levels an image is trained at, all different. Default: as many as there are denoising steps.",
        fixed_on_resume=True,
        least=1,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.train_sigmas == "schedule" and self.points_per_image > self.num_inference_steps:
            raise ValueError(
                f"num_train_sigmas {self.num_train_sigmas} is more than the schedule's {self.num_inference_steps} noise "
                "levels: take as many, or train_sigmas: logit_normal"
            )

    @property
    def points_per_image(self) -> int:
        """Noise levels an image is trained at."""
        return self.num_train_sigmas or self.num_inference_steps

    @property
    def remembers(self) -> bool:
        """Whether the sampling policy is ever another than the trained one."""
        return self.sampling_decay_rate > 0 and self.sampling_decay_max > 0

    def keeps_reference(self) -> bool:
        return self.beta > 0

    def full_copy(self) -> str | None:
        sampling_policy = f"sampling_decay_rate {self.sampling_decay_rate}" if self.remembers else None
        return super().full_copy() or sampling_policy

    def plan(self, rollout_index: int) -> SamplingPlan:
        return replace(super().plan(rollout_index), solver=self.solver)

    # -- how a rollout becomes optimizer updates --------------------------------------------------------------------

    def micro_batches_per_pass(self, world_size: int) -> int:
        return self.generation_batch_size // world_size * self.points_per_image // self.per_device_train_batch_size

    def check_world(self, world_size: int) -> None:
        super().check_world(world_size)
        images = self.generation_batch_size // world_size
        points = images * self.points_per_image
        per_update = self.per_device_train_batch_size * self.gradient_accumulation_steps
        if points % per_update:
            raise ValueError(
                f"a rollout is {images} images x {self.points_per_image} noise levels = {points} points on each process, "
                f"which per_device_train_batch_size {self.per_device_train_batch_size} x gradient_accumulation_steps "
                f"{self.gradient_accumulation_steps} = {per_update} does not divide: one update per rollout would be "
                f"{points} = batch size x accumulation"
            )

    def one_update(self, world_size: int) -> bool:
        """Whether a rollout is used for a single optimizer update."""
        return self.micro_batches_per_rollout(world_size) == self.gradient_accumulation_steps


class NFTTrainer(OnlineTrainer):
    """Online reinforcement of a flow model on its forward process.

    Args:
        args: see :class:`NFTConfig`. All others, and what is raised: see :class:`align.online.trainer.OnlineTrainer`.
    """

    args: NFTConfig
    algorithm = "DiffusionNFT"
    buffer_type = PointBuffer

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.args.beta > 0:
            self.flow.keep_reference()
        self._old: WeightCopy | None = None  # the sampling policy's weights, where they are others than the trained

    # -- 1 and 2: sample, score, compare, noise ---------------------------------------------------------------------

    def collect(self, rows: list[dict[str, Any]], rollout_index: int) -> PointBuffer:
        args = self.args
        self._follow(rollout_index)
        with self._sampling_policy():
            drawn, rewards, weights = self.sample(rows, rollout_index)
            group = args.advantages(rewards, weights)
            self.record_rewards(rewards, group.rewards, group.dead_groups)
            first, device = args.process_index * len(rows), drawn.latents.device
            optimality = 0.5 + group.advantages / (2 * args.advantage_clip)
            buffer = self.image_buffer(
                rows,
                group.informative,
                rollout_index,
                latents=drawn.latents,
                sigma=self._draw_sigma(first, len(rows), rollout_index).to(device),
                optimality=optimality[first : first + len(rows)].to(device),
            )
            if args.remembers or not args.one_update(args.world_size):
                with self.metrics.timed("rollout"):
                    buffer.old_velocity = self._old_velocity(buffer)
        return buffer

    def _follow(self, rollout_index: int) -> None:
        """Move the sampling policy before a rollout: eta of itself and 1 - eta of the trained one."""
        if not self.args.remembers:
            return
        if self._old is None:
            self._old = WeightCopy(self.model)
        eta = min(self.args.sampling_decay_rate * rollout_index, self.args.sampling_decay_max)
        self._old.follow(eta)
        self.metrics.record(sampling_decay=eta)

    def _sampling_policy(self) -> AbstractContextManager[None]:
        return nullcontext() if self._old is None else self._old.applied()

    def _draw_sigma(self, first: int, images: int, rollout_index: int) -> Tensor:
        """Draw (K * images,) noise levels of the rollout's images from ``first`` on, keyed by their place in the run."""
        args, levels = self.args, self.args.points_per_image
        numbers = range(first, first + images)
        if args.train_sigmas == "logit_normal":
            places = [(level, image) for level in range(levels) for image in numbers]
            streams = [seeded_generator((args.seed, rollout_index, "sigma", image, level)) for level, image in places]
            return args.draw_sigma(streams, self.flow, Bucket(args.height, args.width))
        schedule = self.flow.sigmas(args.num_inference_steps, args.height, args.width)[:-1].cpu()
        shape = (len(schedule),)
        orders = [seeded_noise((args.seed, rollout_index, "sigma", image), shape).argsort() for image in numbers]
        return schedule[torch.stack(orders, 1)[:levels]].flatten()

    @torch.no_grad()
    def _old_velocity(self, buffer: PointBuffer) -> Tensor:
        """Return the (K * N, tokens, channels) velocities of the sampling policy, which the model now carries.

        Rows of dead images stay 0.
        """
        old = torch.zeros(len(buffer.sigma), *buffer.latents.shape[1:], device=buffer.latents.device)
        for index in range(buffer.batching.micro_batches):  # split as for the first pass: another batch, another kernel
            batch = buffer.micro_batch(index)
            if len(batch):
                with self.compute_loss_context_manager():
                    old[batch.rows] = self._velocity(batch, self.model_wrapped)
                self._count(batch, trained=False)
        return old

    # -- 3: the loss ------------------------------------------------------------------------------------------------

    def loss(self, model: torch.nn.Module, batch: PointBatch) -> LossResult:
        """Return :func:`nft_objective` of a micro-batch."""
        if not len(batch):  # every group was dead: nothing to train on, and no forward is spent
            return self.no_loss()
        reference = self._reference_velocity(batch, model) if self.args.beta > 0 else None
        velocity = self._velocity(batch, model)
        self._count(batch, trained=True)
        return nft_objective(batch, velocity, reference, self.args)

    def _velocity(self, batch: PointBatch, transformer: torch.nn.Module) -> Tensor:
        noisy = add_noise(batch.latents, batch.noise, batch.sigma)
        return self.policy_velocity(transformer)(noisy, batch.sigma, batch.conditions)

    def _reference_velocity(self, batch: PointBatch, model: torch.nn.Module) -> Tensor:
        # A frozen copy was made before the launcher wrapped the model in its autocast: give it the same.
        with torch.no_grad(), self.accelerator.autocast(), self.flow.reference(model) as reference:
            velocity = self._velocity(batch, reference)
        self._count(batch, trained=False)
        return velocity

    def _count(self, batch: PointBatch, trained: bool) -> None:
        self.count_forwards(len(batch), trained=trained, guided=self.args.guidance_scale > 1)

    # -- the run ----------------------------------------------------------------------------------------------------

    def train(self, *args: Any, **kwargs: Any) -> Any:
        self._old = None
        return super().train(*args, **kwargs)

    def _restore(self) -> None:
        super()._restore()
        if self.args.remembers and self.resumed_from is not None:
            self._old = WeightCopy(self.model)
            self._old.load(self.resumed_from / SAMPLING_POLICY)

    def save_progress(self, folder: Path) -> None:
        super().save_progress(folder)
        if self._old is not None and self.args.should_save:
            self._old.save(folder / SAMPLING_POLICY)


def nft_objective(batch: PointBatch, velocity: Tensor, reference: Tensor | None, settings: NFTConfig) -> LossResult:
    """Return (advantage_clip / nft_beta) (r |v+ - v|^2 + (1 - r) |v- - v|^2) + beta |v_theta - v_ref|^2.

    The first factor is the authors': the gradient at v_theta = v_old is that of A times the error.

    Args:
        velocity: v_theta at the batch's points, with gradient; it is v_old too where the batch has none.
        reference: v_ref there, where ``settings.beta`` weighs the distance to it.
    """
    old = velocity.detach() if batch.old_velocity is None else batch.old_velocity
    target = velocity_target(batch.latents, batch.noise)
    result = nft_loss(
        velocity, old, target, batch.sigma, batch.optimality, settings.nft_beta, settings.adaptive_weighting
    )
    loss = settings.advantage_clip / settings.nft_beta * result.loss
    metrics: dict[str, float | list[float]] = {}
    if reference is not None:
        distance = flow_matching_loss(velocity, reference)
        loss = loss + settings.beta * distance
        metrics["reference_distance"] = distance.mean().item()
    metrics |= {
        "error_positive": result.positive.mean().item(),
        "error_negative": result.negative.mean().item(),
        "old_distance": flow_matching_loss(velocity.detach(), old).mean().item(),
    }
    # Dead images were left out of the batch and count 0 in the mean over all of them.
    return LossResult((loss * batch.weights).sum() / batch.nominal_size, metrics)


def main(argv: list[str] | None = None) -> None:
    """Train from a config."""
    run(DataArguments, NFTConfig, NFTTrainer, argv)


if __name__ == "__main__":
    # Run by path this file is `__main__`; its classes must be known by their own module's name in what is saved.
    from align.nft import main as by_name

    by_name()
