"""Randomness by key, by numbers that were drawn once and by hand."""

import pytest

from align.sampling.noise import ImageKey, distinct, first_of_start, seeded_noise


def test_a_key_gives_the_noise_that_it_has_always_given():
    """A checkpoint would go on with other noise, and a published run could not be drawn again, without a word."""
    assert seeded_noise((3, 0, 1, 2, -1), (3,)).tolist() == pytest.approx([-1.595618, -0.623601, -1.056809], abs=1e-6)


def test_the_keys_of_an_image_name_all_that_it_is():
    key = ImageKey(seed=3, rollout=7, prompt=1, sample=2)
    assert key.initial() == (3, 7, 1, 2, -1) and key.step(4) == (3, 7, 1, 2, 4)
    shared = ImageKey(seed=3, rollout="eval", prompt=1, sample=2, start=0)
    assert shared.initial() == (3, "eval", 1, 0, -1) and shared.step(0) == (3, "eval", 1, 2, 0)


@pytest.mark.parametrize(
    ("prefixes", "expected"),
    [
        (None, [0, 1, 2, 3, 4, 5, 6, 7]),
        (4, [0, 1, 2, 3, 4, 5, 6, 7]),
        (2, [0, 1, 0, 1, 4, 5, 4, 5]),
        (1, [0, 0, 0, 0, 4, 4, 4, 4]),
    ],
)
def test_the_images_of_a_group_begin_with_as_many_noises_as_are_asked_for(prefixes, expected):
    """Across groups they never share one: two prompts would be compared by the same luck."""
    assert [first_of_start(image, 4, prefixes) for image in range(8)] == expected


def test_different_values_are_numbered_as_they_appear():
    assert distinct("abacb") == ([0, 1, 3], [0, 1, 0, 2, 1]) and distinct([]) == ([], [])
