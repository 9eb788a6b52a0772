"""Flow matching and its stochastic samplers, as pure functions on tensors.

One convention everywhere: ``sigma`` in [0, 1] is the noise level, 1 is pure noise and 0 is data, and

    noisy    = (1 - sigma) * latents + sigma * noise
    velocity = noise - latents

which is what diffusers' ``FlowMatchEulerDiscreteScheduler`` integrates and Qwen-Image's transformer predicts.
A sampler steps from ``sigma`` down to ``sigma_next``. The Qwen-Image report (arXiv 2508.02324) writes its eq. 1-2 in
the time 1 - sigma and with the opposite sign; its eq. 6-7 are already in noise-level time, as Flow-GRPO's
(arXiv 2505.05470) are. All arithmetic is float32 whatever the model's dtype: log-probabilities of samples that are
stored in a lower precision are biased.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Reduction = Literal["mean", "sum"]
SDEType = Literal["sde", "cps"]
Solver = Literal["euler", "ab2"]


def per_sample(value: Tensor | float, like: Tensor) -> Tensor:
    """Return float32 ``value``, a number or of shape (B,), shaped to broadcast against ``like`` of shape (B, ...)."""
    value = torch.as_tensor(value, dtype=torch.float32, device=like.device)
    return value.reshape(-1, *[1] * (like.dim() - 1)) if value.dim() else value


def reduce_dims(values: Tensor, reduction: Reduction) -> Tensor:
    """Reduce (B, ...) to (B,), by the mean or the sum over every dimension but the first."""
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction must be 'mean' or 'sum', not {reduction!r}")
    flat = values.flatten(1)
    return flat.mean(1) if reduction == "mean" else flat.sum(1)


def add_noise(latents: Tensor, noise: Tensor, sigma: Tensor | float) -> Tensor:
    """Return the point at noise level ``sigma`` on the straight path from data to noise (report eq. 1).

    ``latents`` and ``noise`` are (B, ...), ``sigma`` a number or (B,).
    """
    s = per_sample(sigma, latents)
    return (1 - s) * latents.float() + s * noise.float()


def velocity_target(latents: Tensor, noise: Tensor) -> Tensor:
    """Return d noisy / d sigma along the path, which the model learns (report eq. 2, in noise-level time)."""
    return noise.float() - latents.float()


def logit_normal_sigma(
    batch_size: int, mean: float = 0.0, std: float = 1.0, generator: torch.Generator | None = None
) -> Tensor:
    """Draw (B,) training noise levels sigmoid(N(mean, std^2)) in (0, 1), before the scheduler's resolution shift."""
    return torch.sigmoid(mean + std * torch.randn(batch_size, generator=generator))


def guided_velocity(velocity: Tensor, velocity_negative: Tensor, guidance_scale: float) -> Tensor:
    """Apply Qwen-Image's true classifier-free guidance, rescaled per token to the norm of the conditional velocity.

    ``velocity`` and ``velocity_negative`` are (B, tokens, channels). Differentiable in both.
    """
    guided = velocity_negative + guidance_scale * (velocity - velocity_negative)
    norm = guided.norm(dim=-1, keepdim=True)
    return guided * (velocity.norm(dim=-1, keepdim=True) / norm)


def ode_step(latents: Tensor, velocity: Tensor, sigma: Tensor | float, sigma_next: Tensor | float) -> Tensor:
    """Take one Euler step of the probability-flow ODE, as ``FlowMatchEulerDiscreteScheduler.step`` takes it."""
    delta = per_sample(sigma_next, latents) - per_sample(sigma, latents)
    return latents.float() + delta * velocity.float()


def ab2_velocity(
    velocity: Tensor, sigma: float, sigma_next: float, velocity_before: Tensor | None, sigma_before: float
) -> Tensor:
    """Return the velocity that makes :func:`ode_step` a step of the second-order Adams-Bashforth method.

    The velocity is carried on along the line through this step's and ``velocity_before``, of the step that began at
    ``sigma_before``, to the middle of the step. It needs no forward more than Euler's method. ``velocity_before`` is
    None in the first step, which is Euler's.
    """
    if velocity_before is None:
        return velocity
    return velocity + (sigma - sigma_next) / (2 * (sigma_before - sigma)) * (velocity - velocity_before)


