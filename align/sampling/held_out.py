"""Held-out evaluation, with the uncertainty of what is reported."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from accelerate.utils import gather_object
from datasets import Dataset
from PIL import Image
from torch import nn

from align.maths.advantages import combine_rewards
from align.models.contract import FlowModel
from align.sampling.noise import ImageKey
from align.sampling.rollout import SamplingPlan
from align.sampling.scored import sample_and_score
from align.sampling.scorer import weights_of
from preference_data.prompts import check_prompts
from rewards import Reward
from rewards.contract import STEP


@dataclass
class Evaluation:
    """Result of :func:`evaluate_prompts`.

    metrics: as they are logged. rows: what each prompt scored. images: of the first prompts, (prompt, its images).
    """

    metrics: dict[str, float]
    rows: list[dict[str, Any]]
    images: list[tuple[str, list[Image.Image]]]


def as_prompts(data: Any, what: str) -> Dataset:
    """Return prompts as a data set: as they are, or made of a list of rows; raises ValueError for anything else."""
    if isinstance(data, Dataset):
        return data
    if isinstance(data, list) and all(isinstance(row, dict) for row in data):
        return Dataset.from_list(data)
    inside = f" of {type(data[0]).__name__}" if isinstance(data, list) and data else ""
    raise ValueError(
        f"{what} must be a datasets.Dataset, or a list of rows such as {{'prompt': 'a cat'}}, found "
        f"{type(data).__name__}{inside}"
    )


def check_columns(rewards: Sequence[Reward], datasets: Sequence[Dataset]) -> None:
    """Raise ValueError when data lack prompts, or a column or a category that a reward asks for."""
    for dataset in datasets:
        check_prompts(dataset)
        for reward in rewards:
            reward.check_columns({*dataset.column_names, STEP})
            reward.check_weights(dataset)
            reward.check_row(dataset[0])


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
    step: int = 0,
) -> Evaluation:
    """Sample ``samples`` images for every prompt of ``dataset`` without noise injection and score them.

    The noise depends on ``seed`` and the row alone, so evaluations of one run compare like with like. ``process`` is
    (index, count): each takes every count-th row. Metrics, for each reward, for their weighted sum ``reward`` and,
    where a prompt has several images, for their :func:`diversity`: ``PREFIX_NAME`` the mean over prompts,
    ``PREFIX_NAME_se`` its standard error; and ``PREFIX_num_prompts``. A reward that scored nothing here is left out.
    """
    index, count = process
    turns = -(-len(dataset) // count)
    # Every process takes as many turns, or a sharded model would wait for forwards that never come. The turns beyond the
    # end of the data begin again at its first row, and what they give is dropped.
    taken = [(index + turn * count) % len(dataset) for turn in range(turns)]
    valid = len(range(index, len(dataset), count))
    rows = [dataset[i] for i in taken for _ in range(samples)]
    keys = [ImageKey(seed, "eval", i, sample) for i in taken for sample in range(samples)]
    deterministic = replace(plan, sde_steps=(), noise_level=0.0)
    scored = sample_and_score(model, rewards, rows, keys, deterministic, transformer=transformer, step=step)
    scores = scored.agreed_scores(max_failed_fraction)
    drawn = scored.rollout
    kept = [(i, row_images(drawn.images, n, samples)) for n, i in enumerate(taken[:valid]) if i < keep_images_of]
    spread = diversity(drawn.latents.unflatten(0, (-1, samples)))[:valid].tolist() if samples > 1 else []
    gathered = gather_object([(list(zip(*scores, strict=True))[: valid * samples], kept, spread)])
    table = torch.tensor([values for of_process, *_ in gathered for values in of_process], dtype=torch.float64)
    order = [i for start in range(count) for i in range(start, len(dataset), count)]  # of the prompts in the table
    weights = weights_of(rewards, [dataset[i] for i in order for _ in range(samples)])
    means = _per_prompt(table, rewards, samples, weights)
    if means and samples > 1:
        means["diversity"] = torch.tensor([v for *_, of_process in gathered for v in of_process], dtype=torch.float64)
    shown = sorted((pair for _, of_process, _ in gathered for pair in of_process), key=lambda pair: pair[0])
    return Evaluation(
        _metrics(means, prefix) if rewards else {},
        _rows(means, order, dataset, prefix) if rewards else [],
        [(dataset[i]["prompt"], pictures) for i, pictures in shown],
    )


def _rows(means: dict[str, torch.Tensor], order: list[int], dataset: Dataset, prefix: str) -> list[dict[str, Any]]:
    """Return what each prompt scored, in the order of the data; ``order``: the row that each value belongs to."""
    rows: list[dict[str, Any]] = [
        {"data": prefix, "row": i, "prompt": dataset[i]["prompt"]} for i in range(len(dataset))
    ]
    for name, values in means.items():
        for i, value in zip(order, values.tolist(), strict=True):
            rows[i][name] = None if math.isnan(value) else value
    return rows


def row_images(images: list[Image.Image], row: int, samples: int) -> list[Image.Image]:
    """Return the images of one prompt."""
    return images[row * samples : (row + 1) * samples]


def diversity(latents: torch.Tensor) -> torch.Tensor:
    """Measure how far apart the S images of each prompt are: (P, S, ...) latents to (P,), S at least 2.

    The root mean square difference of two images' latents, over all pairs: 0 where they are all the same, and about
    1.4 for noise, since latents are normalised to a standard deviation of 1. A policy that has collapsed loses it.
    """
    flat = latents.flatten(2).double()
    count, dimensions = flat.shape[1:]
    pairs = torch.cdist(flat, flat).sum((1, 2)) / (count * (count - 1))
    return pairs / math.sqrt(dimensions)


def _per_prompt(
    table: torch.Tensor, rewards: Sequence[Reward], samples: int, weights: torch.Tensor
) -> dict[str, torch.Tensor]:
    """Return (prompts,) means of each reward and of their weighted sum, from (images, rewards) scores; NaN: not scored."""
    if not rewards:
        return {}
    # The images of one prompt are its group, as in training; an image alone makes up a group with itself.
    copies = 2 if samples == 1 else 1
    total = combine_rewards(table.repeat_interleave(copies, 0), weights.repeat_interleave(copies, 0), samples * copies)[
        ::copies
    ]
    named = {"reward": total, **{reward.name: table[:, n] for n, reward in enumerate(rewards)}}
    return {name: values.view(-1, samples).double().nanmean(1) for name, values in named.items()}


def _metrics(means: dict[str, torch.Tensor], prefix: str) -> dict[str, float]:
    """Return means over prompts and their standard errors."""
    metrics: dict[str, float] = {f"{prefix}_num_prompts": len(means["reward"])}
    for name, values in means.items():
        known = values[~values.isnan()]
        if len(known):
            metrics[f"{prefix}_{name}"] = known.mean().item()
            metrics[f"{prefix}_{name}_se"] = standard_error(known)
    return metrics


def standard_error(values: torch.Tensor) -> float:
    """Return the standard error of the mean of (N,) independent values; NaN for a single one."""
    return values.std().item() / math.sqrt(len(values)) if len(values) > 1 else math.nan
