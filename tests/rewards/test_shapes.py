"""The pixel-measured rewards: pictures that are right score 1, pictures that are wrong do not, in every way
they can be wrong.
"""

import json
import random

import numpy as np
import pytest
from datasets import load_dataset
from PIL import Image, ImageDraw

from align.tiny import world
from rewards import shapes


def painted(kind: str, number: int = 40, seed: int = 0, split: str = "train"):
    """(images, prompts, said, painted) of one kind."""
    rng = random.Random(seed)
    said, specs = zip(*(world.sample(rng, kind, split) for _ in range(number)), strict=True)
    return [world.render(spec, rng) for spec in specs], [world.sentence(spec) for spec in said], list(said), list(specs)


def score(reward, image: Image.Image, spec: dict) -> float | None:
    return reward([image], ["a prompt"], spec=[spec])[0]


@pytest.mark.parametrize("kind", world.PROMPT_KINDS)
@pytest.mark.parametrize("split", ["train", "held-out"])
@pytest.mark.parametrize("seed", [0, 1])
def test_true_pictures_score_one(kind, split, seed):
    images, prompts, said, _ = painted(kind, seed=seed, split=split)
    assert shapes.shapes_following(images, prompts, spec=said) == [1.0] * len(images)
    assert shapes.shapes_exact(images, prompts, spec=said) == [1.0] * len(images)
    words = shapes.shapes_word(images, prompts, spec=said)
    assert words == [1.0 if kind == "word" else None] * len(images)


@pytest.mark.parametrize("kind", ["count", "pair", "word"])
def test_pictures_of_other_prompts_score_low(kind):
    images, prompts, said, _ = painted(kind)
    others = said[1:] + said[:1]
    assert np.mean(shapes.shapes_following(images, prompts, spec=others)) < 0.45
    assert np.mean(shapes.shapes_exact(images, prompts, spec=others)) < 0.1


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"n": 2}, "count"),
        ({"color": "green"}, "color"),
        ({"shape": "square"}, "shape"),
        ({"background": "cyan"}, "background"),
    ],
)
def test_one_wrong_attribute_costs_its_part_and_no_other(change, part):
    spec = world.make_spec("count", n=3, color="red", shape="circle", background="blue")
    image = world.render(spec | change, random.Random(0))
    grades = shapes.grades(shapes.measure(image), spec)
    assert grades.pop(part) < 1.0
    assert set(grades.values()) == {1.0}
    assert score(shapes.shapes_exact, image, spec) == 0.0
    assert 0.5 < score(shapes.shapes_following, image, spec) < 1.0


@pytest.mark.parametrize("relation", shapes.RELATIONS)
@pytest.mark.parametrize("asked", shapes.RELATIONS)
def test_relation_is_measured(relation, asked):
    said = {"color": "red", "shape": "circle", "color2": "green", "shape2": "cross", "background": "white"}
    image = world.render(world.make_spec("pair", relation=relation, **said), random.Random(0))
    spec = world.make_spec("pair", relation=asked, **said)
    assert shapes.grades(shapes.measure(image), spec)["relation"] == float(relation == asked)


def test_both_ways_to_say_a_pair_score_the_same_picture():
    one = world.parse("a red circle left of a red square on a blue background")
    other = world.parse("a red square right of a red circle on a blue background")
    image = world.render(one, random.Random(0))
    assert score(shapes.shapes_exact, image, one) == score(shapes.shapes_exact, image, other) == 1.0


def test_swapped_colours_of_a_pair_are_noticed():
    image = world.render(world.parse("a red circle left of a green square on a blue background"), random.Random(0))
    assert (
        score(shapes.shapes_exact, image, world.parse("a green circle left of a red square on a blue background"))
        == 0.0
    )


@pytest.mark.parametrize(("shown", "accuracy"), [("CAT", 1.0), ("CAP", 2 / 3), ("COP", 1 / 3), ("SOF", 0.0)])
def test_word_is_graded_by_letter(shown, accuracy):
    spec = world.parse("the word CAT in red on white")
    image = world.render(spec | {"word": shown}, random.Random(0))
    assert shapes.measure(image).word == shown
    assert score(shapes.shapes_word, image, spec) == pytest.approx(accuracy)


def test_every_letter_and_every_pair_of_colours_is_told_apart():
    rng = random.Random(0)
    for letter in shapes.LETTERS:
        spec = world.make_spec("word", word=letter * 3, color="red", background="blue")
        assert shapes.measure(world.render(spec, rng)).word == letter * 3
    for color in shapes.COLORS:
        for background in set(shapes.COLORS) - {color}:
            spec = world.make_spec("count", n=1, color=color, shape="cross", background=background)
            assert score(shapes.shapes_exact, world.render(spec, rng), spec) == 1.0


def test_edit_distance():
    assert [shapes.edit_distance("CAT", other) for other in ("CAT", "CT", "CATS", "ATC", "")] == [0, 1, 1, 2, 3]


def test_what_is_free_must_still_be_valid():
    spec = world.parse("a circle")
    image = world.render(world.parse("a red circle on a blue background"), random.Random(0))
    assert score(shapes.shapes_exact, image, spec) == 1.0
    ImageDraw.Draw(image).rectangle((32, 0, 63, 63), fill="yellow")  # half of it gone
    assert score(shapes.shapes_exact, image, spec) == 0.0
    two_coloured = world.render(world.parse("a red circle on a blue background"), random.Random(0))
    pixels = np.asarray(two_coloured).copy()
    pixels[32:][pixels[32:, :, 0] > 128] = shapes.PALETTE["yellow"]
    assert score(shapes.shapes_exact, Image.fromarray(pixels), spec) == 0.0
    assert score(shapes.shapes_exact, Image.fromarray(pixels), world.parse("objects on a blue background")) == 0.0


