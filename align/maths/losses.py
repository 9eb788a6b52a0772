"""The losses, as pure functions: flow matching, the clipped policy gradient of GRPO and its KL, DPO and DiffusionNFT."""

from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from align.maths.flow import Reduction, per_sample, reduce_dims


@dataclass(frozen=True)
class LossResult:
    """The loss of a micro-batch, and what is to be logged of it.

    loss: scalar, with gradient. metrics: name to a value, or to a value for each row where logs show the mean over rows.
    """

    loss: Tensor
    metrics: dict[str, float | list[float]] = field(default_factory=dict)


def flow_matching_loss(velocity: Tensor, target: Tensor) -> Tensor:
    """Return the (B,) mean squared error between predicted and target velocity, both (B, ...). Report eq. 2."""
    return reduce_dims((velocity.float() - target.float()) ** 2, "mean")


def gaussian_kl(mean: Tensor, mean_ref: Tensor, std: Tensor, reduction: Reduction = "mean") -> Tensor:
    """Return the (B,) KL divergence between two Gaussian transitions that share ``std``. Report eq. 8.

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
    """Return -min(r A, clip(r, 1 - epsilon_low, 1 + epsilon_high) A), r = exp(log_prob - old_log_prob). Report eq. 5.

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
    """Return the preference loss on flow-matching errors. Report eq. 3 (with Diffusion-DPO, arXiv 2311.12908, eq. 14).

    Each error, (P,), is :func:`flow_matching_loss` of one image of the pair, by the policy (with gradient) or by the
    reference, all four at the same noise and noise level. The implicit reward of an image is beta / 2 x (its error
    under the reference - its error under the policy): the squares of a Gaussian's exponent stand over 2, so that a published
    beta means here what it means there. h is the reward of the chosen less that of the rejected:

    - ``sigmoid``: -(1 - label_smoothing) log sigmoid(h) - label_smoothing log sigmoid(-h), log 2 at the start;
      label_smoothing is the share of pairs believed to be labelled the wrong way round (cDPO), in [0, 0.5);
    - ``hinge``: max(0, 1 - h) (SLiC);
    - ``ipo``: (h / beta - 1 / (2 beta))^2 (IPO, arXiv 2310.12036, eq. 17).
    """
    chosen_reward = 0.5 * beta * (chosen_error_ref.detach() - chosen_error)
    rejected_reward = 0.5 * beta * (rejected_error_ref.detach() - rejected_error)
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


#: Least mean absolute error that :func:`nft_loss` divides by, as in the authors' code.
LEAST_ERROR = 1e-5


class NFTLoss(NamedTuple):
    """Per-point results of :func:`nft_loss`, each (B,).

    loss: with gradient. positive, negative: the errors of the implicit positive and negative policy, detached.
    """

    loss: Tensor
    positive: Tensor
    negative: Tensor


def nft_loss(
    velocity: Tensor,
    old_velocity: Tensor,
    target: Tensor,
    sigma: Tensor,
    optimality: Tensor,
    mixing: float,
    adaptive: bool = True,
) -> NFTLoss:
    """Return r |v+ - v|^2 + (1 - r) |v- - v|^2, the objective of DiffusionNFT (arXiv 2509.16117).

    v+ = (1 - mixing) v_old + mixing v_theta and v- = (1 + mixing) v_old - mixing v_theta are the implicit positive and
    negative policy. The gradient in v_theta is 2 mixing [mixing (v_theta - v_old) + (2 r - 1) (v_old - v)] per dimension:
    at v_theta = v_old it is towards the images with r > 1/2 and away from those with r < 1/2, in proportion to mixing,
    and 0 at r = 1/2; from there on it draws back to v_old. With v_old the mean of v at its point the minimum is
    v_old + (2 / mixing) E[r] (E[r v] / E[r] - v_old): the optimum of the paper's theorem.

    Args:
        velocity: (B, ...) v_theta, of the policy being trained, with gradient.
        old_velocity: like it, v_old, of the policy that drew the images.
        target: like it, v: noise - latents.
        sigma: (B,) noise level.
        optimality: (B,) r in [0, 1], how good the image is.
        mixing: the paper's beta, above 0.
        adaptive: regress clean latents, whose error is sigma (v - v+), and divide each square by the mean absolute
            error of its image, without gradient (the paper's adaptive weighting), instead of the plain squares.
    """
    old = old_velocity.detach().float()
    step = mixing * (velocity.float() - old)
    positive, negative = (_nft_error(old + side, target.float(), sigma, adaptive) for side in (step, -step))
    loss = optimality * positive + (1 - optimality) * negative
    return NFTLoss(loss, positive.detach(), negative.detach())


def _nft_error(velocity: Tensor, target: Tensor, sigma: Tensor, adaptive: bool) -> Tensor:
    """Return the (B,) errors of one implicit policy."""
    if not adaptive:
        return flow_matching_loss(velocity, target)
    error = per_sample(sigma, target) * (velocity - target)
    size = reduce_dims(error.detach().abs(), "mean").clamp(min=LEAST_ERROR)
    return reduce_dims(error**2, "mean") / size
