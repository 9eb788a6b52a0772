"""Scoring a process's images while the next ones are sampled, and agreeing with all processes on what failed."""

import logging
import math
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from queue import SimpleQueue
from threading import Thread
from typing import Any

import torch
from accelerate.utils import gather_object
from PIL import Image

from rewards import Reward, RewardError, score

logger = logging.getLogger(__name__)

#: (scores of each reward, what each failing reward said), as :func:`rewards.score` gives them.
Scored = tuple[list[list[float]], dict[str, str]]
#: A reward's name, how many images it failed on, and what it said.
Failure = tuple[str, int, str]


def columns_of(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """The data columns beside the prompt, as the rewards take them."""
    return {key: [row[key] for row in rows] for key in rows[0] if key != "prompt"}


def weights_of(rewards: Sequence[Reward], rows: Sequence[Mapping[str, Any]]) -> torch.Tensor:
    """(images, rewards) weights, from the data row of each image."""
    weights = [[reward.weight_of(row) for reward in rewards] for row in rows]
    return torch.tensor(weights, dtype=torch.float64).view(len(rows), len(rewards))


class Scoring:
    """Scores one process's images, part by part, on a thread of its own.

    A reward is called with one part at a time, in their order. Use it as a context: left by an error, it calls no
    reward any more.

    Args:
        rewards: what scores; none gives a table of one column without scores.
        rows: the data row of every image.
        device: made the thread's current one, as CUDA's is each thread's own.
    """

    def __init__(
        self, rewards: Sequence[Reward], rows: Sequence[dict[str, Any]], device: torch.device | None = None
    ) -> None:
        self.rewards, self.rows = rewards, rows
        self.seconds = 0.0  # that rewards took, behind the sampling or not
        self._parts: list[tuple[slice, Future[Scored]]] = []
        self._device = device if device is not None and device.type == "cuda" else None
        self._waiting: SimpleQueue[tuple[slice, list[Image.Image], Future[Scored]] | None] = SimpleQueue()
        self._left = False
        # A daemon: a program that ends does not wait for a reward that hangs.
        self._thread = Thread(target=self._work, name="scoring", daemon=True)
        self._thread.start()

    def __enter__(self) -> "Scoring":
        return self

    def __exit__(self, *error: object) -> None:
        self._left = True
        self._waiting.put(None)
        if error[0] is None:
            self._thread.join()

    def add(self, part: slice, images: list[Image.Image]) -> None:
        """Have the images of ``rows[part]`` scored."""
        if self._left:
            raise RuntimeError("this scoring is over")
        if self.rewards:
            self._parts.append((part, Future()))
            self._waiting.put((part, images, self._parts[-1][1]))

    def _work(self) -> None:
        while (item := self._waiting.get()) is not None and not self._left:
            part, images, future = item
            try:
                future.set_result(self._score(self.rows[part], images))
            except BaseException as error:  # it belongs to whoever waits for the scores
                future.set_exception(error)

    def _score(self, rows: Sequence[dict[str, Any]], images: list[Image.Image]) -> Scored:
        started = time.perf_counter()
        if self._device is not None:
            torch.cuda.set_device(self._device)
        scored = score(self.rewards, images, [row["prompt"] for row in rows], columns_of(rows))
        self.seconds += time.perf_counter() - started
        return scored

    def local(self) -> tuple[list[list[float]], list[Failure]]:
        """This process's scores, one list for each reward, NaN where there is none; and what failed.

        Where a reward with a weight failed, its images are unscored as a whole: without a part of their sum they compare
        with none. Raises RewardError when a reward broke its contract.
        """
        table = [[math.nan] * len(self.rows) for _ in range(max(1, len(self.rewards)))]
        failed: list[Failure] = []
        for part, future in self._parts:
            scores, failures = future.result()
            failed += [(name, len(self.rows[part]), message) for name, message in failures.items()]
            for n, row in enumerate(self.rows[part]):
                lost = any(reward.name in failures and reward.weight_of(row) for reward in self.rewards)
                for reward, column, values in zip(self.rewards, table, scores, strict=True):
                    column[part.start + n] = math.nan if lost and reward.weight else values[n]
        return table, failed

    def table(self, max_failed_fraction: float) -> list[list[float]]:
        """:meth:`local` scores, once all processes have agreed on going on. To be called on every process.

        Raises RewardError, on every process or on none, when a reward broke its contract anywhere or failed for a
        larger share of all processes' images than ``max_failed_fraction``; a smaller failure is logged.
        """
        table, failed, broken = list[list[float]](), list[Failure](), None
        try:
            table, failed = self.local()
        except RewardError as error:
            broken = str(error)
        except Exception as error:  # whatever it is: the other processes must not wait for this one in vain
            broken = f"scoring failed: {type(error).__name__}: {error}"
            logger.exception("scoring failed")
        self._agree(failed, broken, max_failed_fraction)
        return table

    def _agree(self, failed: list[Failure], broken: str | None, max_failed_fraction: float) -> None:
        everywhere = gather_object([(len(self.rows), failed, broken)])
        for _, _, message in everywhere:
            if message is not None:
                raise RewardError(message)
        total = sum(count for count, _, _ in everywhere)
        for reward in self.rewards:
            parts = [(n, text) for _, failures, _ in everywhere for name, n, text in failures if name == reward.name]
            if parts:
                images = sum(n for n, _ in parts)
                message = f"reward {reward.name!r} failed for {images} of {total} images: {parts[0][1]}"
                if images / total > max_failed_fraction:
                    raise RewardError(f"{message} (max_failed_fraction={max_failed_fraction})")
                logger.warning("%s; they are left unscored", message)
