"""Scoring on several processes, and held-out evaluation with the uncertainty of what is reported."""

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from accelerate.utils import gather_object
from datasets import Dataset
from PIL import Image
from torch import nn

from align.advantages import combine_rewards
from align.models.base import FlowModel
from align.rollout import ImageKey, SamplingPlan, rollout
from preference_data.prompts import check_prompts
from rewards import Reward, RewardError, score

logger = logging.getLogger(__name__)


@dataclass
class Evaluation:
    """``metrics`` as logged; ``rows`` what each prompt scored; ``images`` of the first prompts: (prompt, its images)."""

    metrics: dict[str, float]
    rows: list[dict[str, Any]]
    images: list[tuple[str, list[Image.Image]]]


def check_columns(rewards: Sequence[Reward], datasets: Sequence[Dataset]) -> None:
    """Raise ValueError for data without prompts, or without a column that a reward asks for by name."""
    for dataset in datasets:
        check_prompts(dataset)
        for reward in rewards:
            reward.check_columns(dataset.column_names)


def columns_of(rows: list[dict[str, Any]]) -> dict[str, list[Any]]:
    """The data columns beside the prompt, as the rewards take them."""
    return {key: [row[key] for row in rows] for key in rows[0] if key != "prompt"}


def score_rows(
    rewards: Sequence[Reward], images: list[Image.Image], rows: list[dict[str, Any]], max_failed_fraction: float
) -> list[list[float]]:
    """Score this process's images: one list for each reward, NaN where there is no score. Call it on every process.

    Raises RewardError, on every process or on none, when a reward broke its contract anywhere or failed for a larger
    share of all processes' images than ``max_failed_fraction``; a smaller failure is logged and left unscored.
    """
    table: list[list[float]] = [[math.nan] * len(rows) for _ in rewards]
    failures: dict[str, str] = {}
    broken = None
    try:
        table, failures = score(rewards, images, [row["prompt"] for row in rows], columns_of(rows))
    except RewardError as error:
        broken = str(error)
    everywhere = gather_object([(len(rows), failures, broken)])
    for _, _, message in everywhere:
        if message is not None:
            raise RewardError(message)
    for reward in rewards:
        failed = [(count, messages[reward.name]) for count, messages, _ in everywhere if reward.name in messages]
        if failed:
            share = sum(count for count, _ in failed) / sum(count for count, _, _ in everywhere)
            message = f"reward {reward.name!r} failed for {share:.0%} of the images: {failed[0][1]}"
            if share > max_failed_fraction:
                raise RewardError(f"{message} (max_failed_fraction={max_failed_fraction})")
            logger.warning("%s; they are left unscored", message)
    if any(reward.weight and reward.name in failures for reward in rewards):
        # Without a part of their sum these images cannot be compared with any: as a whole they are not scored.
        table = [
            [math.nan] * len(rows) if reward.weight else scores for reward, scores in zip(rewards, table, strict=True)
        ]
    return table


def evaluate_prompts(
    model: FlowModel,
    rewards: Sequence[Reward],
    dataset: Dataset,
    plan: SamplingPlan,
    *,
    seed: int,
    samples: int,
    prefix: str,
    transformer: nn.Module | None = None,
    process: tuple[int, int] = (0, 1),
    keep_images_of: int = 0,
    max_failed_fraction: float = 0.0,
) -> Evaluation:
    """Sample ``samples`` images for every prompt of ``dataset`` without noise injection and score them.

    The noise depends on ``seed`` and the row alone, so evaluations of one run compare like with like. ``process`` is
    (index, count): each takes every count-th row. Metrics, for each reward and for their weighted sum ``reward``:
    ``PREFIX_NAME`` the mean over prompts, ``PREFIX_NAME_se`` its standard error, and ``PREFIX_num_prompts``. A
    reward that scored nothing here is left out.
    """
    index, count = process
    turns = -(-len(dataset) // count)
    # Every process takes as many turns, or a sharded model would wait for forwards that never come; extras are dropped.
    mine = [(index + turn * count) % len(dataset) for turn in range(turns)]
    own = len(range(index, len(dataset), count))
    rows = [dataset[i] for i in mine for _ in range(samples)]
    prompts = [row["prompt"] for row in rows]
    keys = [ImageKey(seed, "eval", i, sample) for i in mine for sample in range(samples)]
    deterministic = replace(plan, sde_steps=(), noise_level=0.0)
    images = rollout(model, prompts, keys, deterministic, transformer=transformer).images
    scores = score_rows(rewards, images, rows, max_failed_fraction) if rewards else [[math.nan] * len(rows)]
    kept = [(i, row_images(images, n, samples)) for n, i in enumerate(mine[:own]) if i < keep_images_of]
    gathered = gather_object([(list(zip(*scores, strict=True))[: own * samples], kept)])
    table = torch.tensor([values for part, _ in gathered for values in part], dtype=torch.float64)
    means = _per_prompt(table, rewards, samples)
    # Processes took every count-th row: back into the order of the data.
    order = [i for start in range(count) for i in range(start, len(dataset), count)]
    in_order = {name: [value for _, value in sorted(zip(order, v.tolist(), strict=True))] for name, v in means.items()}
    scored = [
        {"data": prefix, "row": i, "prompt": dataset[i]["prompt"]}
        | {name: None if math.isnan(values[i]) else values[i] for name, values in in_order.items()}
        for i in range(len(dataset))
    ]
    shown = sorted((pair for _, part in gathered for pair in part), key=lambda pair: pair[0])
    return Evaluation(
        _metrics(means, prefix) if rewards else {},
        scored if rewards else [],
        [(dataset[i]["prompt"], pictures) for i, pictures in shown],
    )


def row_images(images: list[Image.Image], row: int, samples: int) -> list[Image.Image]:
    """The images of one prompt."""
    return images[row * samples : (row + 1) * samples]


def _per_prompt(table: torch.Tensor, rewards: Sequence[Reward], samples: int) -> dict[str, torch.Tensor]:
    """(prompts,) means of each reward and of their weighted sum, from (images, rewards) scores; NaN: not scored."""
    if not rewards:
        return {}
    weights = torch.tensor([reward.weight for reward in rewards], dtype=table.dtype)
    # The images of one prompt are its group, as in training; an image alone makes up a group with itself.
    copies = 2 if samples == 1 else 1
    total = combine_rewards(table.repeat_interleave(copies, 0), weights, samples * copies)[::copies]
    named = {"reward": total, **{reward.name: table[:, n] for n, reward in enumerate(rewards)}}
    return {name: values.view(-1, samples).double().nanmean(1) for name, values in named.items()}


def _metrics(means: dict[str, torch.Tensor], prefix: str) -> dict[str, float]:
    """Means over prompts and their standard errors."""
    metrics: dict[str, float] = {f"{prefix}_num_prompts": len(means["reward"])}
    for name, values in means.items():
        known = values[~values.isnan()]
        if len(known):
            metrics[f"{prefix}_{name}"] = known.mean().item()
            metrics[f"{prefix}_{name}_se"] = standard_error(known)
    return metrics


def standard_error(values: torch.Tensor) -> float:
    """Of the mean of (N,) independent values; NaN for a single one."""
    return values.std().item() / math.sqrt(len(values)) if len(values) > 1 else math.nan
