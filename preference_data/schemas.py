"""What the readers yield: captioned images, and the forms in which people say which image they prefer.

Every form has a ``prompt``, a ``where`` ("file.parquet, row 3") for messages, and :meth:`sources`, its images. What can
be told without touching an image is checked when one is made; :meth:`check` looks at the images as well.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from preference_data.images import BadRow, ImageSource


def at(where: str, column: str) -> str:
    """The place of a column in a row, as every message writes it."""
    return f"{where}, column {column!r}"


def _check_prompt(prompt: object, where: str) -> None:
    if not isinstance(prompt, str):
        raise BadRow(at(where, "prompt"), f"expected text, found {type(prompt).__name__}")
    if not prompt.strip():
        raise BadRow(at(where, "prompt"), "the prompt is empty")


def _check_index(index: object, images: Sequence[ImageSource], where: str, column: str) -> None:
    if isinstance(index, bool) or not isinstance(index, int):
        raise BadRow(at(where, column), f"expected the index of an image, found {index!r}")
    if not 0 <= index < len(images):
        raise BadRow(at(where, column), f"image {index} is out of range: the {len(images)} images count from 0")


def _check_number(value: float | None, where: str, column: str, low: float = -math.inf, high: float = math.inf) -> None:
    if value is None:
        return
    if not math.isfinite(value):
        raise BadRow(at(where, column), f"{value} is no finite number")
    if not low <= value <= high:
        raise BadRow(at(where, column), f"{value} is out of range: {low} to {high}")


@dataclass(frozen=True, eq=False)
class CaptionedImage:
    """An image with its caption as ``prompt``."""

    prompt: str
    image: ImageSource
    where: str = "a captioned image"

    def __post_init__(self) -> None:
        _check_prompt(self.prompt, self.where)

    def sources(self) -> list[ImageSource]:
        return [self.image]

    def check(self) -> None:
        """Raise BadRow if the image's file is missing."""
        self.image.check()


@dataclass(frozen=True, eq=False)
class Pair:
    """Of two images of one prompt, the one that is preferred.

    margin: by how much, as a difference of scores. confidence: the share of votes for ``chosen``, 0 to 1, or what the
    data set gives as such. Either is None when it is not known. annotators: how many votes the pair stands for.
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
        _check_number(self.margin, self.where, "margin")
        _check_number(self.confidence, self.where, "confidence", 0.0, 1.0)
        _check_number(self.annotators, self.where, "annotators", 1)

    @property
    def is_tie(self) -> bool:
        """Whether neither is preferred: a confidence of one half, or no margin."""
        return self.confidence == 0.5 or self.margin == 0

    def sources(self) -> list[ImageSource]:
        return [self.chosen, self.rejected]

    def check(self) -> None:
        """Raise BadRow if a file is missing, or if both are the same image."""
        _check_images(self.sources())
        if self.chosen.same_as(self.rejected):
            raise BadRow(at(self.where, "chosen"), "chosen and rejected are the same image")


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
            raise BadRow(at(self.where, "images"), "there is no image")
        if len(self.images) != len(self.scores):
            raise BadRow(at(self.where, "scores"), f"{len(self.images)} images have {len(self.scores)} scores")
        for score in self.scores:
            _check_number(score, self.where, "scores")

    def sources(self) -> list[ImageSource]:
        return list(self.images)

    def check(self) -> None:
        """Raise BadRow if a file is missing."""
        _check_images(self.images)


@dataclass(frozen=True, eq=False)
class BestWorst:
    """Several images of one prompt with the best and the worst marked: the Qwen-Image report's first form.

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
            raise BadRow(at(self.where, "worst"), f"image {self.worst} is marked as best and as worst")

    def sources(self) -> list[ImageSource]:
        return list(self.images)

    def check(self) -> None:
        """Raise BadRow if a file is missing, or if best and worst are the same image."""
        _check_images(self.images)
        if self.images[self.best].same_as(self.images[self.worst]):
            raise BadRow(at(self.where, "worst"), "best and worst are the same image")


@dataclass(frozen=True, eq=False)
class ReferenceWorst:
    """Images of one prompt beside a reference: ``worst`` (an index, from 0) deviates most from it."""

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
        """Raise BadRow if a file is missing, or if the worst is the reference itself."""
        _check_images(self.sources())
        if self.reference.same_as(self.images[self.worst]):
            raise BadRow(at(self.where, "worst"), "the worst is the same image as the reference")


Preference = Pair | Ranked | BestWorst | ReferenceWorst
Record = CaptionedImage | Preference


def _check_images(images: Sequence[ImageSource]) -> None:
    for image in images:
        image.check()
