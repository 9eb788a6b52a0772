"""The losses, as pure functions: flow matching, the clipped policy gradient of GRPO and its KL, and DPO."""

from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

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


DPOLossType = Literal["sigmoid", "hinge", "ipo"]


class DPOLoss(NamedTuple):
    """Per-pair results of :func:`dpo_loss`, each (P,).

    loss: with gradient. chosen_reward, rejected_reward: the implicit rewards, detached. accuracy: 1 where the chosen
    image has the higher one, 0 where it has the lower, 0.5 where they are equal.
    """

    loss: Tensor
    chosen_reward: Tensor
    rejected_reward: Tensor
    accuracy: Tensor


def dpo_loss(
    chosen_error: Tensor,
    rejected_error: Tensor,
    chosen_error_ref: Tensor,
    rejected_error_ref: Tensor,
    beta: float,
    loss_type: DPOLossType = "sigmoid",
    label_smoothing: float = 0.0,
) -> DPOLoss:
    """Preference loss on flow-matching errors. Report eq. 3 (with Diffusion-DPO, arXiv 2311.12908, eq. 14).

    Each error, (P,), is :func:`flow_matching_loss` of one image of the pair, by the policy (with gradient) or by the
    reference, all four at the same noise and noise level. The implicit reward of an image is beta x (its error under
    the reference - its error under the policy), and h is the reward of the chosen less that of the rejected:

    - ``sigmoid``: -(1 - label_smoothing) log sigmoid(h) - label_smoothing log sigmoid(-h), log 2 at the start;
      label_smoothing is the share of pairs believed to be labelled the wrong way round (cDPO), in [0, 0.5);
    - ``hinge``: max(0, 1 - h) (SLiC);
    - ``ipo``: (h / beta - 1 / (2 beta))^2 (IPO, arXiv 2310.12036, eq. 17).
    """
    chosen_reward = beta * (chosen_error_ref.detach() - chosen_error)
    rejected_reward = beta * (rejected_error_ref.detach() - rejected_error)
    h = chosen_reward - rejected_reward
    if loss_type == "sigmoid":
        loss = -(1 - label_smoothing) * logsigmoid(h) - label_smoothing * logsigmoid(-h)
    elif loss_type == "hinge":
        loss = torch.relu(1 - h)
    elif loss_type == "ipo":
        loss = (h / beta - 1 / (2 * beta)) ** 2
    else:
        raise ValueError(f"loss_type must be 'sigmoid', 'hinge' or 'ipo', not {loss_type!r}")
    accuracy = (torch.sign(h.detach()) + 1) / 2
    return DPOLoss(loss, chosen_reward.detach(), rejected_reward.detach(), accuracy)
