"""Rewards measured from the pixels of simple pictures: counts, colours, shapes, positions and short words.

The rules are GenEval's (count, colour, position, attributes of single objects) plus the letters of a word.
The pictures are those of the tiny world in `align.tiny.world`, whose visual vocabulary (colours, shapes,
glyphs) stands here. Nothing is learned: pixels are labelled by the nearest palette colour, the background is
the colour of the border, and what differs from it falls into connected components, each compared with the
templates of the shapes and letters.

A reward is called as `reward(images, prompts, **columns)` and gives one float or None ("not scored") for each
image. The column `spec` says what a prompt asks for, one dict for each image with the keys of `SPEC_KEYS`;
None means "not said".
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from PIL import Image
from scipy import ndimage

SIZE = 64  # pixels: every image is measured at SIZE x SIZE
MIN_SIZE = 8  # pixels: below this nothing can be told apart

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

# Letters of 3 x 5 cells. No stroke touches another only by a corner (a blurred decoder would break it there),
# every letter fills its box, and any two differ in at least two cells.
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
SPEC_KEYS = ("kind", "n", "color", "shape", "color2", "shape2", "relation", "background", "word")
KINDS = ("count", "pair", "word")

_PALETTE_RGB = np.array(list(PALETTE.values()), dtype=np.float32)
_TEMPLATE = 16  # templates and components are compared on a grid of _TEMPLATE x _TEMPLATE cells
_MIN_AREA = 14  # pixels: smaller components are specks, not objects
GROUND = 8  # pixels: height of the strip along the bottom that a picture may stand on
_GROUND_SHARE = 0.8  # of the strip that must have its colour
_OBJECT_DISTANCE = 70.0  # RGB distance from the background beyond which a pixel belongs to an object


def inside(shape: str, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Which of the points lie inside `shape`, centred at 0 with radius 1; u grows to the right, v downwards."""
    if shape == "circle":
        return u**2 + v**2 <= 1.0
    if shape == "square":
        return np.maximum(abs(u), abs(v)) <= 0.92
    if shape == "triangle":
        return (v <= 0.95) & (v >= -0.95) & (abs(u) <= (v + 0.95) / 1.9)
    if shape == "cross":
        return (np.minimum(abs(u), abs(v)) <= 0.36) & (np.maximum(abs(u), abs(v)) <= 1.0)
    raise ValueError(_nearest("shape", shape, SHAPES))


def _nearest(what: str, value: object, known: Sequence[object]) -> str:
    """The text of an error about an unknown value: what was found, the nearest valid one, all valid ones."""
    names = [str(k) for k in known]
    close = difflib.get_close_matches(str(value), names, n=1, cutoff=0.0)[0]
    return f"unknown {what} {value!r}; did you mean {close!r}? Known: {', '.join(names)}"


@dataclass(frozen=True)
class Object:
    """One connected component of an image. Centre and area in pixels of the SIZE x SIZE image."""

    color: str
    purity: float  # share of its interior that has `color`, 0..1
    shape: str  # best matching shape ...
    shape_fit: float  # ... and the intersection over union of the match, 0..1
    letter: str  # best matching letter ...
    letter_fit: float  # ... and the intersection over union of the match, 0..1
    x: float
    y: float
    area: int
    aspect: float  # width / height

    @property
    def is_shape(self) -> bool:
        """Whether it is recognisably one of SHAPES."""
        return self.shape_fit > 0.7 and 0.6 < self.aspect < 1.67

    @property
    def is_letter(self) -> bool:
        """Whether it is recognisably one of LETTERS."""
        return self.letter_fit > 0.6 and 0.3 < self.aspect < 0.85

    @property
    def is_plain(self) -> bool:
        """Whether it has one colour."""
        return self.purity > 0.8


@dataclass(frozen=True)
class Scene:
    """What is seen in an image."""

    background: str
    objects: list[Object]  # from left to right
    ground: str | None = None  # colour of a strip along the bottom, which is no object

    @property
    def word(self) -> str:
        """The letters from left to right, "?" for what is none."""
        return "".join(o.letter if o.is_letter else "?" for o in self.objects)


def _to_grid(mask: np.ndarray) -> np.ndarray:
    """The bounding box of a bool mask, sampled at _TEMPLATE x _TEMPLATE points and flattened."""
    rows, cols = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    points = (np.arange(_TEMPLATE) + 0.5) / _TEMPLATE
    y = rows[0] + (points * (rows[-1] + 1 - rows[0])).astype(int)
    x = cols[0] + (points * (cols[-1] + 1 - cols[0])).astype(int)
    return mask[np.ix_(y, x)].ravel()


@lru_cache(maxsize=1)
def _templates() -> tuple[np.ndarray, np.ndarray]:
    """Templates of the shapes and of the letters, bool (n, _TEMPLATE ** 2)."""
    v, u = np.mgrid[-1.1:1.1:200j, -1.1:1.1:200j]
    shapes = np.stack([_to_grid(inside(shape, u, v)) for shape in SHAPES])
    letters = np.stack([_to_grid(np.kron(glyph, np.ones((16, 16), dtype=bool))) for glyph in GLYPHS.values()])
    return shapes, letters


