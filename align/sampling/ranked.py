"""Sampled groups as rows of a ranked data set, through ``preference_data``'s writer."""

import json
import math
from collections.abc import Sequence, Set
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from datasets import Dataset
from PIL import Image

from align.maths.advantages import combine_rewards
from align.sampling.scorer import weights_of
from preference_data.writer import RankedWriter, json_column
from rewards import Reward

#: Columns that the writer gives its own meaning.
_RESERVED = {"index", "prompt", "images", "scores"}


def write_groups(
    writer: RankedWriter,
    indices: Sequence[int],
    rows: Sequence[dict[str, Any]],
    images: Sequence[Image.Image],
    rewards: Sequence[Reward],
    table: list[list[float]],
    num_generations: int,
    extra: dict[str, Any] | None = None,
    skip: Set[int] = frozenset(),
) -> None:
    """Write whole groups, a row each, with their weighted score and every reward's own.

    Args:
        indices: the index of each group in the data set.
        rows, images: one for each image.
        table: scores of each reward, NaN for none.
        extra: further columns, the same for all groups.
        skip: indices that are not written.
    """
    weighted = weighted_scores(table, rewards, rows, num_generations)
    for number, index in enumerate(indices):
        if index in skip:
            continue
        group = slice(number * num_generations, (number + 1) * num_generations)
        columns = {
            key: json.dumps(value, ensure_ascii=False) if key in writer.json_columns and value is not None else value
            for key, value in rows[group.start].items()
            if key not in _RESERVED
        }
        writer.write(
            index,
            rows[group.start]["prompt"],
            list(images[group]),
            _none_for_nan(weighted[group]),
            rewards={reward.name: _none_for_nan(scores[group]) for reward, scores in zip(rewards, table, strict=True)},
            extra=columns | (extra or {}),
        )


def weighted_scores(
    table: list[list[float]], rewards: Sequence[Reward], rows: Sequence[dict[str, Any]], num_generations: int
) -> list[float]:
    """Return the weighted sum of each image's scores, as in training; NaN where one of them is missing."""
    scores = torch.tensor(table, dtype=torch.float64).T
    return combine_rewards(scores, weights_of(rewards, rows), num_generations).tolist()


def _none_for_nan(scores: Sequence[float]) -> list[float | None]:
    return [None if math.isnan(value) else value for value in scores]


def extra_columns(dataset: Dataset) -> Any:
    """Return the schema of the prompts' further columns, for the writer; what is of several types is kept as JSON."""
    columns = [column for column in dataset.features.arrow_schema if column.name not in _RESERVED]
    return pa.schema([json_column(c.name) if "arrow.json" in str(c.type) else c for c in columns])


class RolloutWriter:
    """Keeps every image of a run with its scores, as a ranked data set that DPO reads.

    Args:
        folder: of the data set; a resumed run goes on with what is there.
        dataset: the prompts, whose further columns are kept.
        groups_per_rollout: groups of a rollout, over all processes, which have whole groups each.
        process: (index, count).
    """

    def __init__(
        self,
        folder: Path,
        dataset: Dataset,
        rewards: Sequence[Reward],
        num_generations: int,
        groups_per_rollout: int,
        process: tuple[int, int],
    ) -> None:
        self._rewards, self._num_generations, self._per_rollout = rewards, num_generations, groups_per_rollout
        self._per_process, self._process = groups_per_rollout // process[1], process
        self._writer = RankedWriter(
            folder,
            shard=process,
            rows_per_file=self._per_process,
            rewards=[reward.name for reward in rewards],
            columns=pa.schema([*extra_columns(dataset), pa.field("rollout_index", pa.int64())]),
        )

    def write(
        self, rollout_index: int, rows: Sequence[dict[str, Any]], images: Sequence[Image.Image], scores: torch.Tensor
    ) -> None:
        """Append this process's groups of a rollout, unless they are there; ``scores``: (images, rewards)."""
        first = rollout_index * self._per_rollout + self._process[0] * self._per_process
        if first in self._writer.done:
            return
        indices, table = range(first, first + self._per_process), scores.T.tolist()
        extra = {"rollout_index": rollout_index}
        write_groups(self._writer, indices, rows, images, self._rewards, table, self._num_generations, extra)
