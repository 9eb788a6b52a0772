"""``flow-align inspect``: what a data set contains, and how a model would read its prompts."""

from collections.abc import Callable, Sequence

from preference_data import inspect


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command, and return its exit code: 0, or 1 if nothing could be read."""
    return inspect.main(argv, _tokens_of)


def _tokens_of(model: str) -> Callable[[str], tuple[int, int]]:
    from align.models.families import outline  # imports torch: not for data alone

    return outline(model).prompt_tokens


if __name__ == "__main__":
    raise SystemExit(main())
