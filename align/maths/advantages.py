"""Group-relative advantages (Qwen-Image report eq. 4), with several rewards and with images left unscored; and pairs.

Rewards come as one tensor (N, R): N images in groups of ``num_generations`` consecutive rows that share a prompt, R
rewards, NaN where a reward gave no score. A missing score is never a number: it would move the group's mean and so
bias every advantage of the group.
"""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

ScaleRewards = Literal["group", "batch", "none"]
Aggregation = Literal["sum_then_normalize", "normalize_then_sum"]

#: Added to the standard deviation, as in the report and in every public implementation.
EPSILON = 1e-4
#: A group whose scores differ by less than this, plus a unit in their last place, is dead: rounding, not preference.
DEAD_SPREAD = 1e-6
#: The same for sums of group-normalised rewards, which are of order 1: opposed rewards cancel up to EPSILON's share.
DEAD_NORMALIZED = 1e-3


class GroupAdvantages(NamedTuple):
    """Result of :func:`group_advantages`.

    advantages: (N,), 0 for images without a score and in dead groups.
    informative: (N,) bool, images that carry gradient.
    rewards: (N,) the weighted sum of raw rewards, NaN where an image has none.
    dead_groups: share of groups, 0..1.
    """

    advantages: Tensor
    informative: Tensor
    rewards: Tensor
    dead_groups: float


def _grouped(values: Tensor, num_generations: int) -> Tensor:
    if num_generations < 2:
        raise ValueError(f"num_generations must be at least 2 to compare images of one prompt, found {num_generations}")
    if len(values) % num_generations:
        raise ValueError(f"{len(values)} images do not make whole groups of num_generations={num_generations}")
    # float64: the mean of large rewards, rounded to float32, would bias the whole group. Infinite is not a score.
    values = values.double().masked_fill(~values.isfinite(), torch.nan)
    return values.view(-1, num_generations, *values.shape[1:])


def _rounding(scores: Tensor) -> Tensor:
    """Return a unit in the last place of the largest of (P, G) scores, (P, 1).

    It is that of float32 where all scores of a group are float32 numbers, as a network's are, and else of float64.
    """
    known = scores.nan_to_num()
    single = (known == known.float()).all(1, keepdim=True)
    units = torch.where(single, torch.finfo(torch.float32).eps, torch.finfo(torch.float64).eps)
    return units * known.abs().amax(1, keepdim=True)


def _rounding_of_sum(rewards: Tensor, weights: Tensor | None, num_generations: int) -> Tensor:
    """Return :func:`_rounding` of the weighted sum of (N, R) rewards, (P, 1)."""
    grouped = _grouped(rewards, num_generations)
    largest = _weights(weights, rewards).to(grouped).view(grouped.shape).abs().amax(1, keepdim=True)
    units = [_rounding(column) for column in grouped.unbind(2)]
    return (torch.stack(units, 2) * largest).sum(2)


