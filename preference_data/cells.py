"""The cells of one row, converted to what a layout expects, with errors that name the column."""

import json
import math
from typing import Any

from preference_data.images import BadRow, ImageSource
from preference_data.places import shortened
from preference_data.rows import Row
from preference_data.schemas import check_number, in_column


class Cells:
    """Access to the columns of a row.

    Every method takes one or more column names and uses the first that exists and is neither null nor an empty list.
    All of them but the tests :meth:`has`, :meth:`is_blank` and :meth:`is_list` raise BadRow, naming the column.
    """

    def __init__(self, row: Row) -> None:
        self.row = row
        self.where = row.where
        self.values = row.values

    def has(self, *columns: str) -> bool:
        """Whether one of the columns exists and is neither null nor an empty list."""
        return any(not _is_empty(self.values.get(column)) for column in columns)

    def is_blank(self, *columns: str) -> bool:
        """Whether all columns are missing or empty, or the first one with a value holds only white space."""
        value = self._cell(columns)[1]
        return _is_empty(value) or (isinstance(value, str) and not value.strip())

    def is_list(self, *columns: str) -> bool:
        """Whether the value is a list."""
        return isinstance(_decode_list(self._cell(columns)[1]), list)

    def _cell(self, columns: tuple[str, ...]) -> tuple[str, Any]:
        """Return the name and the value of the column to use; if none has a value, one that exists, else the first."""
        for column in columns:
            if not _is_empty(self.values.get(column)):
                return column, self.values[column]
        existing = next((column for column in columns if column in self.values), columns[0])
        return existing, self.values.get(existing)

    def prompt(self, *columns: str) -> str:
        """Return text that is not empty."""
        column, value = self._cell(columns)
        if not isinstance(value, str):
            found = "nothing" if value is None else type(value).__name__
            raise BadRow(in_column(self.where, column), f"expected text, found {found}")
        if not value.strip():
            raise BadRow(in_column(self.where, column), "the prompt is empty")
        return value

    def image(self, *columns: str) -> ImageSource:
        """Return one image, not read yet."""
        column, value = self._cell(columns)
        return ImageSource.of(value, in_column(self.where, column), self.row.folder, self.row.within)

    def images(self, *columns: str) -> list[ImageSource]:
        """Return a list of images, not read yet."""
        column, value = self._cell(columns)
        where = in_column(self.where, column)
        items = _as_list(value, where)
        row = self.row
        return [ImageSource.of(item, f"{where}[{n}]", row.folder, row.within) for n, item in enumerate(items)]

    def number(self, *columns: str, low: float = -math.inf, high: float = math.inf) -> float:
        """Return a finite number from ``low`` to ``high``; true and false count as 1 and 0."""
        column, value = self._cell(columns)
        return _number(value, in_column(self.where, column), low, high)

    def optional(self, *columns: str, low: float = -math.inf, high: float = math.inf) -> float | None:
        """Return the same as :meth:`number`, or None without a value."""
        return self.number(*columns, low=low, high=high) if self.has(*columns) else None

    def numbers(self, *columns: str, low: float = -math.inf, high: float = math.inf) -> list[float | None]:
        """Return a list of numbers, with None for null."""
        column, value = self._cell(columns)
        where = in_column(self.where, column)
        items = enumerate(_as_list(value, where))
        return [None if item is None else _number(item, f"{where}[{number}]", low, high) for number, item in items]

    def index(self, *columns: str) -> int:
        """Return a whole number."""
        column, value = self._cell(columns)
        number = _number(value, in_column(self.where, column), -math.inf, math.inf)
        if number != int(number):
            raise BadRow(
                in_column(self.where, column), f"expected the index of an image, found {shortened(repr(value))}"
            )
        return int(number)


def _is_empty(value: Any) -> bool:
    return value is None or (isinstance(value, (list, tuple)) and not value)


def _number(value: Any, where: str, low: float, high: float) -> float:
    if value is None:
        raise BadRow(where, "expected a number, found nothing")
    if not isinstance(value, (bool, int, float, str)):
        raise BadRow(where, f"expected a number, found {type(value).__name__}")
    try:
        number = float(value)
    except ValueError:
        raise BadRow(where, f"expected a number, found {shortened(repr(value))}") from None
    except OverflowError:
        number = math.inf
    check_number(number, where, low, high)
    return number


def _decode_list(value: Any) -> Any:
    """Decode a list in a CSV cell, which is written as JSON; return anything else unchanged."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            return value  # a caller that needs a list raises the error
    return value


def _as_list(value: Any, where: str) -> list[Any]:
    value = _decode_list(value)
    if not isinstance(value, (list, tuple)):
        found = "nothing" if value is None else type(value).__name__
        raise BadRow(where, f"expected a list, found {found}")
    return list(value)
