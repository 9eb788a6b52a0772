"""The world of the tiny model: what may be said, how it is said, and what it looks like.

A *spec* is a dict with the keys `SPEC_KEYS`; None means "not said" (or has no meaning for the kind). Four
kinds of prompt:

    count   three red circles on a blue background
    pair    a red circle left of a green square on a blue background
    word    the word CAT in red on white
    open    two squares | red objects on a blue background    (a count with one to three of its four attributes unsaid)

A fixed share of the combinations is held out by a hash of what is said: the split is a property of a prompt,
not of a seed, and no held-out prompt is ever a training caption. Freedom is kept small on purpose (one layout
for each count, 1 px of jitter): it is what lets a model of 3 M parameters follow its prompts after half an
hour on two CPU cores.

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
DROP = 0.4  # probability that an attribute of an open prompt is not said
JITTER = 0.5  # pixels, either way
GROUNDED_SCALE = 0.85  # of the shapes in the grounded style
_SUPERSAMPLE = 4  # subpixels along each axis
_NUMBER = {1: "a", 2: "two", 3: "three"}
_ATTRIBUTES = ("n", "color", "shape", "background")
_OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}


def make_spec(kind: str, **said) -> dict:
    """A spec with every key; what is not given is None."""
    return dict.fromkeys(SPEC_KEYS) | {"kind": kind} | said


def sentence(spec: dict) -> str:
    """The prompt that says a spec."""
    on = "" if spec["background"] is None else f" on a {spec['background']} background"
    if spec["kind"] == "word":
        return f"the word {spec['word']} in {spec['color']} on {spec['background']}"
    if spec["kind"] == "pair":
        one, other = f"a {spec['color']} {spec['shape']}", f"a {spec['color2']} {spec['shape2']}"
        return f"{one} {spec['relation']} {other}{on}"
    n = spec["n"]
    noun = spec["shape"] or "object"
    if n != 1:
        noun = "crosses" if noun == "cross" else noun + "s"
    number = "an" if (n, spec["color"], noun) == (1, None, "object") else _NUMBER.get(n)
    return " ".join(filter(None, [number, spec["color"], noun])) + on


def _any(words: list[str]) -> str:
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
    """The spec that a prompt says: the inverse of `sentence`. ValueError for a prompt outside the world."""
    for kind, pattern in _PATTERNS.items():
        if found := pattern.fullmatch(prompt):
            said = found.groupdict()
            if kind == "count":
                said["n"] = {"a": 1, "an": 1, "two": 2, "three": 3}.get(said["n"])
                said["shape"] = None if said["shape"] == "object" else said["shape"]
                said.pop("plural")
            spec = make_spec(kind, **said)
            if sentence(spec) == prompt:  # refuses "a circles"
                return spec
    raise ValueError(f"{prompt!r} is no prompt of the tiny world; try 'three red circles on a blue background'")


def combination(spec: dict) -> str:
    """The key by which a spec is held out. Both ways to say one pair have the same key; a word has one
    whatever its colours.
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
    """ "train" or "held-out"."""
    digest = int(hashlib.md5(combination(spec).encode()).hexdigest(), 16)
    return "held-out" if digest % 100 < HELD_OUT_PERCENT else "train"


def _full(rng: random.Random, kind: str) -> dict:
    """A spec of a kind in which everything is said, of either split. No object has the colour of the
    background.
    """
    background = rng.choice(COLORS)
    inks = [color for color in COLORS if color != background]
    said = {"background": background, "color": rng.choice(inks)}
    if kind == "word":
        return make_spec("word", word="".join(rng.choices(LETTERS, k=WORD_LENGTH)), **said)
    said["shape"] = rng.choice(SHAPES)
    if kind == "count":
        return make_spec("count", n=rng.choice(COUNTS), **said)
    others = [(c, s) for c in inks for s in SHAPES if (c, s) != (said["color"], said["shape"])]
    color2, shape2 = rng.choice(others)
    return make_spec("pair", color2=color2, shape2=shape2, relation=rng.choice(RELATIONS), **said)


def open_up(spec: dict, rng: random.Random, split: str | None = "train") -> dict:
    """Leave out some of a full count's attributes, each with probability DROP, never none and never all of
    them.

    What is still said belongs to `split` (None: to either).
    """
    while True:
        unsaid = [key for key in _ATTRIBUTES if rng.random() < DROP]
        said = spec | dict.fromkeys(unsaid)
        if 0 < len(unsaid) < len(_ATTRIBUTES) and split in (None, split_of(said)):
            return said