def _centre(scores: Tensor, dead_spread: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return scores (P, G) less their group's mean, the group's sample std (P, 1), and which are informative (P, G).

    ``dead_spread``: (P, 1), a group is dead whose scores differ by less.
    """
    known = ~scores.isnan()
    count = known.sum(1, keepdim=True)
    centred = scores - scores.nansum(1, keepdim=True) / count.clamp(min=1)
    std = (centred.nan_to_num() ** 2).sum(1, keepdim=True).div((count - 1).clamp(min=1)).sqrt()
    largest = scores.masked_fill(~known, -torch.inf).amax(1, keepdim=True)
    smallest = scores.masked_fill(~known, torch.inf).amin(1, keepdim=True)
    informative = known & (count >= 2) & (largest - smallest > dead_spread)
    return centred.masked_fill(~informative, 0.0), std, informative


def _weights(weights: Tensor | None, rewards: Tensor) -> Tensor:
    """Return (N, R) weights, from None (all 1), (R,) or (N, R)."""
    if weights is None:
        return torch.ones_like(rewards)
    if weights.shape not in (rewards.shape[1:], rewards.shape):
        raise ValueError(
            f"weights of shape {tuple(weights.shape)} for {rewards.shape[1]} rewards of {len(rewards)} images"
        )
    return weights.expand(rewards.shape)


def combine_rewards(rewards: Tensor, weights: Tensor | None, num_generations: int) -> Tensor:
    """Sum (N, R) raw rewards to (N,), weighted; NaN where an image cannot be compared with its group.

    A reward that scored no image of a group does not apply to that prompt (a word reward on a prompt without a word)
    and is left out for the whole group. A reward that scored some but not all leaves the missing images unscored.
    Rewards of weight 0 are only measured and never make an image unscored. ``weights`` is (R,), or (N, R) where they
    differ between prompts.
    """
    grouped = _grouped(rewards, num_generations)
    weights = _weights(weights, rewards).to(grouped).view(grouped.shape)
    applies = (~grouped.isnan()).any(1, keepdim=True) & (weights != 0)
    total = torch.where(applies, grouped * weights, 0.0).sum(-1)
    return total.masked_fill(~applies.any(-1), torch.nan).flatten()


def group_advantages(
    rewards: Tensor,
    num_generations: int,
    weights: Tensor | None = None,
    *,
    scale_rewards: ScaleRewards = "group",
    aggregation: Aggregation = "sum_then_normalize",
    clip: float | None = None,
) -> GroupAdvantages:
    """Return A_i = (R_i - mean(R)) / (std(R) + 1e-4) over the images of one prompt (report eq. 4).

    Args:
        rewards: (N, R) or (N,), NaN for not scored, groups of ``num_generations`` consecutive rows.
        weights: (R,), or (N, R) where they differ between prompts (the same within a group); all 1 by default.
        scale_rewards: divide by the sample standard deviation of the ``group`` (the report), of the whole ``batch``
            (Flow-GRPO's ``global_std``), or by nothing (``none``, Dr. GRPO).
        aggregation: ``sum_then_normalize`` takes the weighted sum of raw rewards; ``normalize_then_sum`` normalises
            each reward within its group first and the weighted sum over the batch, so that no reward's scale drowns
            another's (``scale_rewards`` is then not used). Names as in TRL.
        clip: bound on ``|A|``.

    A group whose scores are all equal, or with fewer than two scores, is dead: its advantages are exactly 0.
    """
    if rewards.dim() == 1:
        rewards = rewards[:, None]
    weights = _weights(weights, rewards)
    if scale_rewards not in ("group", "batch", "none"):
        raise ValueError(f"scale_rewards must be 'group', 'batch' or 'none', not {scale_rewards!r}")
    total = combine_rewards(rewards, weights, num_generations)
    if aggregation == "sum_then_normalize":
        dead_spread = DEAD_SPREAD + _rounding_of_sum(rewards, weights, num_generations)
        centred, std, informative = _centre(_grouped(total, num_generations), dead_spread)
        if scale_rewards == "batch":
            std = _std(total[~total.isnan()])
        advantages = centred if scale_rewards == "none" else centred / (std + EPSILON)
    elif aggregation == "normalize_then_sum":
        advantages, informative = _normalize_then_sum(rewards, weights, _grouped(total, num_generations))
    else:
        raise ValueError(f"aggregation must be 'sum_then_normalize' or 'normalize_then_sum', not {aggregation!r}")
    if clip is not None:
        advantages = advantages.clamp(-clip, clip)
    dead = 1.0 - informative.any(1).float().mean().item()
    return GroupAdvantages(advantages.float().flatten(), informative.flatten(), total.float(), dead)


def extremes(group: GroupAdvantages, num_generations: int, keep: int) -> GroupAdvantages:
    """Keep only ``keep`` informative images a group: half with the highest advantages, half with the lowest.

    The odd one is a best one. The rest have advantage 0 and carry no gradient, as in DanceGRPO's best-of-N
    (arXiv 2505.07818); advantages are those of the whole group. Of equal images the first.
    """
    values, informative = group.advantages.view(-1, num_generations), group.informative.view(-1, num_generations)

    def lowest(scores: Tensor, count: int) -> Tensor:
        order = scores.masked_fill(~informative, torch.inf).argsort(stable=True, dim=1)
        rank = order.argsort(dim=1)  # the inverse of a permutation: the place of each image in the order
        return rank < count

    kept = informative & (lowest(-values, keep - keep // 2) | lowest(values, keep // 2))
    return group._replace(advantages=values.masked_fill(~kept, 0.0).flatten(), informative=kept.flatten())


class BestWorst(NamedTuple):
    """Result of :func:`best_worst`.

    best, worst: (P,) indices into the N images, of each group's highest and lowest score.
    informative: (P,) bool, groups that make a pair; elsewhere the indices mean nothing.
    rewards: (N,) the weighted sum, NaN where an image has none.
    """

    best: Tensor
    worst: Tensor
    informative: Tensor
    rewards: Tensor


def best_worst(
    rewards: Tensor, num_generations: int, weights: Tensor | None = None, min_margin: float = 0.0
) -> BestWorst:
    """Find the best and the worst image of each prompt, by the weighted sum of (N, R) rewards, NaN for not scored.

    Of equal images the first. A group whose scores are all equal but for rounding, or differ by less than
    ``min_margin``, or with fewer than two scores, makes no pair.
    """
    total = combine_rewards(rewards, weights, num_generations)
    scores = _grouped(total, num_generations)
    dead_spread = DEAD_SPREAD + _rounding_of_sum(rewards, weights, num_generations)
    informative = _centre(scores, dead_spread)[2].any(1)
    highest, best = scores.masked_fill(scores.isnan(), -torch.inf).max(1)
    lowest, worst = scores.masked_fill(scores.isnan(), torch.inf).min(1)
    first = torch.arange(len(scores)) * num_generations
    return BestWorst(first + best, first + worst, informative & (highest - lowest >= min_margin), total.float())


def _std(values: Tensor) -> Tensor:
    """Return the sample standard deviation, 0 for fewer than two values."""
    return values.std() if values.numel() > 1 else values.new_zeros(())


def _normalize_then_sum(rewards: Tensor, weights: Tensor, total: Tensor) -> tuple[Tensor, Tensor]:
    """Return (P, G) advantages, of the sum of group-normalised rewards over the batch, and which are informative."""
    scored = ~total.isnan()
    advantages = torch.zeros_like(total)
    for column, weight in zip(rewards.unbind(1), weights.unbind(1), strict=True):
        if weight.any():
            # Only images that every reward scored are compared: each column is centred on the same rows. EPSILON is of
            # the column's own spread, and no spread is too small: a reward weighs the same in whatever units it counts.
            scores = _grouped(column, total.shape[1]).masked_fill(~scored, torch.nan)
            centred, std, informative = _centre(scores, _rounding(scores))
            groups = informative.any(1, keepdim=True)
            usual = std[groups].mean() if groups.any() else std.new_ones(())
            advantages = advantages + weight.to(centred).view(centred.shape) * centred / (std + EPSILON * usual)
    informative = scored & (advantages.abs().amax(1, keepdim=True) > DEAD_NORMALIZED)
    advantages = advantages.masked_fill(~informative, 0.0)
    # Every column is centred in its group already, so that normalising over the batch is a division.
    return advantages / (_std(advantages[scored]) + EPSILON), informative
