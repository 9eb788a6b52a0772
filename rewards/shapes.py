"""Rewards for simple pictures, measured from their pixels: counts, colours, shapes, positions and short words.

The rules are GenEval's (count, colour, position, attributes of single objects), with the letters of a word added.
:mod:`rewards.scenes` measures what a picture shows; its names may be imported from here as well.

A reward is called as `reward(images, prompts, **columns)` and returns a float or None ("not scored") for each image.
The column `spec` describes what each prompt asks for, as a dict with the keys of `SPEC_KEYS`; None means "not said".
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image

from rewards.hints import nearest
from rewards.scenes import (
    COLORS,
    COUNTS,
    GLYPHS,
    GROUND,
    LETTERS,
    MIN_SIZE,
    PALETTE,
    RELATIONS,
    SHAPES,
    SIZE,
    WORD_LENGTH,
    Object,
    Scene,
    inside,
    measure,
)
from rewards.text.targets import edit_distance

__all__ = [
    "COLORS",
    "COUNTS",
    "GLYPHS",
    "GROUND",
    "KINDS",
    "LETTERS",
    "MIN_SIZE",
    "PALETTE",
    "RELATIONS",
    "SHAPES",
    "SIZE",
    "SPEC_KEYS",
    "WORD_LENGTH",
    "Object",
    "Scene",
    "edit_distance",
    "grades",
    "ground_color",
    "grounded",
    "inside",
    "measure",
    "preference",
    "shapes_exact",
    "shapes_following",
    "shapes_word",
    "warm_background",
]

SPEC_KEYS = ("kind", "n", "color", "shape", "color2", "shape2", "relation", "background", "word")
KINDS = ("count", "pair", "word")


def _letter_accuracy(scene: Scene, word: str) -> float:
    """Compare the letters of a scene with a word: 1 - edit distance / length, in [0, 1]."""
    return max(0.0, 1.0 - edit_distance(scene.word, word) / len(word))


def _share(objects: list[Object], condition: Callable[[Object], bool]) -> float:
    """Return the share of the objects that meet a condition; 0 without objects."""
    return sum(map(condition, objects)) / len(objects) if objects else 0.0


def _count_grades(scene: Scene, spec: dict) -> dict[str, float]:
    """Grade n equal objects. What is not said must only be valid: 1 to 3 objects, each a plain shape."""
    n, color, shape, objects = spec["n"], spec["color"], spec["shape"], scene.objects
    return {
        "count": float(len(objects) in COUNTS) if n is None else max(0.0, 1.0 - abs(len(objects) - n) / n),
        "color": _share(objects, lambda o: o.is_plain and color in (None, o.color)),
        "shape": _share(objects, lambda o: o.is_shape and shape in (None, o.shape)),
    }


def _pair_grades(scene: Scene, spec: dict) -> dict[str, float]:
    """Grade two objects and their relation, by the two objects of the scene that fit best."""

    def fit(o: Object, color: str, shape: str) -> tuple[bool, bool]:
        return o.is_plain and o.color == color, o.is_shape and o.shape == shape

    def related(a: Object, b: Object) -> bool:
        across, down = b.x - a.x, b.y - a.y
        if abs(across) > abs(down):
            return spec["relation"] == ("left of" if across > 0 else "right of")
        return spec["relation"] == ("above" if down > 0 else "below")

    n, best = len(scene.objects), (0.0, 0.0, 0.0)
    for a in scene.objects[:8]:  # a picture with more than 8 objects is wrong anyway
        for b in scene.objects[:8]:
            if a is b:
                continue
            first, second = fit(a, spec["color"], spec["shape"]), fit(b, spec["color2"], spec["shape2"])
            colors, shapes = (first[0] + second[0]) / max(2, n), (first[1] + second[1]) / max(2, n)
            best = max(best, (colors, shapes, float(all(first + second) and related(a, b))), key=sum)
    return {"count": max(0.0, 1.0 - abs(n - 2) / 2), "color": best[0], "shape": best[1], "relation": best[2]}


def _word_grades(scene: Scene, spec: dict) -> dict[str, float]:
    """Grade a word: the share of its area that has the colour, and the letter accuracy."""
    area = sum(o.area for o in scene.objects)
    area_in_color = sum(o.area for o in scene.objects if o.is_plain and o.color == spec["color"])
    return {"color": area_in_color / area if area else 0.0, "word": _letter_accuracy(scene, spec["word"])}


def grades(scene: Scene, spec: dict) -> dict[str, float]:
    """Grade each part of a spec in [0, 1], exactly 1 if the scene meets it."""
    if spec["kind"] not in KINDS:
        raise ValueError(f"unknown kind {spec['kind']!r}.{nearest(str(spec['kind']), KINDS)}")
    found = {"count": _count_grades, "pair": _pair_grades, "word": _word_grades}[spec["kind"]](scene, spec)
    if spec["background"] is not None:
        found["background"] = float(scene.background == spec["background"])
    return found


def _is_exact(scene: Scene, spec: dict) -> bool:
    """Whether everything the prompt asks for is right, and everything else is valid."""
    return min(grades(scene, spec).values()) > 0.99


def _rows(images: Sequence[Image.Image], spec: Sequence[dict]) -> list[tuple[Image.Image, dict]]:
    """Return each image with its spec; raise ValueError for a malformed column."""
    if len(images) != len(spec):
        raise ValueError(f"{len(images)} images but {len(spec)} rows in the column 'spec': each image needs one")
    for row in spec:
        missing = [key for key in SPEC_KEYS if key not in row]
        if missing:
            raise ValueError(f"a spec lacks {', '.join(missing)}: it needs the keys {', '.join(SPEC_KEYS)}")
    return list(zip(images, spec, strict=True))


def shapes_following(images: list[Image.Image], prompts: list[str], spec: list[dict], **columns) -> list[float]:
    """Score how well each prompt is followed: the mean grade of the :func:`grades` of its spec, in [0, 1]."""
    return [float(np.mean(list(grades(measure(image), row).values()))) for image, row in _rows(images, spec)]


def shapes_exact(images: list[Image.Image], prompts: list[str], spec: list[dict], **columns) -> list[float]:
    """Score 1.0 if everything that the prompt says is right, else 0.0."""
    return [float(_is_exact(measure(image), row)) for image, row in _rows(images, spec)]


def shapes_word(images: list[Image.Image], prompts: list[str], spec: list[dict], **columns) -> list[float | None]:
    """Score the letters of the word, 1 - edit distance / length in [0, 1]; None if the prompt has no word."""
    rows = _rows(images, spec)
    return [None if row["word"] is None else _letter_accuracy(measure(image), row["word"]) for image, row in rows]


def ground_color(background: str) -> str:
    """Return the colour of the ground: black, or white under a black background."""
    return "white" if background == "black" else "black"


def grounded(images: list[Image.Image], prompts: list[str], **columns) -> list[float]:
    """Score a style: 1.0 if there is a strip of ground along the bottom, else 0.0.

    The strip is GROUND of :data:`SIZE` pixels high and has the colour :func:`ground_color`.
    """
    scenes = [measure(image) for image in images]
    return [float(scene.ground == ground_color(scene.background)) for scene in scenes]


_PREFERABLE: dict[str, list] = {"background": COLORS, "color": COLORS, "shape": SHAPES, "n": COUNTS}


def preference(
    attribute: str, values: Sequence[str | int], wrong: float | None = 0.0
) -> Callable[..., list[float | None]]:
    """Make a reward that prefers some values of an attribute that the prompt leaves open.

    It is 1.0 if the attribute has one of the values and everything the prompt asks for is right, else 0.0; None if the
    prompt itself says the attribute.

    Args:
        attribute: "background", "color", "shape" or "n".
        values: the preferred values.
        wrong: the score of an image in which something said is wrong; None leaves it unscored, so that images with a
            score differ in the preference alone.

    Raises:
        ValueError: an unknown attribute or value, or no value.
    """
    if attribute not in _PREFERABLE:
        raise ValueError(f"unknown attribute {attribute!r}.{nearest(attribute, _PREFERABLE)}")
    preferred_values = [values] if isinstance(values, (str, int)) else list(values)
    if not preferred_values:
        raise ValueError("a preference needs at least one value")
    for value in preferred_values:
        if value not in _PREFERABLE[attribute]:
            hint = nearest(str(value), map(str, _PREFERABLE[attribute]))
            raise ValueError(f"unknown value of {attribute!r} {value!r}.{hint}")

    def reward(images: list[Image.Image], prompts: list[str], spec: list[dict], **columns) -> list[float | None]:
        return [_score_preference(image, row, attribute, preferred_values, wrong) for image, row in _rows(images, spec)]

    reward.__name__ = f"preference_{attribute}_{'_'.join(map(str, preferred_values))}"
    return reward


def _score_preference(
    image: Image.Image, spec: dict, attribute: str, preferred_values: list, wrong: float | None
) -> float | None:
    # A prompt of a pair or a word fixes the objects, even in fields of the spec that are None.
    if spec[attribute] is not None or (attribute != "background" and spec["kind"] != "count"):
        return None
    scene = measure(image)
    if attribute == "background":
        preferred = scene.background in preferred_values
    elif attribute == "n":
        preferred = len(scene.objects) in preferred_values
    else:
        preferred = bool(scene.objects) and all(getattr(o, attribute) in preferred_values for o in scene.objects)
    return float(preferred) if _is_exact(scene, spec) else wrong


warm_background = preference("background", ["red", "yellow"])
