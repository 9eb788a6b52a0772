"""Aspect-ratio buckets: the few sizes that images are trained at, so that none is ever distorted.

An image goes to the bucket whose aspect ratio is nearest to its own. It is resized, its proportions kept, until it just
covers the bucket, and what then stands over is cropped away evenly on both sides. Small images are enlarged.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

from PIL import Image


class Bucket(NamedTuple):
    """Pixels."""

    height: int
    width: int


def make_buckets(resolution: int, cell: int, max_aspect: float = 2.0) -> list[Bucket]:
    """Every size in multiples of ``cell`` whose area is nearest to resolution squared, up to ``max_aspect`` either way.

    ``max_aspect`` 1 gives the square alone. Raises ValueError when ``resolution`` is no multiple of ``cell``.
    """
    if resolution < cell or resolution % cell:
        near = max(cell, round(resolution / cell) * cell)
        raise ValueError(f"resolution {resolution} must be a multiple of {cell}: the nearest is {near}")
    if max_aspect < 1:
        raise ValueError(f"max_aspect_ratio must be at least 1, found {max_aspect}")
    found = set()
    for width in range(cell, math.ceil(resolution * math.sqrt(max_aspect)) + cell, cell):
        height = max(cell, round(resolution**2 / width / cell) * cell)
        if max(height, width) / min(height, width) <= max_aspect:
            found |= {Bucket(height, width), Bucket(width, height)}
    return sorted(found | {Bucket(resolution, resolution)})


def nearest_bucket(width: int, height: int, buckets: Sequence[Bucket]) -> Bucket:
    """The bucket whose aspect ratio is nearest to that of an image, by their logarithms: 2:1 and 1:2 are alike."""
    aspect = math.log(width / height)
    return min(buckets, key=lambda b: (abs(math.log(b.width / b.height) - aspect), -b.width * b.height))


def fit(image: Image.Image, bucket: Bucket) -> Image.Image:
    """``image`` resized to cover the bucket and cropped at the centre, RGB."""
    scale = max(bucket.width / image.width, bucket.height / image.height)
    # The box of the original that fills the bucket: one resampling for resize and crop.
    box_width, box_height = bucket.width / scale, bucket.height / scale
    left, top = (image.width - box_width) / 2, (image.height - box_height) / 2
    box = (left, top, left + box_width, top + box_height)
    return image.convert("RGB").resize((bucket.width, bucket.height), Image.Resampling.LANCZOS, box=box)


def cropped_share(width: int, height: int, bucket: Bucket) -> float:
    """Share of an image's area that :func:`fit` crops away, 0..1."""
    kept = min(width / bucket.width, height / bucket.height)
    return 1 - (bucket.width * kept) * (bucket.height * kept) / (width * height)
