"""Sampled groups as rows of a ranked data set, through ``preference_data``'s writer."""

import math
from collections.abc import Sequence, Set
from typing import Any

import pyarrow as pa
import torch
from datasets import Dataset

from align.maths.advantages import combine_rewards
from align.sampling.scorer import weights_of
from preference_data.writer import RankedWriter
from rewards import Reward

#: Columns that the writer gives its own meaning.
_TAKEN = {"index", "prompt", "images", "scores"}


def write_groups(
    writer: RankedWriter,
    numbers: Sequence[int],
    rows: Sequence[dict[str, Any]],
    images: Sequence[Any],
    rewards: Sequence[Reward],
    table: list[list[float]],
    num_generations: int,
    extra: dict[str, Any] | None = None,
    skip: Set[int] = frozenset(),
) -> None:
    """Write whole groups, a row each, with their weighted score and every reward's own.

    numbers: the index of each group. rows, images: one for each image. table: scores of each reward, NaN for none.
    extra: further columns, the same for all groups. skip: indices that are not written.
    """
    weighted = weighted_scores(table, rewards, rows, num_generations)
    for place, number in enumerate(numbers):
        if number in skip:
            continue
        group = slice(place * num_generations, (place + 1) * num_generations)
        own = {key: value for key, value in rows[group.start].items() if key not in _TAKEN}
        writer.write(
            number,
            rows[group.start]["prompt"],
            list(images[group]),
            _known(weighted[group]),
            rewards={reward.name: _known(scores[group]) for reward, scores in zip(rewards, table, strict=True)},
            extra=own | (extra or {}),
        )


def weighted_scores(
    table: list[list[float]], rewards: Sequence[Reward], rows: Sequence[dict[str, Any]], num_generations: int
) -> list[float]:
    """The weighted sum of each image's scores, as in training; NaN where a part of it is missing."""
    scores = torch.tensor(table, dtype=torch.float64).T
    return combine_rewards(scores, weights_of(rewards, rows), num_generations).tolist()


def _known(scores: Sequence[float]) -> list[float | None]:
    return [None if math.isnan(value) else value for value in scores]


def extra_columns(dataset: Dataset) -> Any:
    """The schema of the prompts' further columns, for the writer."""
    return pa.schema([column for column in dataset.features.arrow_schema if column.name not in _TAKEN])
