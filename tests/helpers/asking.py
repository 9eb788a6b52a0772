"""Requests of plain prompts."""

from collections.abc import Iterable

from align.models.contract import Request


def ask(prompts: Iterable[str]) -> list[Request]:
    return [Request(prompt) for prompt in prompts]