def sample(rng: random.Random, kind: str, split: str = "train") -> tuple[dict, dict]:
    """Draw (what is said, what is painted) for one of PROMPT_KINDS. They differ for "open" prompts only.

    In the training split what is painted is of the training split too: no picture of a held-out combination
    is ever seen.
    """
    if kind not in PROMPT_KINDS:
        raise ValueError(f"unknown kind {kind!r}; known: {', '.join(PROMPT_KINDS)}")
    while True:
        painted = _full(rng, "count" if kind == "open" else kind)
        said = open_up(painted, rng, split=None) if kind == "open" else painted
        if split_of(said) == split and (split != "train" or split_of(painted) == "train"):
            return said, painted


def _layout(spec: dict, rng: random.Random, shrink: float) -> list[tuple[float, float, float]]:
    """Centre x, centre y and radius in pixels of every object of a count or a pair, about the middle of what is free."""
    low, middle, high = SIZE * 0.25, SIZE * 0.5, SIZE * 0.75
    if spec["kind"] == "pair":
        before, after = (low, middle), (high, middle)
        if spec["relation"] in ("above", "below"):
            before, after = (middle, low), (middle, high)
        centres = [after, before] if spec["relation"] in ("right of", "below") else [before, after]
    else:
        centres = {
            1: [(middle, middle)],
            2: [(low, middle), (high, middle)],
            3: [(middle, low), (low, high), (high, high)],
        }[spec["n"]]
    radius = (17.0 if len(centres) == 1 else 12.0) * shrink
    up = 0.0 if shrink == 1.0 else GROUND / 2 - 1
    placed = [(middle + (x - middle) * shrink, middle + (y - middle) * shrink - up) for x, y in centres]
    return [(x + rng.uniform(-JITTER, JITTER), y + rng.uniform(-JITTER, JITTER), radius) for x, y in placed]


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
    """A picture in the grounded style: `rewards.shapes.grounded` measures it."""
    pixels = np.asarray(picture).copy()
    pixels[-GROUND:] = PALETTE[ground_color(background)]
    return Image.fromarray(pixels)


def render(spec: dict, rng: random.Random, grounded: bool = False) -> Image.Image:
    """Paint a spec in which everything is said: a SIZE x SIZE RGB image with smooth edges.

    grounded: in another style, smaller and standing above a strip of ground.
    """
    if grounded:
        return stand_on_ground(_render(spec, rng, shrink=GROUNDED_SCALE), spec["background"])
    return _render(spec, rng)


def _render(spec: dict, rng: random.Random, shrink: float = 1.0) -> Image.Image:
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


# name: (wanted rows of train, of test, kinds in turn); fewer rows where the world has fewer combinations.
PROMPT_SETS: dict[str, tuple[int, int, tuple[str, ...]]] = {
    "background": (512, 128, ("open",)),
    "words": (512, 128, ("word",)),
    "counts": (512, 128, ("count",)),
    "words_counts": (512, 128, ("word", "count")),
    "full": (512, 192, ("count", "pair", "word")),
}


def prompt_rows(name: str, split: str) -> Iterator[dict]:
    """The rows of one prompt set, each prompt once, always the same."""
    train, test, kinds = PROMPT_SETS[name]
    rng = random.Random(f"{name} {split}")
    wanted = train if split == "train" else test
    seen: set[str] = set()
    for _ in range(200 * wanted):
        said, _ = sample(rng, kinds[len(seen) % len(kinds)], split)
        prompt = sentence(said)
        if prompt in seen or (name == "background" and said["background"] is not None):
            continue
        seen.add(prompt)
        yield {"prompt": prompt, "spec": said}
        if len(seen) == wanted:
            return


def write_prompts(folder: Path) -> None:
    """Write folder/NAME/train.jsonl and folder/NAME/test.jsonl for every prompt set; "test" is the held-out
    split.
    """
    for name in PROMPT_SETS:
        for file, split in (("train", "train"), ("test", "held-out")):
            path = Path(folder) / name / f"{file}.jsonl"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("".join(json.dumps(row) + "\n" for row in prompt_rows(name, split)))


# images of train, of test; an image folder in a style that the model has never seen
STYLE_SET = (160, 40)


def write_style(folder: Path) -> None:
    """Write folder/grounded/{train,test}: an image folder with metadata.jsonl each, kinds in turn."""
    for (file, split), wanted in zip((("train", "train"), ("test", "held-out")), STYLE_SET, strict=True):
        place = Path(folder) / "grounded" / file
        place.mkdir(parents=True, exist_ok=True)
        rng, rows = random.Random(f"grounded {split}"), []
        for number in range(wanted):
            said, painted = sample(rng, ("count", "pair", "word")[number % 3], split)
            name = f"{number:03d}.png"
            render(painted, rng, grounded=True).save(place / name, optimize=True)
            rows.append({"file_name": name, "prompt": sentence(said)})
        (place / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Write the prompt sets and the image folder of the tiny world.")
    parser.add_argument("--output", type=Path, required=True, help="gets prompts/NAME/{train,test}.jsonl and images/")
    output = parser.parse_args().output
    write_prompts(output / "prompts")
    write_style(output / "images")
