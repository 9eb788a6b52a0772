"""Scoring a process's images while the next ones are sampled, and agreeing with all processes on what failed."""

import logging
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from queue import SimpleQueue
from threading import Thread
from typing import Any

import torch
from accelerate.utils import gather_object
from PIL import Image

from align.models.contract import NotFinite
from rewards import Reward, RewardError
from rewards.calling import score_all
from rewards.contract import STEP

logger = logging.getLogger(__name__)

NOT_FINITE = "images were sampled whose pixels are NaN or infinite; they are not scored"

#: (scores of each reward, what each failing reward said), as :func:`rewards.score` gives them.
Scored = tuple[list[list[float]], dict[str, str]]
#: A reward's name, how many images it failed on, and what it said.
Failure = tuple[str, int, str]


def columns_of(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """Return the data columns beside the prompt, as the rewards take them."""
    return {key: [row[key] for row in rows] for key in rows[0] if key != "prompt"}


def weights_of(rewards: Sequence[Reward], rows: Sequence[Mapping[str, Any]]) -> torch.Tensor:
    """Return (images, rewards) weights, from the data row of each image."""
    weights = [[reward.weight_of(row) for reward in rewards] for row in rows]
    return torch.tensor(weights, dtype=torch.float64).view(len(rows), len(rewards))


@dataclass
class Failures:
    """How many images each reward failed on, and the rule for when that is too many.

    allowed: share of the images, 0 to 1, that a reward may fail on. images: how many were scored. failed, messages: by
    the reward's name, images it failed on and what it said first.
    """

    allowed: float
    images: int = 0
    failed: dict[str, int] = field(default_factory=dict)
    messages: dict[str, str] = field(default_factory=dict)

    def add(self, images: int, failures: Iterable[Failure]) -> None:
        """Count further images, and what failed on them."""
        self.images += images
        for name, count, message in failures:
            self.failed[name] = self.failed.get(name, 0) + count
            self.messages.setdefault(name, message)

    def check(self) -> None:
        """Raise RewardError when a reward failed on a larger share of the images than is allowed."""
        for name, count in self.failed.items():
            if count / self.images > self.allowed:
                raise RewardError(f"{self.describe(name)} (max_failed_fraction={self.allowed})")

    def describe(self, name: str) -> str:
        """Say in words what a reward failed on."""
        return f"reward {name!r} failed for {self.failed[name]} of {self.images} images: {self.messages[name]}"


class BackgroundScorer:
    """Scores one process's images, chunk by chunk, on a thread of its own.

    A reward is called with one chunk at a time, in their order. Use it as a context, or call :meth:`end`: left by an
    error, it calls no further reward.

    Args:
        rewards: what scores; none gives a table of one column without scores.
        rows: the data row of every image.
        device: made the thread's current one, as CUDA's is each thread's own.
        after: a scorer whose images come first: this one calls no reward before that one has ended.
        step: how many updates were done, which rewards may ask for as the column ``step``.
    """

    def __init__(
        self,
        rewards: Sequence[Reward],
        rows: Sequence[dict[str, Any]],
        device: torch.device | None = None,
        after: "BackgroundScorer | None" = None,
        step: int = 0,
    ) -> None:
        self.rewards, self.rows, self.step = rewards, rows, step
        #: What rewards returned beside their scores, by ``NAME/EXTRA``.
        self.extras: dict[str, list[float]] = {}
        #: Seconds that rewards took, hidden behind the sampling or not.
        self.seconds = 0.0
        #: Whether all images have pixels that are numbers; set when they are sampled.
        self.finite = True
        self._chunks: list[tuple[slice, Future[Scored]]] = []
        self._device = device if device is not None and device.type == "cuda" else None
        self._queue: SimpleQueue[tuple[slice, list[Image.Image], Future[Scored]] | None] = SimpleQueue()
        self._ended = False
        self._before: Thread | None = None if after is None else after._thread
        # A daemon: a program that ends does not wait for a reward that hangs.
        self._thread: Thread = Thread(target=self._work, name="scoring", daemon=True)
        self._thread.start()

    def __enter__(self) -> "BackgroundScorer":
        return self

    def __exit__(self, *error: object) -> None:
        self.end()
        if error[0] is None:
            self._thread.join()

    def end(self) -> None:
        """Call no further reward; does not wait for one that is being called."""
        self._ended = True
        self._queue.put(None)

    def add(self, chunk: slice, images: list[Image.Image]) -> None:
        """Have the images of ``rows[chunk]`` scored."""
        if self._ended:
            raise RuntimeError("this scorer has ended")
        if self.rewards:
            self._chunks.append((chunk, Future()))
            self._queue.put((chunk, images, self._chunks[-1][1]))

    def _work(self) -> None:
        if self._before is not None:
            self._before.join()
        while (item := self._queue.get()) is not None and not self._ended:
            chunk, images, future = item
            try:
                future.set_result(self._score(self.rows[chunk], images))
            except BaseException as error:  # it belongs to whoever waits for the scores
                future.set_exception(error)

    def _score(self, rows: Sequence[dict[str, Any]], images: list[Image.Image]) -> Scored:
        started = time.perf_counter()
        if self._device is not None:
            torch.cuda.set_device(self._device)
        columns = {STEP: [self.step] * len(rows)} | columns_of(rows)
        found = score_all(self.rewards, images, [row["prompt"] for row in rows], columns)
        self.seconds += time.perf_counter() - started
        for name, values in found.extras.items():
            self.extras.setdefault(name, []).extend(values)
        return found.scores, found.failures

    def local_scores(self) -> tuple[list[list[float]], list[Failure]]:
        """Wait for this process's scores, one list for each reward, NaN where there is none; and for what failed.

        Where a reward with a weight failed, its images have no score at all: without one of its terms their sum compares
        with no other. Raises RewardError when a reward broke its contract.
        """
        table = [[math.nan] * len(self.rows) for _ in range(max(1, len(self.rewards)))]
        failed: list[Failure] = []
        for chunk, future in self._chunks:
            scores, failures = future.result()
            failed += [(name, len(self.rows[chunk]), message) for name, message in failures.items()]
            for n, row in enumerate(self.rows[chunk]):
                lost = any(reward.name in failures and reward.weight_of(row) for reward in self.rewards)
                for reward, column, values in zip(self.rewards, table, scores, strict=True):
                    column[chunk.start + n] = math.nan if lost and reward.weight else values[n]
        return table, failed

    def agreed_scores(self, max_failed_fraction: float) -> list[list[float]]:
        """Return :meth:`local_scores`, once all processes have agreed on going on; called on every process.

        Raises RewardError, on every process or on none, when a reward broke its contract anywhere or failed for a
        larger share of all processes' images than ``max_failed_fraction``; a smaller failure is logged. NotFinite, alike,
        when some image has pixels that are not numbers.
        """
        table, failed, broken = list[list[float]](), list[Failure](), None
        try:
            table, failed = self.local_scores()
        except RewardError as error:
            broken = str(error)
        except Exception as error:  # whatever it is: the other processes must not wait for this one in vain
            broken = f"scoring failed: {type(error).__name__}: {error}"
            logger.exception("scoring failed")
        failures = Failures(max_failed_fraction)
        for images, failed_there, broken_there, finite in gather_object(
            [(len(self.rows), failed, broken, self.finite)]
        ):
            if not finite:
                raise NotFinite(NOT_FINITE)
            if broken_there is not None:
                raise RewardError(broken_there)
            failures.add(images, failed_there)
        failures.check()
        for name in failures.failed:
            logger.warning("%s; they are left unscored", failures.describe(name))
        return table
