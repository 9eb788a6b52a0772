"""Rollout: requests to images, with a record of every stochastic step."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from tqdm.auto import tqdm

from align.maths.flow import Reduction, SDEType, Solver, StochasticSampler, Transition, ab2_velocity, ode_step
from align.models.contract import FlowModel, NotFinite, Request
from align.models.trained import without_dropout
from align.sampling.noise import ImageKey, distinct, seeded_noise


@dataclass(frozen=True)
class SamplingPlan:
    """How images are drawn.

    Args:
        height, width: pixels.
        num_inference_steps: denoising steps.
        guidance_scale: true classifier-free guidance; it acts only above 1 and then costs a second forward.
        negative_prompt: what guidance steers away from.
        sde_steps: indices of the steps that are stochastic, and so can be trained; the others are ODE steps.
        noise_level, sde_type, log_prob_reduction: see :class:`align.maths.flow.StochasticSampler`.
        batch_size: images per forward.
        solver: of ODE steps: ``euler``, or ``ab2`` (Adams-Bashforth, of second order), where every step is one.
    """

    height: int
    width: int
    num_inference_steps: int
    guidance_scale: float = 1.0
    negative_prompt: str = " "
    sde_steps: tuple[int, ...] = ()
    noise_level: float = 0.0
    sde_type: SDEType = "sde"
    log_prob_reduction: Reduction = "mean"
    batch_size: int = 16
    solver: Solver = "euler"

    def __post_init__(self) -> None:
        if self.solver != "euler" and self.sde_steps:
            raise ValueError(
                f"solver {self.solver} needs every step to be an ODE step, found SDE steps {self.sde_steps}"
            )

    def sampler(self, sigmas: Tensor) -> StochasticSampler:
        """Return the policy's noise schedule over the model's noise levels."""
        return StochasticSampler(self.noise_level, self.sde_type, float(sigmas[1]), self.log_prob_reduction)

    @property
    def shared_velocities(self) -> int:
        """The number of steps at which images with one initial noise have one velocity: up to the first stochastic."""
        return min(self.sde_steps) + 1 if self.sde_steps and self.noise_level > 0 else 0

    @property
    def forwards_per_velocity(self) -> int:
        """Transformer forwards of one image that one velocity takes."""
        return 2 if self.guidance_scale > 1 else 1


@dataclass
class Rollout:
    """N images and how they came to be.

    latents: (N, tokens, channels) clean latents. images: N decoded images. steps: the stochastic steps' indices.
    transitions: one record of N rows for each of ``steps``. sampler: the policy's noise schedule. forwards:
    transformer forwards of one image that it took. finite: no pixel is NaN or infinite; images of a chunk in which one is
    are black.
    """

    latents: Tensor
    images: list[Image.Image]
    steps: tuple[int, ...]
    transitions: list[Transition]
    sampler: StochasticSampler
    forwards: int = 0
    finite: bool = True


#: velocity(latents, sigma, conditions) -> (B, tokens, channels)
Velocity = Callable[[Tensor, Tensor, list[Any]], Tensor]


def velocity_fn(model: FlowModel, plan: SamplingPlan, transformer: nn.Module | None = None) -> Velocity:
    """Return the velocity under ``plan`` as a function: sampling, replay and reference all call this one."""
    negative = model.encode([Request(plan.negative_prompt)])[0] if plan.guidance_scale > 1 else None
    return partial(
        model.velocity,
        height=plan.height,
        width=plan.width,
        guidance_scale=plan.guidance_scale,
        negative=negative,
        transformer=transformer,
    )


@torch.no_grad()
def rollout(
    model: FlowModel,
    requests: Sequence[Request],
    keys: Sequence[ImageKey],
    plan: SamplingPlan,
    *,
    transformer: nn.Module | None = None,
    initial_latents: Tensor | None = None,
    show_progress: bool = False,
    on_images: Callable[[slice, list[Image.Image]], None] | None = None,
) -> Rollout:
    """Sample one image for each request and key.

    What images that begin with the same noise share, up to the velocity of the first stochastic step, is computed once.

    Args:
        requests, keys: N of each; repeat a request to make a group.
        transformer: the launcher's wrapper to run, ``model.transformer`` by default.
        initial_latents: (N, tokens, channels) to start from, instead of the keys' noise. show_progress: a bar over steps.
        on_images: called with a chunk's place among the N and its finite images, before the next chunk is sampled.
    """
    sigmas = model.sigmas(plan.num_inference_steps, plan.height, plan.width).to(model.device)
    conditions, count = model.encode(requests), len(requests)
    starts, first, start_of = _starts(keys, model.latent_shape(plan.height, plan.width), initial_latents)
    shared = plan.shared_velocities if len(first) < count else 0
    unshared = plan.num_inference_steps - shared  # velocities that each image needs for itself
    latents, images, records, finite = [], [], [], True
    calls = _chunks(len(first), plan) * shared + _chunks(count, plan) * unshared
    with (
        without_dropout(model.transformer),
        tqdm(total=calls, desc="rollout", leave=False, disable=not show_progress) as bar,
    ):
        velocity = _counting(velocity_fn(model, plan, transformer), bar)
        known = None
        if shared:
            starts, known = _shared_steps(velocity, plan, sigmas, starts, [conditions[row] for row in first], shared)
        for start in range(0, count, plan.batch_size):
            chunk = slice(start, start + plan.batch_size)
            rows = start_of[chunk]
            steps = range(max(shared - 1, 0), plan.num_inference_steps)
            first_v = None if known is None else known[rows]
            clean, transitions = denoise(
                velocity, plan, sigmas, starts[rows], conditions[chunk], steps, keys=keys[chunk], first_velocity=first_v
            )
            latents.append(clean)
            records.append(transitions)
            decoded = _decoded(model, clean, plan)
            finite &= decoded is not None
            if decoded and on_images is not None:
                on_images(chunk, decoded)
            images += decoded or [Image.new("RGB", (plan.width, plan.height)) for _ in clean]
    return Rollout(
        latents=torch.cat(latents),
        images=images,
        steps=plan.sde_steps,
        transitions=[Transition.cat(list(chunks)) for chunks in zip(*records, strict=True)],
        sampler=plan.sampler(sigmas),
        forwards=(len(first) * shared + count * unshared) * plan.forwards_per_velocity,
        finite=finite,
    )


def _decoded(model: FlowModel, latents: Tensor, plan: SamplingPlan) -> list[Image.Image] | None:
    """Decode latents; None where a pixel is not finite, which is told at the end: others may wait for the forwards."""
    try:
        return model.decode_latents(latents, plan.height, plan.width)
    except NotFinite:
        return None


def denoise(
    velocity: Velocity,
    plan: SamplingPlan,
    sigmas: Tensor,
    latents: Tensor,
    conditions: list[Any],
    steps: range,
    *,
    keys: Sequence[ImageKey] = (),
    first_velocity: Tensor | None = None,
) -> tuple[Tensor, list[Transition]]:
    """Take ``steps`` from ``latents``: an SDE step, with its record, on ``plan.sde_steps``, an ODE step elsewhere.

    ``keys``: one for each image, where a step is stochastic. ``first_velocity``: that of the first of ``steps``, where
    it is known already.

    Returns:
        the latents after the last step, and the records of the stochastic ones.
    """
    latents = latents.float().to(sigmas.device)
    sampler, transitions = plan.sampler(sigmas), []
    before: Tensor | None = None
    for step in steps:
        sigma, sigma_next = sigmas[step].expand(len(latents)), sigmas[step + 1].expand(len(latents))
        v = (
            first_velocity
            if step == steps.start and first_velocity is not None
            else velocity(latents, sigma, conditions)
        )
        if step in plan.sde_steps and plan.noise_level > 0:
            noise = torch.stack([seeded_noise(key.step(step), latents.shape[1:]) for key in keys])
            record = sampler.transition(latents, v, sigma, sigma_next, noise=noise.to(latents.device))
            transitions.append(record)
            latents = record.next_latents
            continue
        direction = v
        if plan.solver == "ab2":
            direction = ab2_velocity(v, float(sigma[0]), float(sigma_next[0]), before, float(sigmas[step - 1]))
            before = v
        latents = ode_step(latents, direction, sigma, sigma_next)
    return latents, transitions


def _shared_steps(
    velocity: Velocity, plan: SamplingPlan, sigmas: Tensor, starts: Tensor, conditions: list[Any], velocities: int
) -> tuple[Tensor, Tensor]:
    """Return the latents of distinct starts before the first stochastic step, and their velocity there."""
    size, step = plan.batch_size, velocities - 1
    latents, known = [], []
    for start in range(0, len(starts), size):
        chunk = slice(start, start + size)
        before, _ = denoise(velocity, plan, sigmas, starts[chunk], conditions[chunk], range(step))
        latents.append(before)
        known.append(velocity(before, sigmas[step].expand(len(before)), conditions[chunk]))
    return torch.cat(latents), torch.cat(known)


def _starts(
    keys: Sequence[ImageKey], shape: Sequence[int], given: Tensor | None
) -> tuple[Tensor, list[int], list[int]]:
    """Draw the initial latents of each distinct key once.

    Returns:
        latents: (D, *shape), one row per distinct start.
        first: D indices, the first image that begins with each.
        start_of: N indices, the row of ``latents`` that each image begins with.
    """
    if given is not None:
        return given, list(range(len(given))), list(range(len(given)))
    first, start_of = distinct([key.initial() for key in keys])
    return torch.stack([seeded_noise(keys[row].initial(), shape) for row in first]), first, start_of


def _chunks(rows: int, plan: SamplingPlan) -> int:
    return -(-rows // plan.batch_size)


def _counting(velocity: Velocity, bar: tqdm) -> Velocity:
    """Wrap a velocity so that each call moves a progress bar on."""

    def counted(latents: Tensor, sigma: Tensor, conditions: list[Any]) -> Tensor:
        v = velocity(latents, sigma, conditions)
        bar.update()
        return v

    return counted
