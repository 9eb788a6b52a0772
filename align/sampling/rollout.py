"""Rollout: prompts to images, with a record of every stochastic step.

Randomness belongs to the work, not to the machine: the noise of an image is keyed by what the image is (run seed,
update, prompt, sample) and by the step, so one process and eight, or another chunk size, draw the same noise.
"""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from tqdm.auto import tqdm

from align.maths.flow import Reduction, SDEType, Solver, StochasticSampler, Transition, ab2_velocity, ode_step
from align.models.contract import FlowModel
from align.sampling.noise import seeded_noise

#: The step under which an image's initial noise is keyed.
INITIAL = -1


@dataclass(frozen=True)
class ImageKey:
    """What an image is: the seed of its noise. ``noise_sample`` differs from ``sample`` where a group shares its start."""

    seed: int
    update: int | str
    prompt: int
    sample: int
    noise_sample: int | None = None

    def initial(self) -> tuple[int | str, ...]:
        start = self.sample if self.noise_sample is None else self.noise_sample
        return (self.seed, self.update, self.prompt, start, INITIAL)

    def step(self, step: int) -> tuple[int | str, ...]:
        return (self.seed, self.update, self.prompt, self.sample, step)


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
        return StochasticSampler(self.noise_level, self.sde_type, float(sigmas[1]), self.log_prob_reduction)

    @property
    def common_velocities(self) -> int:
        """Of how many steps images with the same initial noise have the velocity in common: to the first stochastic one."""
        return min(self.sde_steps) + 1 if self.sde_steps and self.noise_level > 0 else 0

    @property
    def forwards_per_velocity(self) -> int:
        return 2 if self.guidance_scale > 1 else 1


@dataclass
class Rollout:
    """N images and how they came to be.

    latents: (N, tokens, channels) clean latents. images: N decoded images. steps: the stochastic steps' indices.
    transitions: one record of N rows for each of ``steps``. sampler: the policy's noise schedule.
    """

    latents: Tensor
    images: list[Image.Image]
    steps: tuple[int, ...]
    transitions: list[Transition]
    sampler: StochasticSampler
    forwards: int = field(default=0)


Velocity = Callable[[Tensor, Tensor, list[Any]], Tensor]


def velocity_fn(model: FlowModel, plan: SamplingPlan, transformer: nn.Module | None = None) -> Velocity:
    """``velocity(latents, sigma, conditions)`` under ``plan``: sampling, replay and reference all call this."""
    negative = model.encode_prompts([plan.negative_prompt])[0] if plan.guidance_scale > 1 else None

    def velocity(latents: Tensor, sigma: Tensor, conditions: list[Any]) -> Tensor:
        return model.velocity(
            latents,
            sigma,
            conditions,
            height=plan.height,
            width=plan.width,
            guidance_scale=plan.guidance_scale,
            negative=negative,
            transformer=transformer,
        )

    return velocity


