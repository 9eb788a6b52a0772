"""A reward's weight in the sum of rewards: one number, or one for each category of prompts."""

import contextlib
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from rewards.hints import nearest
from rewards.redaction import redacted

_BY, _DEFAULT = "by", "default"


@dataclass(frozen=True)
class CategoryWeights:
    """A weight for each value of a data column, in a config ``{by: category, text: 1.0, default: 0.0}``.

    column: the data column. weights: weight by value, as text. default: the weight of all other values; None makes them
    an error. Its truth value is False if every weight is 0: such a reward is only measured.
    """

    column: str
    weights: Mapping[str, float]
    default: float | None = None

    def __bool__(self) -> bool:
        return any(self.weights.values()) or bool(self.default)

    def __str__(self) -> str:
        listed = [f"{value}: {weight:g}" for value, weight in self.weights.items()]
        listed += [] if self.default is None else [f"others: {self.default:g}"]
        return f"by {self.column}: {', '.join(listed)}"

    def of(self, value: Any) -> float:
        """Return the weight for a value of the column; raise ValueError if it has none."""
        found = self.weights.get(str(value), self.default)
        if found is None:
            raise ValueError(f"{self.column} {value!r} has no weight.{nearest(str(value), self.weights)}")
        return found

    def check(self, name: str, values: Iterable[Any]) -> None:
        """Raise ValueError, naming the row, for the first value without a weight."""
        for row, value in enumerate(values):
            try:
                self.of(value)
            except ValueError as error:
                raise ValueError(f"reward {name!r}, row {row} of the data: {error} Or give a `default`") from None


Weight = float | CategoryWeights


def parse_weight(name: str, weight: Any) -> Weight:
    """Read the entry ``weight`` of a config; raise ValueError naming the reward and what was found."""
    if not isinstance(weight, Mapping):
        return _number(f"the weight of reward {name!r}", weight)
    if not isinstance(weight.get(_BY), str):
        raise ValueError(
            f"the weight of reward {name!r} is the mapping {redacted(weight)} without `by`: the name of the data column "
            "whose values are the other keys"
        )
    weights = {
        str(value): _number(f"the weight of reward {name!r} for {value!r}", number)
        for value, number in weight.items()
        if value != _BY
    }
    default = weights.pop(_DEFAULT, None)
    if not weights:
        raise ValueError(f"the weight of reward {name!r} has no value of {weight[_BY]!r}: give a plain number instead")
    return CategoryWeights(weight[_BY], weights, default)


def shown(weight: Weight) -> str:
    """Format a weight for people to read."""
    return str(weight) if isinstance(weight, CategoryWeights) else f"{weight:g}"


def _number(what: str, value: Any) -> float:
    if isinstance(value, str):  # YAML reads 1e-1 as text
        with contextlib.suppress(ValueError):
            value = float(value)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError(f"{what} must be a finite number, found {redacted(value)!r}")
    return float(value)