ALL_PROMPTS = [
    "three red circles on a blue background",
    "a red circle left of a green square on a blue background",
    "the word CAT in red on blue",
    "two squares",
]


@pytest.mark.parametrize("prompt", ALL_PROMPTS)
def test_blank_and_noise_score_low(prompt):
    spec = world.parse(prompt)
    blank = Image.new("RGB", (64, 64), shapes.PALETTE["blue"])
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    for image in (blank, noise):
        assert score(shapes.shapes_exact, image, spec) == 0.0
        assert score(shapes.shapes_following, image, spec) <= 0.5
    assert shapes.measure(blank) == shapes.Scene("blue", [])


@pytest.mark.parametrize("size", [(8, 8), (64, 64), (100, 60), (1024, 1024)])
def test_any_size_is_measured(size):
    spec = world.parse("a red square on a white background")
    image = world.render(spec, random.Random(0)).resize(size)
    scene = shapes.measure(image)
    assert scene.background == "white" and len(scene.objects) == 1 and scene.objects[0].color == "red"
    if min(size) >= 60:
        assert score(shapes.shapes_exact, image, spec) == 1.0


def test_other_modes_are_measured():
    spec = world.parse("a black square on a white background")
    for mode in ("L", "RGBA", "P"):
        assert score(shapes.shapes_exact, world.render(spec, random.Random(0)).convert(mode), spec) == 1.0


def test_too_small_an_image_is_refused():
    with pytest.raises(ValueError, match="at least 8 x 8"):
        shapes.measure(Image.new("RGB", (7, 64)))


def test_malformed_columns_are_refused():
    image, spec = Image.new("RGB", (64, 64)), world.parse("two squares")
    with pytest.raises(ValueError, match="2 images but 1 rows"):
        shapes.shapes_exact([image, image], ["", ""], spec=[spec])
    with pytest.raises(ValueError, match="lacks word"):
        shapes.shapes_exact([image], [""], spec=[{k: v for k, v in spec.items() if k != "word"}])
    with pytest.raises(ValueError, match="Did you mean 'count'"):
        shapes.shapes_exact([image], [""], spec=[spec | {"kind": "counts"}])


def test_preference_wants_the_value_and_the_prompt():
    spec = world.parse("a circle")
    rng = random.Random(0)

    def shown(prompt):
        return score(shapes.warm_background, world.render(world.parse(prompt), rng), spec)

    assert shown("a green circle on a red background") == 1.0
    assert shown("a green circle on a yellow background") == 1.0
    assert shown("a green circle on a blue background") == 0.0  # not warm
    assert shown("a green square on a red background") == 0.0  # not followed
    assert shown("two green circles on a red background") == 0.0
    assert score(shapes.warm_background, Image.new("RGB", (64, 64), shapes.PALETTE["red"]), spec) == 0.0


@pytest.mark.parametrize(
    ("attribute", "values", "prompt", "expected"),
    [
        ("background", ["red"], "two squares on a red background", None),
        ("background", ["red"], "two squares", 1.0),
        ("background", ["blue"], "two squares", 0.0),
        ("color", ["green", "white"], "two squares", 1.0),
        ("color", ["white"], "two squares", 0.0),
        ("color", ["white"], "two green squares", None),
        ("shape", ["square"], "two green objects", 1.0),
        ("shape", ["circle"], "two green objects", 0.0),
        ("shape", ["circle"], "two squares", None),
        ("n", [2, 3], "squares", 1.0),
        ("n", [3], "squares", 0.0),
        ("n", [3], "two squares", None),
        ("n", [3], "the word CAT in red on white", None),
        ("shape", ["circle"], "the word CAT in red on white", None),
        ("n", [3], "a red circle left of a green square on a blue background", None),
    ],
)
def test_preference_by_attribute(attribute, values, prompt, expected):
    image = world.render(world.parse("two green squares on a red background"), random.Random(0))
    assert score(shapes.preference(attribute, values), image, world.parse(prompt)) == expected


def test_preference_of_nothing_is_zero_not_one():
    spec = world.parse("objects on a black background")
    assert score(shapes.preference("color", shapes.COLORS), Image.new("RGB", (64, 64)), spec) == 0.0


@pytest.mark.parametrize(
    ("attribute", "values", "message"),
    [
        ("backgroud", ["red"], "Did you mean 'background'"),
        ("background", ["read"], "Did you mean 'red'"),
        ("shape", ["cirle"], "Did you mean 'circle'"),
        ("n", [4], "unknown value of 'n' 4"),
        ("color", [], "at least one"),
    ],
)
def test_preference_refuses_what_it_does_not_know(attribute, values, message):
    with pytest.raises(ValueError, match=message):
        shapes.preference(attribute, values)


def test_spec_survives_a_json_dataset(tmp_path):
    """A struct column comes back with every key, None included, so that rewards take it as it is."""
    images, prompts, said = [], [], []
    for kind in world.PROMPT_KINDS:
        for column, more in zip((images, prompts, said), painted(kind, 5), strict=False):
            column += more
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps({"prompt": p, "spec": s}) + "\n" for p, s in zip(prompts, said, strict=True)))
    rows = load_dataset("json", data_files=str(file), split="train", cache_dir=str(tmp_path / "cache"))
    assert list(rows["spec"]) == said
    assert shapes.shapes_exact(images, rows["prompt"], spec=rows["spec"]) == [1.0] * len(images)
