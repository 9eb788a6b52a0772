"""The cells of one row, read as what a layout expects them to be, with errors that name the column."""

import json
import math
from typing import Any

from preference_data.images import BadRow, ImageSource
from preference_data.rows import Row
from preference_data.schemas import at


class Cells:
    """Access to a row's columns. Where several names are given, the first one that is there and not null counts."""

    def __init__(self, row: Row) -> None:
        self.row = row
        self.where = row.where
        self.values = row.values

    def has(self, *columns: str) -> bool:
        """Whether one of the columns is there with something in it: neither null nor an empty list."""
        return any(not _nothing(self.values.get(column)) for column in columns)

    def is_blank(self, *columns: str) -> bool:
        """Whether there is nothing in any of the columns, or text without a letter in the first that has something."""
        value = self._cell(columns)[1]
        return _nothing(value) or (isinstance(value, str) and not value.strip())

    def is_list(self, *columns: str) -> bool:
        """Whether the first of the columns that is there holds a list."""
        return isinstance(_unpacked(self._cell(columns)[1]), list)

    def _cell(self, columns: tuple[str, ...]) -> tuple[str, Any]:
        for column in columns:
            if not _nothing(self.values.get(column)):
                return column, self.values[column]
        there = next((column for column in columns if column in self.values), columns[0])
        return there, self.values.get(there)

    def prompt(self, *columns: str) -> str:
        """Text that is not empty."""
        column, value = self._cell(columns)
        if not isinstance(value, str):
            found = "nothing" if value is None else type(value).__name__
            raise BadRow(at(self.where, column), f"expected text, found {found}")
        if not value.strip():
            raise BadRow(at(self.where, column), "the prompt is empty")
        return value

    def image(self, *columns: str) -> ImageSource:
        """One image, not read yet."""
        column, value = self._cell(columns)
        return ImageSource.of(value, at(self.where, column), self.row.folder)

    def images(self, *columns: str) -> list[ImageSource]:
        """A list of images, not read yet."""
        column, value = self._cell(columns)
        place = at(self.where, column)
        items = _as_list(value, place)
        return [ImageSource.of(item, f"{place}[{number}]", self.row.folder) for number, item in enumerate(items)]

    def number(self, *columns: str, low: float = -math.inf, high: float = math.inf) -> float:
        """A finite number from ``low`` to ``high``; a truth value counts as 0 or 1."""
        column, value = self._cell(columns)
        return _number(value, at(self.where, column), low, high)

    def optional(self, *columns: str, low: float = -math.inf, high: float = math.inf) -> float | None:
        """The same, or None where there is nothing."""
        return self.number(*columns, low=low, high=high) if self.has(*columns) else None

    def numbers(self, *columns: str, low: float = -math.inf, high: float = math.inf) -> list[float | None]:
        """A list of numbers or nulls."""
        column, value = self._cell(columns)
        place = at(self.where, column)
        items = enumerate(_as_list(value, place))
        return [None if item is None else _number(item, f"{place}[{number}]", low, high) for number, item in items]

    def index(self, *columns: str) -> int:
        """A whole number."""
        column, value = self._cell(columns)
        number = _number(value, at(self.where, column), -math.inf, math.inf)
        if number != int(number):
            raise BadRow(at(self.where, column), f"expected the index of an image, found {value!r}")
        return int(number)


def _nothing(value: Any) -> bool:
    return value is None or (isinstance(value, (list, tuple)) and not value)


def _number(value: Any, place: str, low: float, high: float) -> float:
    if value is None:
        raise BadRow(place, "expected a number, found nothing")
    if not isinstance(value, (bool, int, float, str)):
        raise BadRow(place, f"expected a number, found {type(value).__name__}")
    try:
        number = float(value)
    except ValueError:
        raise BadRow(place, f"expected a number, found {value!r}") from None
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise BadRow(place, f"{value} is no finite number")
    if not low <= number <= high:
        limits = f"{low:g} to {high:g}" if high < math.inf else f"from {low:g} on"
        raise BadRow(place, f"{value} is out of range: {limits}")
    return number


def _unpacked(value: Any) -> Any:
    """A list in a CSV cell is written as JSON."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            return json.loads(value)
        except ValueError:
            return value  # whoever needs a list says that this is none
    return value


def _as_list(value: Any, place: str) -> list[Any]:
    value = _unpacked(value)
    if not isinstance(value, (list, tuple)):
        found = "nothing" if value is None else type(value).__name__
        raise BadRow(place, f"expected a list, found {found}")
    return list(value)
