"""Hints that end an error message: the valid name that is most like the one that was given."""

from collections.abc import Iterable
from difflib import get_close_matches


def nearest(word: str, choices: Iterable[str]) -> str:
    """Return a hint that names the choice most like ``word``, or all choices if none is similar."""
    choices = sorted(choices)
    close = get_close_matches(word, choices, n=1, cutoff=0.5)
    return f" Did you mean {close[0]!r}?" if close else f" There are: {', '.join(choices) or 'none'}."
