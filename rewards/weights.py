"""A reward's share in the weighted sum: one number, or one for each category of prompts."""

import contextlib
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from rewards.hints import nearest

_BY, _DEFAULT = "by", "default"


@dataclass(frozen=True)
class CategoryWeights:
    """``{by: category, text: 1.0, default: 0.0}``: a weight for each value of a data column.

    column: whose value decides. weights: by value, as text. default: for all other values; None refuses them.
    False where every weight is 0: such a reward is only measured.
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
        """The weight for one value of the column; raises ValueError for a value that has none."""
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
    """What stands under ``weight`` in a config. Raises ValueError naming the reward and what was found."""
    if not isinstance(weight, Mapping):
        return _number(f"the weight of reward {name!r}", weight)
    if not isinstance(weight.get(_BY), str):
        raise ValueError(
            f"the weight of reward {name!r} is a mapping, {dict(weight)}, and needs `by`: the data column whose values "
            "the other keys are"
        )
    weights = {
        str(value): _number(f"the weight of reward {name!r} for {value!r}", number)
        for value, number in weight.items()
        if value != _BY
    }
    default = weights.pop(_DEFAULT, None)
    if not weights:
        raise ValueError(f"the weight of reward {name!r} names no value of {weight[_BY]!r}: a plain number would do")
    return CategoryWeights(weight[_BY], weights, default)


def shown(weight: Weight) -> str:
    """For people to read."""
    return str(weight) if isinstance(weight, CategoryWeights) else f"{weight:g}"


def _number(what: str, value: Any) -> float:
    if isinstance(value, str):  # YAML reads 1e-1 as text
        with contextlib.suppress(ValueError):
            value = float(value)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError(f"{what} must be a finite number, found {value!r}")
    return float(value)
