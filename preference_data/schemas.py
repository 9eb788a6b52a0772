"""What the readers yield: captioned images, and the forms in which people state which image they prefer.

Every form has a ``prompt``, a ``where`` ("file.parquet, row 3") for messages, and its images, :meth:`sources`. What can
be checked without touching an image is checked when a form is made; :meth:`check` also looks at the images' files.
Both raise BadRow.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from preference_data.images import BadRow, ImageSource


def in_column(where: str, column: str) -> str:
    """Return the place of a column in a row, in the form that all messages use."""
    return f"{where}, column {column!r}"


def check_number(value: float, where: str, low: float = -math.inf, high: float = math.inf) -> None:
    """Raise BadRow for a number that is not finite or not from ``low`` to ``high``."""
    if not math.isfinite(value):
        raise BadRow(where, f"{value} is not a finite number")
    if not low <= value <= high:
        limits = f"{low:g} to {high:g}" if high < math.inf else f"it must be at least {low:g}"
        raise BadRow(where, f"{value:g} is out of range: {limits}")


def _check_prompt(prompt: object, where: str) -> None:
    if not isinstance(prompt, str):
        raise BadRow(in_column(where, "prompt"), f"expected text, found {type(prompt).__name__}")
    if not prompt.strip():
        raise BadRow(in_column(where, "prompt"), "the prompt is empty")
    try:
        prompt.encode()
    except UnicodeEncodeError:  # JSON may hold half of an emoji, which no tokenizer takes
        raise BadRow(in_column(where, "prompt"), "the text is not valid Unicode: a character is cut in half") from None


def _check_index(index: object, images: Sequence[ImageSource], where: str, column: str) -> None:
    if isinstance(index, bool) or not isinstance(index, int):
        raise BadRow(in_column(where, column), f"expected the index of an image, found {index!r}")
    if not 0 <= index < len(images):
        raise BadRow(
            in_column(where, column), f"image {index} is out of range: there are {len(images)} images, counted from 0"
        )


def _check_files(images: Sequence[ImageSource]) -> None:
    for image in images:
        image.check()


@dataclass(frozen=True, eq=False)
class CaptionedImage:
    """An image with its caption as ``prompt``; ``origin``: where the caption stands, if not in a column."""

    prompt: str
    image: ImageSource
    where: str = "a captioned image"
    origin: str = ""

    def __post_init__(self) -> None:
        _check_prompt(self.prompt, self.where)

    def sources(self) -> list[ImageSource]:
        return [self.image]

    def check(self) -> None:
        """Raise BadRow if the image's file is missing."""
        self.image.check()


@dataclass(frozen=True, eq=False)
class Pair:
    """Two images of one prompt, of which ``chosen`` is preferred.

    margin: the difference of their scores; None when unknown. confidence: the share of votes for ``chosen``, 0 to 1, or
    what the data set gives as such; None when unknown. annotators: how many votes the pair stands for.
    """

    prompt: str
    chosen: ImageSource
    rejected: ImageSource
    margin: float | None = None
    confidence: float | None = None
    annotators: int = 1
    where: str = "a pair"

    def __post_init__(self) -> None:
        _check_prompt(self.prompt, self.where)
        if self.margin is not None:
            check_number(self.margin, in_column(self.where, "margin"))
        if self.confidence is not None:
            check_number(self.confidence, in_column(self.where, "confidence"), 0.0, 1.0)
        check_number(self.annotators, in_column(self.where, "annotators"), 1)

    @property
    def is_tie(self) -> bool:
        """Whether neither image is preferred: a confidence of 0.5 or a margin of 0."""
        return self.confidence == 0.5 or self.margin == 0

    def sources(self) -> list[ImageSource]:
        return [self.chosen, self.rejected]

    def check(self) -> None:
        """Raise BadRow if a file is missing, or if both are the same image."""
        _check_files(self.sources())
        if self.chosen.same_as(self.rejected):
            raise BadRow(in_column(self.where, "chosen"), "chosen and rejected are the same image")


@dataclass(frozen=True, eq=False)
class Ranked:
    """Several images of one prompt, each with a score (higher is better) or None (not scored)."""

    prompt: str
    images: Sequence[ImageSource]
    scores: Sequence[float | None]
    where: str = "a ranked list"

    def __post_init__(self) -> None:
        _check_prompt(self.prompt, self.where)
        if not self.images:
            raise BadRow(in_column(self.where, "images"), "there is no image")
        if len(self.images) != len(self.scores):
            raise BadRow(in_column(self.where, "scores"), f"{len(self.images)} images have {len(self.scores)} scores")
        for score in self.scores:
            if score is not None:
                check_number(score, in_column(self.where, "scores"))

    def sources(self) -> list[ImageSource]:
        return list(self.images)

    def check(self) -> None:
        """Raise BadRow if a file is missing."""
        _check_files(self.images)


@dataclass(frozen=True, eq=False)
class BestWorst:
    """Several images of one prompt with the best and the worst marked: the first form of the Qwen-Image report.

    best, worst: indices into ``images``, from 0.
    """

    prompt: str
    images: Sequence[ImageSource]
    best: int
    worst: int
    where: str = "a list with best and worst"

    def __post_init__(self) -> None:
        _check_prompt(self.prompt, self.where)
        _check_index(self.best, self.images, self.where, "best")
        _check_index(self.worst, self.images, self.where, "worst")
        if self.best == self.worst:
            raise BadRow(in_column(self.where, "worst"), f"image {self.worst} is marked as best and as worst")

    def sources(self) -> list[ImageSource]:
        return list(self.images)

    def check(self) -> None:
        """Raise BadRow if a file is missing, or if best and worst are the same image."""
        _check_files(self.images)
        if self.images[self.best].same_as(self.images[self.worst]):
            raise BadRow(in_column(self.where, "worst"), "best and worst are the same image")


@dataclass(frozen=True, eq=False)
class ReferenceWorst:
    """Images of one prompt and a reference, of which ``worst`` (an index, from 0) deviates most from the reference."""

    prompt: str
    reference: ImageSource
    images: Sequence[ImageSource]
    worst: int
    where: str = "a list with a reference"

    def __post_init__(self) -> None:
        _check_prompt(self.prompt, self.where)
        _check_index(self.worst, self.images, self.where, "worst")

    def sources(self) -> list[ImageSource]:
        return [self.reference, *self.images]

    def check(self) -> None:
        """Raise BadRow if a file is missing, or if the worst image is the reference itself."""
        _check_files(self.sources())
        if self.reference.same_as(self.images[self.worst]):
            raise BadRow(in_column(self.where, "worst"), "the worst is the same image as the reference")


Preference = Pair | Ranked | BestWorst | ReferenceWorst
Record = CaptionedImage | Preference
