"""Sample and score: the one way from data rows to images with scores, in training, evaluation and generation."""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from torch import nn

from align.models.contract import FlowModel, NotFinite, Request
from align.sampling.noise import ImageKey
from align.sampling.rollout import Rollout, SamplingPlan, rollout
from align.sampling.scorer import NOT_FINITE, BackgroundScorer, Failure
from rewards import Reward


def requests_of(rows: Sequence[Mapping[str, Any]]) -> list[Request]:
    """Return what each data row asks for."""
    return [Request(row["prompt"]) for row in rows]


@dataclass(frozen=True)
class ScoredSamples:
    """A process's images; their scores may still be on the way."""

    rollout: Rollout
    scorer: BackgroundScorer

    def agreed_scores(self, max_failed_fraction: float) -> list[list[float]]:
        """Wait for the scores, see :meth:`BackgroundScorer.agreed_scores`; called on every process."""
        with self.scorer:
            return self.scorer.agreed_scores(max_failed_fraction)

    def local_scores(self) -> tuple[list[list[float]], list[Failure]]:
        """Wait for the scores, see :meth:`BackgroundScorer.local_scores`; asks no other process."""
        if not self.rollout.finite:
            raise NotFinite(NOT_FINITE)
        with self.scorer:
            return self.scorer.local_scores()


def sample_and_score(
    model: FlowModel,
    rewards: Sequence[Reward],
    rows: Sequence[dict[str, Any]],
    keys: Sequence[ImageKey],
    plan: SamplingPlan,
    *,
    transformer: nn.Module | None = None,
    show_progress: bool = False,
    after: BackgroundScorer | None = None,
    step: int = 0,
) -> ScoredSamples:
    """Sample one image for each data row and key; each chunk is scored while the next one is sampled.

    Args:
        rows, keys: N of each; a row repeats to make a group.
        transformer, show_progress: see :func:`align.sampling.rollout.rollout`.
        after, step: see :class:`~align.sampling.scorer.BackgroundScorer`.
    """
    with ExitStack() as stack:
        scorer = stack.enter_context(BackgroundScorer(rewards, rows, model.device, after, step))
        drawn = rollout(
            model,
            requests_of(rows),
            keys,
            plan,
            transformer=transformer,
            show_progress=show_progress,
            on_images=scorer.add,
        )
        scorer.finite = drawn.finite
        stack.pop_all()  # an error while sampling ends the scorer; from here on whoever reads the scores does
    return ScoredSamples(drawn, scorer)
