"""Aspect-ratio buckets: nothing is distorted, and little is cropped."""

import numpy as np
import pytest
from PIL import Image

from preference_data.buckets import Bucket, cropped_share, enlargement, fit, make_buckets, nearest_bucket


def test_buckets_have_the_area_asked_for_and_sides_that_divide():
    buckets = make_buckets(512, 16, 2.0)
    assert Bucket(512, 512) in buckets and len(set(buckets)) == len(buckets)
    for bucket in buckets:
        assert bucket.height % 16 == bucket.width % 16 == 0
        assert max(bucket) / min(bucket) <= 2.0
        assert bucket.height * bucket.width == pytest.approx(512**2, rel=0.03)
        assert Bucket(bucket.width, bucket.height) in buckets


def test_an_aspect_ratio_of_one_is_the_square_alone():
    assert make_buckets(64, 16, 1.0) == [Bucket(64, 64)]


def test_a_bucket_of_just_the_greatest_aspect_ratio_is_one():
    """Without it every 2:1 image is cropped to the next ratio, 80 x 48."""
    assert {Bucket(48, 96), Bucket(96, 48)} <= set(make_buckets(64, 16, 2.0))
    assert not {Bucket(48, 96), Bucket(96, 48)} & set(make_buckets(64, 16, 1.99))


def test_of_two_buckets_that_are_equally_near_the_larger_is_taken():
    """An image of 100 x 100 between 3:2 and 2:3, or a ratio that occurs twice, would be trained at fewer pixels."""
    sizes = [Bucket(32, 64), Bucket(64, 128), Bucket(48, 96)]
    assert nearest_bucket(200, 100, sizes) == nearest_bucket(200, 100, sizes[::-1]) == Bucket(64, 128)
    assert nearest_bucket(100, 100, [Bucket(64, 96), Bucket(96, 80)]) == Bucket(96, 80)
    assert nearest_bucket(100, 100, [Bucket(32, 64), Bucket(128, 64)]) == Bucket(128, 64)


def test_an_image_goes_to_the_nearest_ratio():
    buckets = [Bucket(64, 64), Bucket(48, 80), Bucket(80, 48)]
    assert nearest_bucket(1000, 990, buckets) == Bucket(64, 64)
    assert nearest_bucket(1600, 1000, buckets) == Bucket(48, 80)
    assert nearest_bucket(1000, 1600, buckets) == Bucket(80, 48)


@pytest.mark.parametrize("size", [(640, 400), (100, 63), (1000, 300)])
def test_a_circle_stays_a_circle(size):
    """The image is a disc in its middle; whatever bucket it goes to, its width and height stay equal."""
    width, height = size
    y, x = np.mgrid[:height, :width]
    disc = (x - width / 2 + 0.5) ** 2 + (y - height / 2 + 0.5) ** 2 < (0.3 * height) ** 2
    picture = Image.fromarray((disc * 255).astype(np.uint8)).convert("RGB")
    bucket = nearest_bucket(width, height, make_buckets(128, 16, 2.0))
    seen = np.asarray(fit(picture, bucket))[..., 0] > 127
    assert seen.shape == tuple(bucket)
    wide, high = np.flatnonzero(seen.any(0)), np.flatnonzero(seen.any(1))
    assert abs(len(wide) - len(high)) <= 1
    assert abs((wide[0] + wide[-1]) / 2 - (bucket.width - 1) / 2) <= 1


def test_an_image_is_enlarged_until_its_shorter_side_covers_the_bucket():
    """By the longer side the account would call an image large enough whose pixels are stretched to twice their size."""
    assert enlargement(200, 50, Bucket(100, 100)) == 2 == enlargement(50, 200, Bucket(100, 100))
    assert enlargement(400, 300, Bucket(100, 100)) == pytest.approx(1 / 3)


def test_cropping_is_what_stands_over():
    assert cropped_share(200, 100, Bucket(64, 64)) == pytest.approx(0.5)
    assert cropped_share(128, 64, Bucket(32, 64)) == 0
    picture = Image.fromarray(np.repeat(np.arange(200, dtype=np.uint8)[None], 100, 0)).convert("RGB")
    kept = np.asarray(fit(picture, Bucket(100, 100)))[50, :, 0]
    assert (kept == np.arange(50, 150)).all()  # the middle, as it was
    kept = np.asarray(fit(picture.transpose(Image.Transpose.TRANSPOSE), Bucket(100, 100)))[:, 50, 0]
    assert (kept == np.arange(50, 150)).all()  # of a tall image too: faces would lose their foreheads


@pytest.mark.parametrize(
    ("arguments", "message"),
    [((500, 16), "must be a multiple of 16: the nearest is 496"), ((64, 16, 0.5), "at least 1, found 0.5")],
)
def test_what_cannot_be_is_said(arguments, message):
    with pytest.raises(ValueError, match=message):
        make_buckets(*arguments)
