"""What simple pictures show, measured from their pixels: background, objects, their colours and shapes, letters.

The pictures are those of the tiny world in `align.tiny.world`, whose visual vocabulary (colours, shapes, glyphs) is
defined here. Nothing is learned. Pixels are labelled with the nearest palette colour; the background is the colour of
the border; what differs from it is divided into connected components, and each is compared with the templates of the
shapes and letters.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from PIL import Image
from scipy import ndimage

from rewards.hints import nearest

SIZE = 64  # pixels: every image is measured at SIZE x SIZE
MIN_SIZE = 8  # pixels: nothing can be recognised in a smaller image

PALETTE: dict[str, tuple[int, int, int]] = {
    "red": (220, 30, 30),
    "green": (30, 160, 50),
    "blue": (30, 60, 220),
    "yellow": (245, 220, 40),
    "purple": (150, 40, 170),
    "cyan": (40, 205, 225),
    "white": (250, 250, 250),
    "black": (10, 10, 10),
}
COLORS = list(PALETTE)
SHAPES = ["circle", "square", "triangle", "cross"]
COUNTS = [1, 2, 3]
RELATIONS = ["left of", "right of", "above", "below"]
WORD_LENGTH = 3
GROUND = 8  # pixels: height of the strip along the bottom that a picture may have

# Letters of 3 x 5 cells. No two strokes touch at a corner only (a blurred decoder would break them there), every letter
# fills its box, and any two letters differ in at least two cells.
GLYPHS: dict[str, np.ndarray] = {
    letter: np.array([[cell == "#" for cell in row] for row in rows.split()])
    for letter, rows in {
        "A": "### #.# ### #.# #.#",
        "C": "### #.. #.. #.. ###",
        "E": "### #.. ### #.. ###",
        "F": "### #.. ##. #.. #..",
        "I": "### .#. .#. .#. ###",
        "J": "..# ..# ..# #.# ###",
        "L": "#.. #.. #.. #.. ###",
        "O": "### #.# #.# #.# ###",
        "P": "### #.# ### #.. #..",
        "S": "### #.. ### ..# ###",
        "T": "### .#. .#. .#. .#.",
        "Y": "#.# #.# ### .#. .#.",
    }.items()
}
LETTERS = list(GLYPHS)

_PALETTE_RGB = np.array(list(PALETTE.values()), dtype=np.float32)
_TEMPLATE = 16  # templates and components are compared on a grid of _TEMPLATE x _TEMPLATE cells
_MIN_AREA = 14  # pixels: smaller components are specks, not objects
_GROUND_SHARE = 0.8  # of the strip's pixels that must have its colour
_OBJECT_DISTANCE = 70.0  # RGB distance from the background beyond which a pixel belongs to an object


def inside(shape: str, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Whether each point lies inside a shape with centre 0 and radius 1; u grows to the right, v downwards."""
    if shape == "circle":
        return u**2 + v**2 <= 1.0
    if shape == "square":
        return np.maximum(abs(u), abs(v)) <= 0.92
    if shape == "triangle":
        return (v <= 0.95) & (v >= -0.95) & (abs(u) <= (v + 0.95) / 1.9)
    if shape == "cross":
        return (np.minimum(abs(u), abs(v)) <= 0.36) & (np.maximum(abs(u), abs(v)) <= 1.0)
    raise ValueError(f"unknown shape {shape!r}.{nearest(shape, SHAPES)}")


@dataclass(frozen=True)
class Object:
    """A connected component of an image. Centre and area are in pixels of the SIZE x SIZE image."""

    color: str
    purity: float  # share of its interior that has `color`, 0 to 1
    shape: str  # the shape that matches best
    shape_fit: float  # intersection over union of that match, 0 to 1
    letter: str  # the letter that matches best
    letter_fit: float  # intersection over union of that match, 0 to 1
    x: float
    y: float
    area: int
    aspect: float  # width / height

    @property
    def is_shape(self) -> bool:
        """Whether it is recognisable as one of SHAPES."""
        return self.shape_fit > 0.7 and 0.6 < self.aspect < 1.67

    @property
    def is_letter(self) -> bool:
        """Whether it is recognisable as one of LETTERS."""
        return self.letter_fit > 0.6 and 0.3 < self.aspect < 0.85

    @property
    def is_plain(self) -> bool:
        """Whether it has one colour."""
        return self.purity > 0.8


@dataclass(frozen=True)
class Scene:
    """What an image shows."""

    background: str
    objects: list[Object]  # from left to right
    ground: str | None = None  # colour of a strip along the bottom, which is not an object

    @property
    def word(self) -> str:
        """The letters from left to right, with "?" for an object that is not a letter."""
        return "".join(o.letter if o.is_letter else "?" for o in self.objects)


