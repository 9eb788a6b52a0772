"""What a reward is, and what can go wrong with one."""

import abc
import inspect
import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from PIL import Image

from rewards.hints import nearest
from rewards.redaction import redacted
from rewards.threads import REWARDS_LOOP, EventLoop
from rewards.weights import CategoryWeights, Weight, shown

logger = logging.getLogger(__name__)

#: The arguments that every reward takes; it asks for data columns by name.
GIVEN = ("images", "prompts")
#: A column that the run gives beside the data's, unless the data has it: how many updates were done, for each image.
STEP = "step"
#: Seconds after which a call of a reward that runs elsewhere is given up, all its tries together. Other processes of a
#: run wait for the scores, in torch's collectives for at most 1800 s (`ddp_timeout`).
CALL_SECONDS = 1500.0


class RewardError(RuntimeError):
    """A reward broke its contract, or failed for more images than the run allows."""


class RewardFailed(RuntimeError):
    """A reward that runs elsewhere failed for these images; the message is that of the error it raised there."""


class RewardUnavailable(RewardFailed):
    """A call was given up after all its tries: the reward hung, died or could not be reached."""


def describe(error: BaseException) -> str:
    """Describe in one line what a reward raised, in the same words wherever it ran, and without secrets."""
    return redacted(str(error) if isinstance(error, RewardFailed) else f"{type(error).__name__}: {error}")


class Answer(NamedTuple):
    """What a reward that runs elsewhere answers: a score for each image, and extras by name; None for "not scored"."""

    scores: list[float | None]
    extras: dict[str, list[float | None]]


class RunsElsewhere(abc.ABC):
    """A callable reward whose work is done by another process or by a service.

    columns, required: the data columns it takes and those it needs, as in :class:`Reward`.
    """

    columns: tuple[str, ...] | None
    required: tuple[str, ...]

    @abc.abstractmethod
    async def __call__(self, images: list[Image.Image], prompts: list[str], **columns: list[Any]) -> Answer:
        """Score images; raise RewardFailed, RewardUnavailable or RewardError."""

    @abc.abstractmethod
    def check_values(self, row: Mapping[str, Any]) -> None:
        """Raise ValueError, naming the column, for a value of a data row that cannot be sent there."""

    @abc.abstractmethod
    def problem(self) -> str | None:
        """Return why it cannot be called now, or None."""

    @abc.abstractmethod
    def revive(self) -> None:
        """Start again what has died; raise RewardUnavailable if that fails."""

    @abc.abstractmethod
    def close(self) -> None:
        """End the process or close the connections."""


@dataclass(frozen=True)
class Reward:
    """A reward that is ready to be called.

    name: the name it is logged under. function: the callable. weight: its share in the weighted sum, a number or one
    for each category; with 0 it is only measured.
    columns: the data columns it takes by name, None if it takes all of them (``**columns``).
    required: those of them without a default. digest: of what computes it, "" where that is not known.
    """

    name: str
    function: Callable[..., Any]
    weight: Weight
    columns: tuple[str, ...] | None
    required: tuple[str, ...]
    digest: str = ""

    def check_columns(self, available: Iterable[str]) -> None:
        """Raise ValueError if the data has no column that this reward or its weight needs."""
        available = [column for column in available if column != "prompt"]  # passed as `prompts`
        reserved = [name for name in GIVEN if name in available]
        if self.columns is None and reserved:
            raise ValueError(
                f"reward {self.name!r} takes every data column, and a column {reserved[0]!r} clashes with its argument "
                "of that name: rename the column"
            )
        for column in self.required:
            if column not in available:
                raise ValueError(
                    f"reward {self.name!r} needs the data column {column!r}, which the data lacks."
                    + nearest(column, available)
                )

        if isinstance(self.weight, CategoryWeights) and self.weight.column not in available:
            raise ValueError(
                f"the weight of reward {self.name!r} depends on the data column {self.weight.column!r}, which the data "
                "lacks." + nearest(self.weight.column, available)
            )

    def check_weights(self, rows: Mapping[str, Iterable[Any]]) -> None:
        """Raise ValueError, naming the row, if the data has a category without a weight."""
        if isinstance(self.weight, CategoryWeights):
            self.weight.check(self.name, rows[self.weight.column])

    def check_row(self, row: Mapping[str, Any]) -> None:
        """Raise ValueError if this reward runs elsewhere and a value of a data row cannot be sent there."""
        if isinstance(self.function, RunsElsewhere):
            names = row if self.columns is None else [name for name in self.columns if name in row]
            self.function.check_values({name: row[name] for name in names if name != "prompt"})

    def weight_of(self, row: Mapping[str, Any]) -> float:
        """Return this reward's weight for a data row."""
        weight = self.weight
        return weight.of(row[weight.column]) if isinstance(weight, CategoryWeights) else weight

    @property
    def truncated(self) -> int | None:
        """How many prompts were cut because the reward reads only so many tokens; None if it does not count them."""
        return getattr(self.function, "truncated", None)

    def described(self) -> str:
        """Return name, weight, and eight digits of the digest: what tells it from another, and no password."""
        return f"{self.name} (weight {shown(self.weight)}" + (f", {self.digest[:8]})" if self.digest else ")")

    def close(self, loop: EventLoop = REWARDS_LOOP) -> None:
        """Release what the reward holds (a process, connections); warn if that fails, as there are others to close.

        ``loop``: on which it ran, if it is async.
        """
        try:
            close_callable(self.function, loop)
        except Exception as error:  # whatever a user's function raises; the scores are all there
            logger.warning("reward %r could not be closed: %s", self.name, describe(error))


def close_callable(function: Callable[..., Any], loop: EventLoop = REWARDS_LOOP) -> None:
    """Call a reward's method ``close``, if it has one; an async one is awaited on ``loop``, where the reward ran."""
    close = getattr(function, "close", None)
    result = close() if callable(close) else None
    if inspect.isawaitable(result):
        loop.wait_for(result)
