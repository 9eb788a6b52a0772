"""Test the tiny world: its sentences, its split, its pictures and its prompt files."""

import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from align.tiny import IMAGES, PROMPTS, world
from rewards import shapes


def samples(kind: str, split: str, number: int = 300) -> list[tuple[dict, dict]]:
    """Draw pairs of the prompt's spec and the picture's spec."""
    rng = random.Random(0)
    return [world.sample(rng, kind, split) for _ in range(number)]


@pytest.mark.parametrize("kind", world.PROMPT_KINDS)
def test_sentence_and_parse_are_inverse(kind):
    for prompt_spec, picture_spec in samples(kind, "train") + samples(kind, "held-out"):
        assert world.parse(world.sentence(prompt_spec)) == prompt_spec
        assert world.parse(world.sentence(picture_spec)) == picture_spec
        assert tuple(prompt_spec) == shapes.SPEC_KEYS


@pytest.mark.parametrize(
    "prompt",
    [
        "three red circles on a blue background",
        "a cross on a white background",
        "an object",
        "a red object",
        "crosses",
        "objects on a green background",
        "a red circle below a green square on a blue background",
        "the word CAT in red on white",
    ],
)
def test_known_sentences(prompt):
    assert world.sentence(world.parse(prompt)) == prompt


@pytest.mark.parametrize(
    "prompt",
    [
        "",
        " ",
        "a circles",
        "two circle",
        "four circles",
        "a pink circle",
        "an red object",
        "a photo of a dog",
        "the word cat in red on white",
    ],
)
def test_sentences_outside_the_world_are_refused(prompt):
    with pytest.raises(ValueError, match="is not a prompt of the tiny world"):
        world.parse(prompt)


def test_no_caption_of_the_training_split_is_held_out():
    for kind in world.PROMPT_KINDS:
        held_out = [prompt_spec for prompt_spec, _ in samples(kind, "held-out")]
        held_out_keys = {world.combination(prompt_spec) for prompt_spec in held_out}
        for prompt_spec, picture_spec in samples(kind, "train", 2000):
            assert world.combination(prompt_spec) not in held_out_keys
            assert world.split_of(prompt_spec) == world.split_of(picture_spec) == "train"
        assert all(world.split_of(prompt_spec) == "held-out" for prompt_spec in held_out)


def test_the_two_sentences_for_one_pair_are_in_the_same_split():
    opposite = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
    for spec, _ in samples("pair", "train", 50):
        swapped = spec | {
            "color": spec["color2"],
            "shape": spec["shape2"],
            "color2": spec["color"],
            "shape2": spec["shape"],
            "relation": opposite[spec["relation"]],
        }
        assert world.sentence(swapped) != world.sentence(spec)
        assert world.combination(swapped) == world.combination(spec)


def test_a_word_is_held_out_whatever_its_colours():
    spec = world.parse("the word CAT in red on white")
    assert world.split_of(spec) == world.split_of(spec | {"color": "blue", "background": "black"})


def test_open_prompts_leave_out_some_attributes_but_never_all():
    attributes = ("n", "color", "shape", "background")
    number_left_out = {sum(spec[key] is None for key in attributes) for spec, _ in samples("open", "train")}
    assert number_left_out == {1, 2, 3}


def test_an_attribute_that_is_left_out_is_painted_uniformly():
    pairs = samples("open", "train", 4000)
    backgrounds = [
        picture_spec["background"] for prompt_spec, picture_spec in pairs if prompt_spec["background"] is None
    ]
    shares = np.array([backgrounds.count(color) for color in shapes.COLORS]) / len(backgrounds)
    assert shares.min() > 0.08 and shares.max() < 0.17


def test_objects_never_have_the_colour_of_the_background():
    for kind in world.PROMPT_KINDS:
        for _, spec in samples(kind, "train"):
            assert spec["background"] not in (spec["color"], spec["color2"])


def test_a_picture_is_a_function_of_spec_and_seed():
    spec = world.parse("two red circles on a blue background")
    first, repeated, other_seed = (np.asarray(world.render(spec, random.Random(seed))) for seed in (0, 0, 1))
    assert first.shape == (shapes.SIZE, shapes.SIZE, 3)
    assert (first == repeated).all() and (first != other_seed).any()


def test_unknown_kind_is_refused():
    with pytest.raises(ValueError, match="unknown kind 'counts'"):
        world.sample(random.Random(0), "counts")


def test_command_writes_the_committed_prompts_and_images(tmp_path):
    command = [sys.executable, "-m", "align.tiny.world", "--output", str(tmp_path)]
    subprocess.run(command, check=True, cwd=Path(world.__file__).parents[2])
    written = {path.relative_to(tmp_path): path.read_text() for path in tmp_path.rglob("*.jsonl")}
    files = [*PROMPTS.rglob("*.jsonl"), *IMAGES.rglob("*.jsonl")]
    committed = {path.relative_to(PROMPTS.parent): path.read_text() for path in files}
    assert written.keys() == committed.keys() and len(committed) == 2 * len(world.PROMPT_SETS) + 2
    assert [name for name in written if written[name] != committed[name]] == []
    for path in IMAGES.rglob("*.png"):  # pixels, not bytes: versions of zlib compress differently
        copy = tmp_path / path.relative_to(PROMPTS.parent)
        with Image.open(path) as committed_image, Image.open(copy) as written_image:
            assert (np.asarray(committed_image) == np.asarray(written_image)).all(), path


def test_pictures_in_the_grounded_style_are_recognised_and_follow_their_prompts():
    rng = random.Random(0)
    specs = [world.sample(rng, kind)[1] for kind in ("count", "pair", "word") * 10]
    prompts = [world.sentence(spec) for spec in specs]
    for grounded in (False, True):
        pictures = [world.render(spec, random.Random(n), grounded=grounded) for n, spec in enumerate(specs)]
        assert shapes.grounded(pictures, prompts) == [float(grounded)] * len(specs)
        assert shapes.shapes_exact(pictures, prompts, spec=specs) == [1.0] * len(specs)


@pytest.mark.parametrize("name", world.PROMPT_SETS)
def test_prompt_sets(name):
    train, test = (list(world.prompt_rows(name, split)) for split in ("train", "held-out"))
    for rows, split in ((train, "train"), (test, "held-out")):
        assert len({row["prompt"] for row in rows}) == len(rows) >= 32
        assert all(world.parse(row["prompt"]) == row["spec"] and world.split_of(row["spec"]) == split for row in rows)
    unsaid = world.PROMPT_SETS[name][3]
    if unsaid:
        assert all(row["spec"][unsaid] is None for row in train + test)
    else:
        assert (len(train), len(test)) == world.PROMPT_SETS[name][:2]