def _to_grid(mask: np.ndarray) -> np.ndarray:
    """Sample the bounding box of a bool mask at _TEMPLATE x _TEMPLATE points, flattened."""
    rows, cols = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    points = (np.arange(_TEMPLATE) + 0.5) / _TEMPLATE
    y = rows[0] + (points * (rows[-1] + 1 - rows[0])).astype(int)
    x = cols[0] + (points * (cols[-1] + 1 - cols[0])).astype(int)
    return mask[np.ix_(y, x)].ravel()


@lru_cache(maxsize=1)
def _templates() -> tuple[np.ndarray, np.ndarray]:
    """Make the templates of the shapes and of the letters, each bool (n, _TEMPLATE ** 2)."""
    v, u = np.mgrid[-1.1:1.1:200j, -1.1:1.1:200j]
    shapes = np.stack([_to_grid(inside(shape, u, v)) for shape in SHAPES])
    letters = np.stack([_to_grid(np.kron(glyph, np.ones((16, 16), dtype=bool))) for glyph in GLYPHS.values()])
    return shapes, letters


def _match(grid: np.ndarray, templates: np.ndarray) -> tuple[int, float]:
    """Return the index of the template that matches a flattened mask best, and their intersection over union."""
    iou = (templates & grid).sum(1) / (templates | grid).sum(1)
    return int(iou.argmax()), float(iou.max())


def _measure_object(mask: np.ndarray, labels: np.ndarray, top: int, left: int) -> Object:
    """Measure a component. mask and labels (palette indices) cover its bounding box, with corner (top, left)."""
    shapes, letters = _templates()
    grid = _to_grid(mask)
    shape, shape_fit = _match(grid, shapes)
    letter, letter_fit = _match(grid, letters)
    # The rim mixes object and background into colours that neither has, so that the interior is used if there is one.
    interior = ndimage.binary_erosion(np.pad(mask, 1))[1:-1, 1:-1]
    counts = np.bincount(labels[interior if interior.sum() >= 9 else mask], minlength=len(COLORS))
    y, x = np.nonzero(mask)
    return Object(
        color=COLORS[int(counts.argmax())],
        purity=float(counts.max() / counts.sum()),
        shape=SHAPES[shape],
        shape_fit=shape_fit,
        letter=LETTERS[letter],
        letter_fit=letter_fit,
        x=float(x.mean() + left),
        y=float(y.mean() + top),
        area=len(x),
        aspect=mask.shape[1] / mask.shape[0],
    )


def measure(image: Image.Image) -> Scene:
    """Measure what an image shows.

    The image may have any size from MIN_SIZE up; it is first resized to SIZE x SIZE.

    Raises:
        ValueError: a smaller image.
    """
    if min(image.size) < MIN_SIZE:
        size, least = f"{image.size[0]} x {image.size[1]}", f"{MIN_SIZE} x {MIN_SIZE}"
        raise ValueError(f"an image of {size} pixels is too small: it must have at least {least}")
    image = image.convert("RGB")
    if image.size != (SIZE, SIZE):
        image = image.resize((SIZE, SIZE), Image.Resampling.BOX)
    pixels = np.asarray(image, dtype=np.float32)
    distance = np.linalg.norm(pixels[:, :, None] - _PALETTE_RGB, axis=-1)  # (SIZE, SIZE, colours)
    labels = distance.argmin(-1)
    rim = np.ones((SIZE, SIZE), dtype=bool)
    rim[2:-2, 2:-2] = False
    background = int(np.bincount(labels[rim], minlength=len(COLORS)).argmax())
    foreground = distance[:, :, background] > _OBJECT_DISTANCE
    strip = np.bincount(labels[-GROUND:].ravel(), minlength=len(COLORS))
    ground: int | None = int(strip.argmax())
    if ground == background or strip.max() < _GROUND_SHARE * strip.sum():
        ground = None
    else:
        foreground[-GROUND:] = False
    # 8-connected, so that a thin diagonal stroke remains one component.
    components, _ = ndimage.label(foreground, structure=np.ones((3, 3)))
    objects = []
    for index, box in enumerate(ndimage.find_objects(components), start=1):
        mask = components[box] == index
        if mask.sum() >= _MIN_AREA:
            objects.append(_measure_object(mask, labels[box], box[0].start, box[1].start))
    objects.sort(key=lambda o: o.x)
    return Scene(COLORS[background], objects, None if ground is None else COLORS[ground])
