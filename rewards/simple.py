"""Rewards that need no model: the size of a JPEG file, the brightness of an image."""

import io
from collections.abc import Callable

from PIL import Image, ImageStat

from rewards.pictures import to_rgb


def jpeg_size(quality: int = 95, prefer: str = "small") -> Callable[..., list[float]]:
    """Make a reward of an image's size as a JPEG, in kilobytes (1000 bytes), negative with ``prefer: small``.

    With "small" it is the compressibility of DDPO (arXiv 2305.13301), with "large" the incompressibility. It grows with
    the number of pixels, so compare only images of the same size.

    Args:
        quality: of the JPEG, 1 to 95. prefer: "small" or "large".

    Raises:
        ValueError: an argument out of range.
    """
    if prefer not in ("small", "large"):
        raise ValueError(f"jpeg_size: prefer must be 'small' or 'large', found {prefer!r}")
    if isinstance(quality, bool) or not isinstance(quality, int) or not 1 <= quality <= 95:
        raise ValueError(f"jpeg_size: quality must be a whole number from 1 to 95, found {quality!r}")
    sign = -1.0 if prefer == "small" else 1.0

    def reward(images: list[Image.Image], prompts: list[str]) -> list[float]:
        return [sign * _jpeg_bytes(image, quality) / 1000 for image in images]

    return reward


def _jpeg_bytes(image: Image.Image, quality: int) -> int:
    file = io.BytesIO()
    to_rgb(image).save(file, format="JPEG", quality=quality)
    return file.tell()


def brightness(images: list[Image.Image], prompts: list[str]) -> list[float]:
    """Measure the mean luma (ITU-R 601) of each image, 0 (black) to 1 (white)."""
    return [ImageStat.Stat(to_rgb(image).convert("L")).mean[0] / 255 for image in images]
