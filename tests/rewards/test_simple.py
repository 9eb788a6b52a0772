"""Rewards without a model: JPEG size and brightness."""

import io

import numpy as np
import pytest
from PIL import Image

from rewards import load_rewards, score


def scores(spec, images):
    values, failures = score(load_rewards([spec]), images, [""] * len(images), {})
    assert not failures
    return values[0]


def noise(size=(64, 48), mode="RGB"):
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 4), dtype=np.uint8)
    return Image.fromarray(pixels, "RGBA").convert(mode)


def test_jpeg_size_is_the_size_of_the_file_that_pil_writes():
    image = noise()
    for quality in (30, 95):
        file = io.BytesIO()
        image.save(file, "JPEG", quality=quality)
        kilobytes = len(file.getvalue()) / 1000
        args = {"quality": quality, "prefer": "large"}
        assert scores({"use": "jpeg_size", "args": args}, [image]) == [kilobytes]
        assert scores({"use": "jpeg_size", "args": args | {"prefer": "small"}}, [image]) == [-kilobytes]


def test_a_plain_image_is_preferred_by_default_and_a_noisy_one_with_large():
    plain, busy = scores("jpeg_size", [Image.new("RGB", (64, 48)), noise()])
    assert busy < plain < 0
    plain, busy = scores({"use": "jpeg_size", "args": {"prefer": "large"}}, [Image.new("RGB", (64, 48)), noise()])
    assert busy > plain > 0


@pytest.mark.parametrize(
    ("args", "found"),
    [
        ({"prefer": "tiny"}, "'small' or 'large', found 'tiny'"),
        ({"quality": 0}, "1 to 95, found 0"),
        ({"quality": 96}, "found 96"),
        ({"quality": 50.5}, "found 50.5"),
        ({"quality": True}, "found True"),
    ],
)
def test_wrong_arguments_of_jpeg_size_are_refused(args, found):
    with pytest.raises(ValueError, match=found):
        load_rewards([{"use": "jpeg_size", "args": args}])


def test_brightness_is_the_mean_luma():
    colours = ("black", "white", (255, 0, 0), (0, 255, 0), (0, 0, 255))
    found = scores("brightness", [Image.new("RGB", (5, 3), colour) for colour in colours])
    assert found == pytest.approx([0.0, 1.0, 0.299, 0.587, 0.114], abs=2 / 255)
    assert scores("brightness", [noise()])[0] == pytest.approx(
        np.asarray(noise(), dtype=float).mean((0, 1)) @ [0.299, 0.587, 0.114] / 255, abs=2 / 255
    )


@pytest.mark.parametrize("use", ["jpeg_size", "brightness"])
def test_images_of_any_size_and_mode_are_scored(use):
    images = [noise((1, 1)), noise(mode="L"), noise(mode="LA"), noise(mode="P"), noise(mode="1"), noise(mode="CMYK")]
    assert np.isfinite(scores(use, images)).all()
    assert scores(use, []) == []


@pytest.mark.parametrize("use", ["jpeg_size", "brightness"])
def test_a_very_large_image_is_scored(use):
    large = Image.new("RGB", (8000, 8000), (128, 128, 128))
    (value,) = scores(use, [large])
    assert value == pytest.approx(128 / 255) if use == "brightness" else value < -100


def test_what_is_transparent_is_seen_on_white():
    clear, half = Image.new("RGBA", (4, 4), (0, 0, 0, 0)), Image.new("RGBA", (4, 4), (0, 0, 0, 128))
    assert scores("brightness", [clear, half]) == pytest.approx([1.0, 0.5], abs=0.01)
    grey = Image.new("LA", (4, 4), (0, 0))
    assert scores("brightness", [grey]) == [1.0]