@dataclass(frozen=True)
class StochasticSampler:
    """The noise schedule of the policy. It belongs to the policy: log-probabilities depend on every field.

    Args:
        noise_level: ``a``, strength of the injected noise; 0 is the deterministic ODE. For ``cps`` in [0, 1].
        sde_type: ``sde`` is Flow-GRPO's marginal-preserving SDE, ``cps`` coefficient-preserving sampling
            (Flow-CPS, arXiv 2509.05952), which keeps few-step samples clean but does not preserve the marginals.
        sigma_max: second sigma of the schedule; it stands in for sigma inside 1 - sigma where sigma = 1.
        log_prob_reduction: over latent dimensions. The report's eq. 5 sums; public implementations average, which
            turns the ratio r into r ** (1 / dims) and is why published clip ranges look like 1e-4.
    """

    noise_level: float
    sde_type: SDEType = "sde"
    sigma_max: float = 0.99
    log_prob_reduction: Reduction = "mean"

    def __post_init__(self) -> None:
        if self.sde_type not in ("sde", "cps"):
            raise ValueError(f"sde_type must be 'sde' or 'cps', not {self.sde_type!r}")
        if not self.noise_level >= 0 or (self.sde_type == "cps" and self.noise_level > 1):
            span = "[0, 1]" if self.sde_type == "cps" else "[0, inf)"
            raise ValueError(f"noise_level {self.noise_level} is out of range for {self.sde_type}, {span}")
        if not 0 < self.sigma_max < 1:
            raise ValueError(f"sigma_max {self.sigma_max} must lie inside (0, 1): the second sigma of the schedule")

    def moments(
        self, latents: Tensor, velocity: Tensor, sigma: Tensor | float, sigma_next: Tensor | float
    ) -> tuple[Tensor, Tensor]:
        """Return mean and standard deviation of the transition from ``sigma`` to ``sigma_next``.

        Returns ``mean`` shaped like ``latents`` and ``std``, broadcastable to it: the *full* standard deviation of
        the transition, sqrt of the step included. Differentiable in ``velocity``.
        """
        x, v = latents.float(), velocity.float()
        s, s_next = per_sample(sigma, x), per_sample(sigma_next, x)
        if self.sde_type == "cps":
            # Flow-CPS: split x into its data and noise estimates, and replace part of the noise estimate by fresh noise.
            std = s_next * math.sin(self.noise_level * math.pi / 2)
            latents_hat, noise_hat = x - s * v, x + (1 - s) * v
            return (1 - s_next) * latents_hat + (s_next**2 - std**2).sqrt() * noise_hat, std
        # Report eq. 6-7, Flow-GRPO eq. 9, with g(s) = a sqrt(s / (1 - s)): the ODE's marginals in the limit of small steps.
        delta = s - s_next
        remaining = 1 - torch.where(s >= 1 - 1e-6, torch.full_like(s, self.sigma_max), s)
        g = self.noise_level * (s / remaining).sqrt()
        drift = v + g**2 / (2 * s) * (x + (1 - s) * v)
        return x - delta * drift, g * delta.sqrt()

    def transition(
        self,
        latents: Tensor,
        velocity: Tensor,
        sigma: Tensor,
        sigma_next: Tensor,
        *,
        noise: Tensor | None = None,
        next_latents: Tensor | None = None,
    ) -> "Transition":
        """Sample a transition (give ``noise``) or replay one (give ``next_latents``).

        Args:
            latents, velocity: (B, ...). sigma, sigma_next: (B,).
            noise: standard normal, like ``latents``: draw the next latents with it.
            next_latents: the latents that were drawn, to score them under this velocity.

        Raises:
            ValueError: unless exactly one of ``noise`` and ``next_latents`` is given, or when the transition is
                deterministic and so has no density.
        """
        if (noise is None) == (next_latents is None):
            raise ValueError("give either noise (to sample) or next_latents (to replay)")
        mean, std = self.moments(latents, velocity, sigma, sigma_next)
        if not bool((std > 0).all()):
            raise ValueError(
                f"the {self.sde_type} step from sigma {sigma.flatten()[0]:.4f} to {sigma_next.flatten()[0]:.4f} is "
                "deterministic (std 0): it has no density and cannot be trained on. Use ode_step for it."
            )
        drawn = mean.detach() + std * noise.float() if noise is not None else next_latents.float()  # type: ignore[union-attr]
        return Transition(
            latents=latents.float(),
            next_latents=drawn,
            sigma=sigma.float(),
            sigma_next=sigma_next.float(),
            mean=mean,
            std=std.expand(len(latents), *std.shape[1:]),
            log_prob=gaussian_log_prob(drawn, mean, std, self.log_prob_reduction),
        )


@dataclass
class Transition:
    """A batch of sampler steps, with all that the policy loss and the KL need, in float32.

    latents, next_latents, mean: (B, ...). sigma, sigma_next, log_prob: (B,). std: (B, 1, ...).
    """

    latents: Tensor
    next_latents: Tensor
    sigma: Tensor
    sigma_next: Tensor
    mean: Tensor
    std: Tensor
    log_prob: Tensor

    def __getitem__(self, rows: Tensor | slice) -> "Transition":
        return Transition(**{name: value[rows] for name, value in vars(self).items()})

    @staticmethod
    def cat(batches: list["Transition"]) -> "Transition":
        """Join batches, one after the other."""
        return Transition(**{name: torch.cat([getattr(b, name) for b in batches]) for name in vars(batches[0])})


def gaussian_log_prob(value: Tensor, mean: Tensor, std: Tensor, reduction: Reduction = "mean") -> Tensor:
    """Return the (B,) log-density of an isotropic Gaussian, per dimension (``mean``) or joint (``sum``). Report eq. 5.

    ``value`` and ``mean`` are (B, ...), ``std`` broadcasts against them.
    """
    squared = (value.float() - mean) ** 2 / (2 * std**2)
    return reduce_dims(-squared - torch.log(std) - 0.5 * math.log(2 * math.pi), reduction)