def _match(grid: np.ndarray, templates: np.ndarray) -> tuple[int, float]:
    """The best template for a flattened mask and their intersection over union."""
    iou = (templates & grid).sum(1) / (templates | grid).sum(1)
    return int(iou.argmax()), float(iou.max())


def _object(mask: np.ndarray, labels: np.ndarray, top: int, left: int) -> Object:
    """Measure one component. mask and labels (palette indices) are its bounding box with corner (top, left)."""
    shapes, letters = _templates()
    grid = _to_grid(mask)
    shape, shape_fit = _match(grid, shapes)
    letter, letter_fit = _match(grid, letters)
    # The rim mixes object and background into colours that neither has: look at the interior, if there is one.
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
    """See what is in an image of any size from MIN_SIZE up (it is resized to SIZE x SIZE first)."""
    if min(image.size) < MIN_SIZE:
        found, wanted = f"{image.size[0]} x {image.size[1]}", f"{MIN_SIZE} x {MIN_SIZE}"
        raise ValueError(f"an image of {found} pixels is too small: {wanted} at least")
    image = image.convert("RGB")
    if image.size != (SIZE, SIZE):
        image = image.resize((SIZE, SIZE), Image.Resampling.BOX)
    pixels = np.asarray(image, dtype=np.float32)
    distance = np.linalg.norm(pixels[:, :, None] - _PALETTE_RGB, axis=-1)  # (SIZE, SIZE, colours)
    labels = distance.argmin(-1)
    rim = np.ones((SIZE, SIZE), dtype=bool)
    rim[2:-2, 2:-2] = False
    background = int(np.bincount(labels[rim], minlength=len(COLORS)).argmax())
    figures = distance[:, :, background] > _OBJECT_DISTANCE
    strip = np.bincount(labels[-GROUND:].ravel(), minlength=len(COLORS))
    ground = int(strip.argmax())
    if ground == background or strip[ground] < _GROUND_SHARE * strip.sum():
        ground = -1
    else:
        figures[-GROUND:] = False
    # 8-connected, so that a thin diagonal stroke stays in one piece.
    components, _ = ndimage.label(figures, structure=np.ones((3, 3)))
    objects = []
    for index, box in enumerate(ndimage.find_objects(components), start=1):
        mask = components[box] == index
        if mask.sum() >= _MIN_AREA:
            objects.append(_object(mask, labels[box], box[0].start, box[1].start))
    objects.sort(key=lambda o: o.x)
    return Scene(COLORS[background], objects, None if ground < 0 else COLORS[ground])


