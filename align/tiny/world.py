"""Define the world of the tiny model: its prompts, their specs, and the pictures that show them.

A *spec* is a dict with the keys `SPEC_KEYS`. A value is None where the prompt does not mention the attribute, or
where the kind of prompt does not have it. There are four kinds of prompt:

    count   three red circles on a blue background
    pair    a red circle left of a green square on a blue background
    word    the word CAT in red on white
    open    two squares | red objects on a blue background    (a count with one to three of its four attributes left out)

A hash of the spec decides whether a combination is held out. So the split depends on the prompt and not on a seed,
and no held-out prompt is ever a training caption. Pictures vary little on purpose (one layout for each count, 1 px
of jitter): this lets a model of 3 M parameters follow its prompts after half an hour on two CPU cores.

    python -m align.tiny.world --output align/tiny    # writes prompts/ and images/
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from rewards.shapes import (
    COLORS,
    COUNTS,
    GLYPHS,
    GROUND,
    LETTERS,
    PALETTE,
    RELATIONS,
    SHAPES,
    SIZE,
    SPEC_KEYS,
    WORD_LENGTH,
    ground_color,
    inside,
)

PROMPT_KINDS = ("count", "pair", "word", "open")
HELD_OUT_PERCENT = 20  # of the combinations
DROP = 0.4  # probability that an open prompt leaves out an attribute
JITTER = 0.5  # pixels: how far a centre moves at most, in each direction
GROUNDED_SCALE = 0.85  # size of the shapes in the grounded style, relative to the ordinary one
_SUPERSAMPLE = 4  # subpixels along each axis
_NUMBER = {1: "a", 2: "two", 3: "three"}
_ATTRIBUTES = ("n", "color", "shape", "background")
_OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}


def make_spec(kind: str, **attributes) -> dict:
    """Make a spec with every key of `SPEC_KEYS`; attributes that are not given are None."""
    return dict.fromkeys(SPEC_KEYS) | {"kind": kind} | attributes


def sentence(spec: dict) -> str:
    """Write the prompt of a spec."""
    ending = "" if spec["background"] is None else f" on a {spec['background']} background"
    if spec["kind"] == "word":
        return f"the word {spec['word']} in {spec['color']} on {spec['background']}"
    if spec["kind"] == "pair":
        first, second = f"a {spec['color']} {spec['shape']}", f"a {spec['color2']} {spec['shape2']}"
        return f"{first} {spec['relation']} {second}{ending}"
    n = spec["n"]
    noun = spec["shape"] or "object"
    if n != 1:
        noun = "crosses" if noun == "cross" else noun + "s"
    number = "an" if (n, spec["color"], noun) == (1, None, "object") else _NUMBER.get(n)
    return " ".join(filter(None, [number, spec["color"], noun])) + ending


def _any(words: list[str]) -> str:
    """Return a regular expression that matches each of the words."""
    return "|".join(words)


_NOUN = rf"(?:{_any(SHAPES)}|object)"
_PATTERNS = {
    "word": re.compile(rf"the word (?P<word>[A-Z]+) in (?P<color>{_any(COLORS)}) on (?P<background>{_any(COLORS)})"),
    "pair": re.compile(
        rf"a (?P<color>{_any(COLORS)}) (?P<shape>{_any(SHAPES)}) (?P<relation>{_any(RELATIONS)}) "
        rf"a (?P<color2>{_any(COLORS)}) (?P<shape2>{_any(SHAPES)}) on a (?P<background>{_any(COLORS)}) background"
    ),
    "count": re.compile(
        rf"(?:(?P<n>an?|two|three) )?(?:(?P<color>{_any(COLORS)}) )?(?P<shape>{_NOUN})(?P<plural>(?:e?s)?)"
        rf"(?: on a (?P<background>{_any(COLORS)}) background)?"
    ),
}


def parse(prompt: str) -> dict:
    """Parse a prompt into its spec; the inverse of `sentence`.

    Raises:
        ValueError: the prompt is not one of the tiny world.
    """
    for kind, pattern in _PATTERNS.items():
        if match := pattern.fullmatch(prompt):
            attributes = match.groupdict()
            if kind == "count":
                attributes["n"] = {"a": 1, "an": 1, "two": 2, "three": 3}.get(attributes["n"])
                attributes["shape"] = None if attributes["shape"] == "object" else attributes["shape"]
                attributes.pop("plural")
            spec = make_spec(kind, **attributes)
            if sentence(spec) == prompt:  # the patterns also match wrong grammar such as "a circles"
                return spec
    raise ValueError(f"{prompt!r} is not a prompt of the tiny world; try 'three red circles on a blue background'")


def combination(spec: dict) -> str:
    """Return the key that decides the split of a spec.

    The two sentences for one pair ("A left of B", "B right of A") have the same key. A word has one key, whatever
    its colours.
    """
    if spec["kind"] == "word":
        return f"word {spec['word']}"
    if spec["kind"] == "pair" and spec["relation"] in ("right of", "below"):
        spec = spec | {
            "color": spec["color2"],
            "shape": spec["shape2"],
            "color2": spec["color"],
            "shape2": spec["shape"],
            "relation": _OPPOSITE[spec["relation"]],
        }
    return " ".join(str(spec[key]) for key in SPEC_KEYS)


def split_of(spec: dict) -> str:
    """Return the split of a spec, "train" or "held-out"."""
    digest = int(hashlib.md5(combination(spec).encode()).hexdigest(), 16)
    return "held-out" if digest % 100 < HELD_OUT_PERCENT else "train"


def _complete_spec(rng: random.Random, kind: str) -> dict:
    """Draw a spec of a kind with no attribute left out, of either split.

    No object has the colour of the background.
    """
    background = rng.choice(COLORS)
    object_colors = [color for color in COLORS if color != background]
    attributes = {"background": background, "color": rng.choice(object_colors)}
    if kind == "word":
        return make_spec("word", word="".join(rng.choices(LETTERS, k=WORD_LENGTH)), **attributes)
    attributes["shape"] = rng.choice(SHAPES)
    if kind == "count":
        return make_spec("count", n=rng.choice(COUNTS), **attributes)
    first = (attributes["color"], attributes["shape"])
    others = [(color, shape) for color in object_colors for shape in SHAPES if (color, shape) != first]
    color2, shape2 = rng.choice(others)
    return make_spec("pair", color2=color2, shape2=shape2, relation=rng.choice(RELATIONS), **attributes)


def open_up(spec: dict, rng: random.Random, split: str | None = "train") -> dict:
    """Leave out some of the attributes of a complete count, each with probability DROP.

    At least one attribute is left out and at least one stays. The resulting spec belongs to `split`, or to either
    split if that is None.
    """
    while True:
        left_out = [key for key in _ATTRIBUTES if rng.random() < DROP]
        open_spec = spec | dict.fromkeys(left_out)
        if 0 < len(left_out) < len(_ATTRIBUTES) and split in (None, split_of(open_spec)):
            return open_spec


def sample(rng: random.Random, kind: str, split: str = "train") -> tuple[dict, dict]:
    """Draw a prompt and a picture of one of PROMPT_KINDS.

    In the training split the picture's spec belongs to the training split too, so that the model never sees a
    picture of a held-out combination.

    Returns:
        prompt_spec: what the prompt mentions.
        picture_spec: what the picture shows. It differs from `prompt_spec` for "open" prompts only.

    Raises:
        ValueError: the kind is unknown.
    """
    if kind not in PROMPT_KINDS:
        raise ValueError(f"unknown kind {kind!r}; known: {', '.join(PROMPT_KINDS)}")
    while True:
        picture_spec = _complete_spec(rng, "count" if kind == "open" else kind)
        prompt_spec = open_up(picture_spec, rng, split=None) if kind == "open" else picture_spec
        if split_of(prompt_spec) == split and (split != "train" or split_of(picture_spec) == "train"):
            return prompt_spec, picture_spec


def _layout(spec: dict, rng: random.Random, shrink: float) -> list[tuple[float, float, float]]:
    """Place the objects of a count or a pair around the middle of the area above the ground.

    Returns (centre x, centre y, radius) of each object, in pixels. `shrink` scales radii and distances; below 1 the
    picture has a strip of ground.
    """
    low, middle, high = SIZE * 0.25, SIZE * 0.5, SIZE * 0.75
    if spec["kind"] == "pair":
        start, end = (low, middle), (high, middle)
        if spec["relation"] in ("above", "below"):
            start, end = (middle, low), (middle, high)
        centres = [end, start] if spec["relation"] in ("right of", "below") else [start, end]
    else:
        centres = {
            1: [(middle, middle)],
            2: [(low, middle), (high, middle)],
            3: [(middle, low), (low, high), (high, high)],
        }[spec["n"]]
    radius = (17.0 if len(centres) == 1 else 12.0) * shrink
    up = 0.0 if shrink == 1.0 else GROUND / 2 - 1
    scaled = [(middle + (x - middle) * shrink, middle + (y - middle) * shrink - up) for x, y in centres]
    return [(x + rng.uniform(-JITTER, JITTER), y + rng.uniform(-JITTER, JITTER), radius) for x, y in scaled]


def _paint_word(canvas: np.ndarray, word: str, color: tuple[int, int, int], rng: random.Random) -> None:
    """Paint a word into a (SIZE, SIZE, 3) canvas: glyph cells of 5 x 6 px, letters 5 px apart."""
    width, height = 5, 6
    left = (SIZE - (len(word) * 4 - 1) * width) // 2 + rng.randint(0, 1)
    top = (SIZE - 5 * height) // 2 + rng.randint(0, 1)
    for index, letter in enumerate(word):
        cells = np.kron(GLYPHS[letter], np.ones((height, width), dtype=bool))
        x = left + index * 4 * width
        canvas[top : top + cells.shape[0], x : x + cells.shape[1]][cells] = color


def stand_on_ground(picture: Image.Image, background: str) -> Image.Image:
    """Return a copy of a picture with a strip of ground, which `rewards.shapes.grounded` measures."""
    pixels = np.asarray(picture).copy()
    pixels[-GROUND:] = PALETTE[ground_color(background)]
    return Image.fromarray(pixels)


def render(spec: dict, rng: random.Random, grounded: bool = False) -> Image.Image:
    """Paint a complete spec as a SIZE x SIZE RGB image with smooth edges.

    With `grounded` the picture is in another style: smaller shapes above a strip of ground.
    """
    if grounded:
        return stand_on_ground(_render(spec, rng, shrink=GROUNDED_SCALE), spec["background"])
    return _render(spec, rng)


def _render(spec: dict, rng: random.Random, shrink: float = 1.0) -> Image.Image:
    """Paint a complete spec without ground, its objects scaled by `shrink`."""
    canvas = np.empty((SIZE, SIZE, 3), dtype=np.float32)
    canvas[:] = PALETTE[spec["background"]]
    if spec["kind"] == "word":
        _paint_word(canvas, spec["word"], PALETTE[spec["color"]], rng)
        return Image.fromarray(canvas.astype(np.uint8))
    points = (np.arange(SIZE * _SUPERSAMPLE) + 0.5) / _SUPERSAMPLE
    for index, (x, y, radius) in enumerate(_layout(spec, rng, shrink)):
        second = spec["kind"] == "pair" and index == 1
        shape, color = (spec["shape2"], spec["color2"]) if second else (spec["shape"], spec["color"])
        u, v = np.broadcast_arrays((points - x)[None, :] / radius, (points - y)[:, None] / radius)
        covered = inside(shape, u, v).reshape(SIZE, _SUPERSAMPLE, SIZE, _SUPERSAMPLE).mean((1, 3))[:, :, None]
        canvas = canvas * (1 - covered) + np.array(PALETTE[color]) * covered
    return Image.fromarray(canvas.round().astype(np.uint8))


# name: (training rows, test rows, kinds in turn, the attribute that no prompt says).
# A set has fewer rows where the world has fewer combinations.
PROMPT_SETS: dict[str, tuple[int, int, tuple[str, ...], str | None]] = {
    "background": (512, 128, ("open",), "background"),
    "shape": (512, 128, ("open",), "shape"),
    "number": (512, 128, ("open",), "n"),
    "words": (512, 128, ("word",), None),
    "counts": (512, 128, ("count",), None),
    "words_counts": (512, 128, ("word", "count"), None),
    "full": (512, 192, ("count", "pair", "word"), None),
}


def prompt_rows(name: str, split: str) -> Iterator[dict]:
    """Yield the rows of one prompt set, each prompt once; the rows are always the same."""
    train, test, kinds, unsaid = PROMPT_SETS[name]
    rng = random.Random(f"{name} {split}")
    wanted = train if split == "train" else test
    seen: set[str] = set()
    for _ in range(200 * wanted):
        spec, _ = sample(rng, kinds[len(seen) % len(kinds)], split)
        prompt = sentence(spec)
        if prompt in seen or (unsaid and spec[unsaid] is not None):
            continue
        seen.add(prompt)
        yield {"prompt": prompt, "spec": spec}
        if len(seen) == wanted:
            return


def write_prompts(folder: Path) -> None:
    """Write folder/NAME/train.jsonl and folder/NAME/test.jsonl for every prompt set.

    The test file has the held-out split.
    """
    for name in PROMPT_SETS:
        for file, split in (("train", "train"), ("test", "held-out")):
            path = Path(folder) / name / f"{file}.jsonl"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("".join(json.dumps(row) + "\n" for row in prompt_rows(name, split)))


# Number of training images and of test images, in a style that the model has never seen.
STYLE_SET = (160, 40)


def write_style(folder: Path) -> None:
    """Write the image folders folder/grounded/train and folder/grounded/test, with a metadata.jsonl each."""
    for (file, split), wanted in zip((("train", "train"), ("test", "held-out")), STYLE_SET, strict=True):
        image_folder = Path(folder) / "grounded" / file
        image_folder.mkdir(parents=True, exist_ok=True)
        rng, rows = random.Random(f"grounded {split}"), []
        for number in range(wanted):
            prompt_spec, picture_spec = sample(rng, ("count", "pair", "word")[number % 3], split)
            name = f"{number:03d}.png"
            render(picture_spec, rng, grounded=True).save(image_folder / name, optimize=True)
            rows.append({"file_name": name, "prompt": sentence(prompt_spec)})
        (image_folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Write the prompt sets and the image folder of the tiny world.")
    parser.add_argument("--output", type=Path, required=True, help="folder for prompts/ and images/")
    output = parser.parse_args().output
    write_prompts(output / "prompts")
    write_style(output / "images")
