"""What a reward is, and what can go wrong with one."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from rewards.hints import nearest
from rewards.weights import CategoryWeights, Weight

#: What every reward is given; all else it asks for by name.
GIVEN = ("images", "prompts")
#: Seconds after which a call of a reward that runs elsewhere is given up, all its tries together: other processes of a
#: run wait for its scores, and torch's collectives (`ddp_timeout`) do so for 1800 s.
CALL_SECONDS = 1500.0


class RewardError(RuntimeError):
    """A reward broke its contract, or failed for more images than the run allows."""


class RewardFailed(RuntimeError):
    """A reward that runs elsewhere failed for these images; the message says what it raised there."""


class RewardUnavailable(RewardFailed):
    """A call was given up: the reward hung, died or could not be reached, as often as it may."""


def describe(error: BaseException) -> str:
    """What a reward raised, in one line; the same wherever it ran."""
    return str(error) if isinstance(error, RewardFailed) else f"{type(error).__name__}: {error}"


@dataclass(frozen=True)
class Reward:
    """A reward ready to be called.

    name: under which it is logged. function: the callable. weight: its share in the sum, one number
    or one for each category; with 0 it is only measured.
    columns: data columns it takes by name; ``None`` when it takes every column (``**columns``).
    required: those of them without a default.
    """

    name: str
    function: Callable[..., Any]
    weight: Weight
    columns: tuple[str, ...] | None
    required: tuple[str, ...]

    def check_columns(self, available: Iterable[str]) -> None:
        """Raise ValueError when the data lacks a column that this reward needs."""
        available = [column for column in available if column != "prompt"]  # those come as `prompts`
        taken = [name for name in GIVEN if name in available]
        if self.columns is None and taken:
            raise ValueError(
                f"reward {self.name!r} takes every data column, and {taken[0]!r} is an argument of its own: "
                "rename the column"
            )
        for column in self.required:
            if column not in available:
                raise ValueError(
                    f"reward {self.name!r} needs the data column {column!r}, which the data lacks."
                    + nearest(column, available)
                )

        if isinstance(self.weight, CategoryWeights) and self.weight.column not in available:
            raise ValueError(
                f"the weight of reward {self.name!r} goes by the data column {self.weight.column!r}, which the data lacks."
                + nearest(self.weight.column, available)
            )

    def check_weights(self, rows: Mapping[str, Iterable[Any]]) -> None:
        """Raise ValueError, naming the row, when the data holds a category that has no weight."""
        if isinstance(self.weight, CategoryWeights):
            self.weight.check(self.name, rows[self.weight.column])

    def check_row(self, row: Mapping[str, Any]) -> None:
        """Raise ValueError where a value of a data row cannot be sent to where this reward runs."""
        if hasattr(self.function, "endpoints") or hasattr(self.function, "environment"):
            from rewards.remote import wire

            wanted = row if self.columns is None else {name: row[name] for name in self.columns if name in row}
            wire.check_columns({name: [value] for name, value in wanted.items() if name != "prompt"})

    def weight_of(self, row: Mapping[str, Any]) -> float:
        """This reward's share in the sum for one data row."""
        weight = self.weight
        return weight.of(row[weight.column]) if isinstance(weight, CategoryWeights) else weight

    def close(self) -> None:
        """Let go of what the reward holds (a worker process, connections), if its callable has a ``close``."""
        close = getattr(self.function, "close", None)
        if callable(close):
            close()
