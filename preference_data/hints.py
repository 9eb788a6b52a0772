"""Hints that end an error message: the valid name that is most like the one that was given."""

from collections.abc import Iterable
from difflib import get_close_matches


def did_you_mean(word: str, choices: Iterable[str], question: str = "Did you mean") -> str:
    """Return a question that names the choice most like ``word``, or "" if none is similar."""
    close = get_close_matches(word, list(choices), n=1, cutoff=0.5)
    return f" {question} {close[0]!r}?" if close else ""


def nearest(word: str, choices: Iterable[str]) -> str:
    """Return a hint that names the choice most like ``word``, or all choices if none is similar."""
    choices = sorted(choices)
    return did_you_mean(word, choices) or f" There are: {', '.join(choices) or 'none'}."
