"""The losses, as pure functions: flow matching, the clipped policy gradient of GRPO, and its KL."""

from typing import NamedTuple

import torch
from torch import Tensor

from align.flow import Reduction, reduce_dims


def flow_matching_loss(velocity: Tensor, target: Tensor) -> Tensor:
    """(B,) mean squared error between predicted and target velocity, both (B, ...). Report eq. 2."""
    return reduce_dims((velocity.float() - target.float()) ** 2, "mean")


def gaussian_kl(mean: Tensor, mean_ref: Tensor, std: Tensor, reduction: Reduction = "mean") -> Tensor:
    """(B,) KL divergence between two Gaussian transitions that share ``std``. Report eq. 8.

    With ``sum`` it is the KL of the transition in nats, with ``mean`` the same per latent dimension; use the
    reduction of the log-probability. Differentiable in ``mean``: the policy's velocity must reach it with gradient.
    """
    return reduce_dims((mean - mean_ref) ** 2 / (2 * std**2), reduction)


class PolicyLoss(NamedTuple):
    """Per-transition results of :func:`grpo_policy_loss`, each (B,)."""

    loss: Tensor
    ratio: Tensor
    clipped: Tensor


def grpo_policy_loss(
    log_prob: Tensor, old_log_prob: Tensor, advantages: Tensor, epsilon_low: float, epsilon_high: float
) -> PolicyLoss:
    """-min(r A, clip(r, 1 - epsilon_low, 1 + epsilon_high) A) with r = exp(log_prob - old_log_prob). Report eq. 5.

    Args:
        log_prob: (B,) under the policy being trained, with gradient.
        old_log_prob: (B,) under the policy that drew the samples.
        advantages: (B,).
        epsilon_low, epsilon_high: the clip range, in the units of the log-probability's reduction: with ``mean``
            a ratio is the joint one to the power 1 / dims.

    Returns:
        ``loss`` with gradient, ``ratio`` detached, and ``clipped``: True where the clip removed the gradient.
    """
    ratio = torch.exp(log_prob - old_log_prob.detach())
    bounded = ratio.clamp(1 - epsilon_low, 1 + epsilon_high)
    loss = -torch.minimum(ratio * advantages, bounded * advantages)
    clipped = ((ratio < 1 - epsilon_low) & (advantages < 0)) | ((ratio > 1 + epsilon_high) & (advantages > 0))
    return PolicyLoss(loss, ratio.detach(), clipped.detach())