@torch.no_grad()
def rollout(
    model: FlowModel,
    prompts: list[str],
    keys: list[ImageKey],
    plan: SamplingPlan,
    *,
    transformer: nn.Module | None = None,
    initial_latents: Tensor | None = None,
    show_progress: bool = False,
    on_images: Callable[[slice, list[Image.Image]], None] | None = None,
) -> Rollout:
    """Sample one image for each prompt and key.

    Args:
        prompts, keys: N of each; repeat a prompt to make a group.
        transformer: the launcher's wrapper to run, ``model.transformer`` by default.
        initial_latents: (N, tokens, channels) to start from, instead of noise drawn from the keys.
        show_progress: a progress bar over the denoising steps.
        on_images: called with every chunk's place among the N and its images, before the next chunk is sampled.
    """
    sigmas = model.sigmas(plan.num_inference_steps, plan.height, plan.width).to(model.device)
    conditions = model.encode_prompts(prompts)
    shape = model.latent_shape(plan.height, plan.width)
    starts, distinct, branch = _starts(keys, shape, initial_latents)
    common = plan.common_velocities if len(distinct) < len(prompts) else 0
    apart = plan.num_inference_steps - common
    size = plan.batch_size
    latents, images, records = [], [], []
    calls = -(-len(distinct) // size) * common + -(-len(prompts) // size) * apart
    with tqdm(total=calls, desc="rollout", leave=False, disable=not show_progress) as bar:
        denoise = _Denoiser(velocity_fn(model, plan, transformer), sigmas, plan, bar.update)
        velocity = None
        if common:
            starts, velocity = denoise.trunk(starts, [conditions[row] for row in distinct], common)
        for start in range(0, len(prompts), size):
            chunk = slice(start, start + size)
            final, transitions = denoise(
                starts[branch[chunk]],
                conditions[chunk],
                keys[chunk],
                range(max(common - 1, 0), plan.num_inference_steps),
                None if velocity is None else velocity[branch[chunk]],
            )
            latents.append(final)
            records.append(transitions)
            decoded = model.decode_latents(final, plan.height, plan.width)
            images += decoded
            if on_images is not None:
                on_images(chunk, decoded)
    return Rollout(
        latents=torch.cat(latents),
        images=images,
        steps=plan.sde_steps,
        transitions=[Transition.cat(list(parts)) for parts in zip(*records, strict=True)],
        sampler=plan.sampler(sigmas),
        forwards=(len(distinct) * common + len(prompts) * apart) * plan.forwards_per_velocity,
    )


def first_alike(image: int, num_generations: int, num_prefixes: int | None) -> int:
    """The first image of a rollout with the initial noise of ``image``, where groups have ``num_prefixes`` of them."""
    sample = image % num_generations
    return image - sample + sample % (num_prefixes or num_generations)


def _starts(keys: list[ImageKey], shape: Sequence[int], given: Tensor | None) -> tuple[Tensor, list[int], list[int]]:
    """Different latents to start from, the first image of each, and of every image which of them is its own."""
    if given is not None:
        return given, list(range(len(given))), list(range(len(given)))
    distinct, branch = first_places([key.initial() for key in keys])
    return torch.stack([seeded_noise(keys[row].initial(), shape) for row in distinct]), distinct, branch


def first_places(values: Sequence[Hashable]) -> tuple[list[int], list[int]]:
    """Where each different value stands first; and of every value, which of those it is."""
    numbers: dict[Hashable, int] = {}
    which = [numbers.setdefault(value, len(numbers)) for value in values]
    return [which.index(number) for number in range(len(numbers))], which


@dataclass(frozen=True)
class _Denoiser:
    """Steps of a chunk's latents towards clean ones."""

    velocity: Velocity
    sigmas: Tensor
    plan: SamplingPlan
    tick: Callable[[], Any]

    def trunk(self, latents: Tensor, conditions: list[Any], velocities: int) -> tuple[Tensor, Tensor]:
        """Latents before the first stochastic step, and their velocity there; all steps before it are of the ODE."""
        size, step = self.plan.batch_size, velocities - 1
        before, there = [], []
        for start in range(0, len(latents), size):
            chunk = slice(start, start + size)
            before.append(self(latents[chunk], conditions[chunk], [], range(step))[0])
            there.append(self.velocity(before[-1], self.sigmas[step].expand(len(before[-1])), conditions[chunk]))
            self.tick()
        return torch.cat(before), torch.cat(there)

    def __call__(
        self,
        latents: Tensor,
        conditions: list[Any],
        keys: list[ImageKey],
        steps: range,
        first_velocity: Tensor | None = None,
    ) -> tuple[Tensor, list[Transition]]:
        """An SDE step on ``plan.sde_steps``, with its record, an ODE step elsewhere.

        ``first_velocity``: of the first of ``steps``, where it is known.
        """
        plan, sigmas = self.plan, self.sigmas
        latents = latents.float().to(sigmas.device)
        sampler, transitions = plan.sampler(sigmas), []
        before: Tensor | None = None
        for step in steps:
            sigma, sigma_next = sigmas[step].expand(len(latents)), sigmas[step + 1].expand(len(latents))
            known = first_velocity if step == steps.start else None
            v = self.velocity(latents, sigma, conditions) if known is None else known
            if step in plan.sde_steps and plan.noise_level > 0:
                noise = torch.stack([seeded_noise(key.step(step), latents.shape[1:]) for key in keys])
                record = sampler.transition(latents, v, sigma, sigma_next, noise=noise.to(latents.device))
                transitions.append(record)
                latents = record.next_latents
            else:
                direction = v
                if plan.solver == "ab2":
                    direction = ab2_velocity(v, float(sigma[0]), float(sigma_next[0]), before, float(sigmas[step - 1]))
                    before = v
                latents = ode_step(latents, direction, sigma, sigma_next)
            if known is None:
                self.tick()
        return latents, transitions
