"""A reward as a user would write one: a plain function in a file of its own."""

from statistics import fmean

from PIL import ImageStat


def score(images, prompts):
    """Mean pixel value, 0 to 1: continuous, so no group is ever dead."""
    return [fmean(ImageStat.Stat(image).mean) / 255 for image in images]
