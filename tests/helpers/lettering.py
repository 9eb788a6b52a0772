"""Pictures of words in real fonts: DejaVu Sans of matplotlib's wheel, and a piece of Droid Sans Fallback."""

import random
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont

LATIN = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"
CHINESE = Path(__file__).parent / "fonts" / "DroidSansFallback-subset.ttf"


def lettered(*lines: str, size: int = 48, width: int = 512, height: int = 256, ink="black", paper="white"):
    """An RGB image of lines of text, in the middle; characters above U+2E7F in the Chinese font."""
    image = Image.new("RGB", (width, height), paper)
    draw = ImageDraw.Draw(image)
    for number, line in enumerate(lines):
        font = ImageFont.truetype(CHINESE if any(c > "\u2e7f" for c in line) else LATIN, size)
        middle = height / 2 + (number - (len(lines) - 1) / 2) * size * 1.5
        draw.text((width / 2, middle), line, font=font, fill=ink, anchor="mm")
    return image


def worn(image: Image.Image, seed: int, degrees: float = 4.0, noise: float = 25.0) -> Image.Image:
    """The image turned a little, with noise; the same for the same seed."""
    turn = random.Random(seed).uniform(-degrees, degrees)
    turned = image.rotate(turn, Image.Resampling.BICUBIC, fillcolor=image.getpixel((0, 0)))
    grain = np.random.default_rng(seed).normal(0, noise, (image.height, image.width, 3))
    return Image.fromarray((np.asarray(turned) + grain).clip(0, 255).astype(np.uint8))