def edit_distance(a: str, b: str) -> int:
    """Levenshtein distance of two strings."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, start=1):
        previous, row[0] = row[0], i
        for j, y in enumerate(b, start=1):
            previous, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, previous + (x != y))
    return row[-1]


def _letters(scene: Scene, word: str) -> float:
    """Letter accuracy of a word: 1 - edit distance / length, in [0, 1]."""
    return max(0.0, 1.0 - edit_distance(scene.word, word) / len(word))


def _share(objects: list[Object], holds: Callable[[Object], bool]) -> float:
    """Share of the objects for which something holds; 0 where there is no object."""
    return sum(map(holds, objects)) / len(objects) if objects else 0.0


def _count_parts(scene: Scene, spec: dict) -> dict[str, float]:
    """Grades of n equal objects. What is not said need only be valid: 1 to 3 objects, each a plain shape."""
    n, color, shape, found = spec["n"], spec["color"], spec["shape"], scene.objects
    return {
        "count": float(len(found) in COUNTS) if n is None else max(0.0, 1.0 - abs(len(found) - n) / n),
        "color": _share(found, lambda o: o.is_plain and color in (None, o.color)),
        "shape": _share(found, lambda o: o.is_shape and shape in (None, o.shape)),
    }


def _pair_parts(scene: Scene, spec: dict) -> dict[str, float]:
    """Grades of two objects and their relation; the two that fit best stand for the pair."""

    def fit(o: Object, color: str, shape: str) -> tuple[bool, bool]:
        return o.is_plain and o.color == color, o.is_shape and o.shape == shape

    def related(a: Object, b: Object) -> bool:
        across, down = b.x - a.x, b.y - a.y
        if abs(across) > abs(down):
            return spec["relation"] == ("left of" if across > 0 else "right of")
        return spec["relation"] == ("above" if down > 0 else "below")

    n, best = len(scene.objects), (0.0, 0.0, 0.0)
    for a in scene.objects[:8]:  # a picture with more than 8 objects is wrong whatever they are
        for b in scene.objects[:8]:
            if a is b:
                continue
            one, other = fit(a, spec["color"], spec["shape"]), fit(b, spec["color2"], spec["shape2"])
            colors, shapes = (one[0] + other[0]) / max(2, n), (one[1] + other[1]) / max(2, n)
            best = max(best, (colors, shapes, float(all(one + other) and related(a, b))), key=sum)
    return {"count": max(0.0, 1.0 - abs(n - 2) / 2), "color": best[0], "shape": best[1], "relation": best[2]}


def _word_parts(scene: Scene, spec: dict) -> dict[str, float]:
    """Grades of a picture of a word: share of the ink that has the colour, letter accuracy."""
    ink = sum(o.area for o in scene.objects)
    right = sum(o.area for o in scene.objects if o.is_plain and o.color == spec["color"])
    return {"color": right / ink if ink else 0.0, "word": _letters(scene, spec["word"])}


def parts(scene: Scene, spec: dict) -> dict[str, float]:
    """How well each part of what was said is met, each in [0, 1]; exactly 1 where it is right."""
    if spec["kind"] not in KINDS:
        raise ValueError(_nearest("kind", spec["kind"], KINDS))
    grades = {"count": _count_parts, "pair": _pair_parts, "word": _word_parts}[spec["kind"]](scene, spec)
    if spec["background"] is not None:
        grades["background"] = float(scene.background == spec["background"])
    return grades


def _is_exact(scene: Scene, spec: dict) -> bool:
    """Whether everything that was said is right, and everything free valid."""
    return min(parts(scene, spec).values()) > 0.99


def _rows(images: Sequence[Image.Image], spec: Sequence[dict]) -> list[tuple[Image.Image, dict]]:
    """The images, each with its spec; refuses a malformed column."""
    if len(images) != len(spec):
        raise ValueError(f"{len(images)} images but {len(spec)} rows in the column 'spec': one for each is needed")
    for row in spec:
        missing = [key for key in SPEC_KEYS if key not in row]
        if missing:
            raise ValueError(f"a spec lacks {', '.join(missing)}: every row needs the keys {', '.join(SPEC_KEYS)}")
    return list(zip(images, spec, strict=True))


def shapes_following(images: list[Image.Image], prompts: list[str], spec: list[dict], **columns) -> list[float]:
    """Prompt following in [0, 1]: the mean grade of background, count, colour, shape, relation, word."""
    return [float(np.mean(list(parts(measure(image), row).values()))) for image, row in _rows(images, spec)]


def shapes_exact(images: list[Image.Image], prompts: list[str], spec: list[dict], **columns) -> list[float]:
    """1.0 where everything said is right, else 0.0."""
    return [float(_is_exact(measure(image), row)) for image, row in _rows(images, spec)]


def shapes_word(images: list[Image.Image], prompts: list[str], spec: list[dict], **columns) -> list[float | None]:
    """Letter accuracy of the word in [0, 1] (1 - edit distance / length); None where the prompt has no word."""
    rows = _rows(images, spec)
    return [None if row["word"] is None else _letters(measure(image), row["word"]) for image, row in rows]


def ground_color(background: str) -> str:
    """What a grounded picture stands on: black, or white where the background is black."""
    return "white" if background == "black" else "black"


def grounded(images: list[Image.Image], prompts: list[str], **columns) -> list[float]:
    """How much of a style each picture has, 0 or 1: it stands on a strip of ground along the bottom.

    The strip is GROUND pixels of :data:`SIZE` high, black, or white under a black background.
    """
    scenes = [measure(image) for image in images]
    return [float(scene.ground == ground_color(scene.background)) for scene in scenes]


_PREFERABLE: dict[str, list] = {"background": COLORS, "color": COLORS, "shape": SHAPES, "n": COUNTS}


def preference(
    attribute: str, values: Sequence[str | int], wrong: float | None = 0.0
) -> Callable[..., list[float | None]]:
    """A reward: 1.0 if the attribute is among `values` and everything said is right, else 0.0.

    attribute: "background", "color", "shape" or "n". None where the prompt says it: nothing is left to prefer.
    wrong: the score of an image in which something said is wrong; None leaves it unscored, so that what is ranked
    differs in the preference alone.
    """
    if attribute not in _PREFERABLE:
        raise ValueError(_nearest("attribute", attribute, list(_PREFERABLE)))
    wanted = [values] if isinstance(values, (str, int)) else list(values)
    if not wanted:
        raise ValueError("a preference needs at least one value")
    for value in wanted:
        if value not in _PREFERABLE[attribute]:
            raise ValueError(_nearest(f"value of {attribute!r}", value, _PREFERABLE[attribute]))

    def reward(images: list[Image.Image], prompts: list[str], spec: list[dict], **columns) -> list[float | None]:
        return [_preferred(image, row, attribute, wanted, wrong) for image, row in _rows(images, spec)]

    reward.__name__ = f"preference_{attribute}_{'_'.join(map(str, wanted))}"
    return reward


def _preferred(image: Image.Image, spec: dict, attribute: str, wanted: list, wrong: float | None) -> float | None:
    # Two coloured shapes or a word say their objects by being what they are, even in a field that is None.
    if spec[attribute] is not None or (attribute != "background" and spec["kind"] != "count"):
        return None
    scene = measure(image)
    if attribute == "background":
        liked = scene.background in wanted
    elif attribute == "n":
        liked = len(scene.objects) in wanted
    else:
        liked = bool(scene.objects) and all(getattr(o, attribute) in wanted for o in scene.objects)
    return float(liked) if _is_exact(scene, spec) else wrong


warm_background = preference("background", ["red", "yellow"])
