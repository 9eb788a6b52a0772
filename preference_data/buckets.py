"""Aspect-ratio buckets: the few sizes that images are trained at.

An image goes to the bucket whose aspect ratio is nearest to its own. It is resized until it just covers the bucket,
with its proportions kept, and what extends beyond the bucket is cropped equally on both sides. No image is ever
distorted; small images are enlarged.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

from PIL import Image


class Bucket(NamedTuple):
    """A size in pixels."""

    height: int
    width: int


def make_buckets(resolution: int, cell: int, max_aspect: float = 2.0) -> list[Bucket]:
    """Return the sizes in multiples of ``cell`` whose area is nearest to ``resolution`` squared.

    Args:
        resolution: side of the square bucket in pixels.
        cell: every height and width is a multiple of this.
        max_aspect: longest side divided by shortest side, at most; 1 gives the square alone.

    Raises:
        ValueError: ``resolution`` is not a multiple of ``cell``, or ``max_aspect`` is below 1.
    """
    if resolution < cell or resolution % cell:
        nearest_multiple = max(cell, round(resolution / cell) * cell)
        raise ValueError(f"resolution {resolution} must be a multiple of {cell}: the nearest is {nearest_multiple}")
    if max_aspect < 1:
        raise ValueError(f"max_aspect_ratio must be at least 1, found {max_aspect}")
    found = set()
    for width in range(cell, math.ceil(resolution * math.sqrt(max_aspect)) + cell, cell):
        height = max(cell, round(resolution**2 / width / cell) * cell)
        if max(height, width) / min(height, width) <= max_aspect:
            found |= {Bucket(height, width), Bucket(width, height)}
    return sorted(found | {Bucket(resolution, resolution)})


def nearest_bucket(width: int, height: int, buckets: Sequence[Bucket]) -> Bucket:
    """Return the bucket whose aspect ratio is nearest to the image's.

    Aspect ratios are compared by their logarithms, so that 2:1 and 1:2 are equally far from a square. Of two that are
    equally near, the one with the larger area is taken.
    """
    aspect = math.log(width / height)
    return min(buckets, key=lambda b: (abs(math.log(b.width / b.height) - aspect), -b.width * b.height))


def fit(image: Image.Image, bucket: Bucket) -> Image.Image:
    """Resize an image to cover the bucket and crop it at the centre; the result is RGB."""
    scale = max(bucket.width / image.width, bucket.height / image.height)
    # The box of the original that fills the bucket, so that one resampling both resizes and crops.
    box_width, box_height = bucket.width / scale, bucket.height / scale
    left, top = (image.width - box_width) / 2, (image.height - box_height) / 2
    box = (left, top, left + box_width, top + box_height)
    return image.convert("RGB").resize((bucket.width, bucket.height), Image.Resampling.LANCZOS, box=box)


def cropped_share(width: int, height: int, bucket: Bucket) -> float:
    """Return the share of an image's area that :func:`fit` crops away, 0 to 1."""
    scale = min(width / bucket.width, height / bucket.height)
    return 1 - (bucket.width * scale) * (bucket.height * scale) / (width * height)


def enlargement(width: int, height: int, bucket: Bucket) -> float:
    """Return how many times longer than its own an image's sides become in :func:`fit`."""
    return max(bucket.width / width, bucket.height / height)
