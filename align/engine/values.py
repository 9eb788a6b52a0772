"""What a setting's value may be: of the kind that its annotation says, and within bounds."""

import math
from dataclasses import dataclass
from enum import Enum
from numbers import Integral, Real
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

_NAMES = {bool: "true or false", int: "a whole number", float: "a number", str: "text", dict: "a mapping"}
_PLURALS = {int: "whole numbers", float: "numbers", str: "texts"}


@dataclass(frozen=True)
class Bounds:
    """The numbers that a setting may be: at least one, at most one, above one, below one."""

    least: float | None = None
    most: float | None = None
    above: float | None = None
    below: float | None = None

    def hold(self, value: float) -> bool:
        """Whether a number lies within."""
        return (
            (self.least is None or value >= self.least)
            and (self.most is None or value <= self.most)
            and (self.above is None or value > self.above)
            and (self.below is None or value < self.below)
        )

    def __str__(self) -> str:
        """Say what a number must be, as in "must be at least 1"."""
        low, high = self.least if self.above is None else self.above, self.most if self.below is None else self.below
        if low is not None and high is not None:
            if self.above is not None and self.below is not None:
                return f"must lie inside ({low}, {high})"
            return f"must lie in {'[' if self.above is None else '('}{low}, {high}{']' if self.below is None else ')'}"
        if self.above is not None:
            return "must be positive" if self.above == 0 else f"must be above {self.above}"
        return f"must be at least {low}" if high is None else f"must be at most {high}"


def wrong_kind(kind: Any, value: Any, mappings: bool = False) -> str | None:
    """Return what a value should be and is not, such as "a whole number"; None where it fits, or nothing is known.

    Args:
        kind: a field's annotation.
        mappings: of a list: its entries may be mappings too, and one may stand alone.
    """
    members = get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)
    if value is None:
        return None if type(None) in members or kind is Any else _described(members)
    if not isinstance(value, (Real, str, list, tuple, dict)):
        return None  # an object, from Python
    if any(isinstance(member, type) and issubclass(member, Enum) for member in members):
        members = tuple(member for member in members if member is not str)  # transformers' enums are written as text
    if any(_fits(member, value, mappings) for member in members):
        return None
    wanted = _described(members)
    return wanted.replace("a number", "a finite number") if _unbounded(value) else wanted


def _fits(kind: Any, value: Any, mappings: bool = False) -> bool:
    """Whether a value fits one member of a union."""
    if get_origin(kind) is Literal:
        return value in get_args(kind)
    if get_origin(kind) is list:
        if mappings:
            return isinstance(value, (str, dict, list, tuple))  # who reads the entries says what they must be
        (element,) = get_args(kind)
        return isinstance(value, (list, tuple)) and all(_fits(element, one) for one in value)
    if kind is bool:
        return isinstance(value, bool)
    if kind is int:
        return isinstance(value, Integral) and not isinstance(value, bool)
    if kind is float:
        return isinstance(value, Real) and not isinstance(value, bool) and not _unbounded(value)
    if kind is str:
        return isinstance(value, str)
    if isinstance(kind, type) and issubclass(kind, Enum):
        return value in [member.value for member in kind]
    plain = get_origin(kind) or kind
    return not isinstance(plain, type) or isinstance(value, plain)


def _described(members: tuple[Any, ...]) -> str:
    return " or ".join(dict.fromkeys(_name(member) for member in members if member is not type(None)))


def _name(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return f"one of {', '.join(map(str, get_args(kind)))}"
    if get_origin(kind) is list:
        return f"a list of {_PLURALS.get(get_args(kind)[0], 'values')}"
    if isinstance(kind, type) and issubclass(kind, Enum):
        return f"one of {', '.join(str(member.value) for member in kind)}"
    return _NAMES.get(get_origin(kind) or kind, getattr(kind, "__name__", str(kind)))


def takes_texts(kind: Any) -> bool:
    """Whether an annotation is a list of texts and no single text, None left out."""
    members = get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)
    return str not in members and any(get_origin(m) is list and get_args(m) == (str,) for m in members)


def _unbounded(value: Any) -> bool:
    """Whether a number is NaN or infinite."""
    return isinstance(value, Real) and not math.isfinite(value)
