"""The tiny world: its sentences, its split and its prompt files."""

import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from align.tiny import IMAGES, PROMPTS, world
from rewards import shapes


def drawn(kind: str, split: str, number: int = 300) -> list[tuple[dict, dict]]:
    rng = random.Random(0)
    return [world.sample(rng, kind, split) for _ in range(number)]


@pytest.mark.parametrize("kind", world.PROMPT_KINDS)
def test_sentence_and_parse_are_inverse(kind):
    for said, painted in drawn(kind, "train") + drawn(kind, "held-out"):
        assert world.parse(world.sentence(said)) == said
        assert world.parse(world.sentence(painted)) == painted
        assert tuple(said) == shapes.SPEC_KEYS


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
    with pytest.raises(ValueError, match="no prompt of the tiny world"):
        world.parse(prompt)


def test_no_caption_of_the_training_split_is_held_out():
    for kind in world.PROMPT_KINDS:
        held_out = {world.combination(said) for said, _ in drawn(kind, "held-out")}
        for said, painted in drawn(kind, "train", 2000):
            assert world.combination(said) not in held_out
            assert world.split_of(said) == world.split_of(painted) == "train"
        assert all(world.split_of(said) == "held-out" for said, _ in drawn(kind, "held-out"))


def test_the_split_knows_that_two_sentences_say_one_pair():
    opposite = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
    for said, _ in drawn("pair", "train", 50):
        swapped = said | {
            "color": said["color2"],
            "shape": said["shape2"],
            "color2": said["color"],
            "shape2": said["shape"],
            "relation": opposite[said["relation"]],
        }
        assert world.sentence(swapped) != world.sentence(said)
        assert world.combination(swapped) == world.combination(said)


def test_a_word_is_held_out_whatever_its_colours():
    spec = world.parse("the word CAT in red on white")
    assert world.split_of(spec) == world.split_of(spec | {"color": "blue", "background": "black"})


def test_open_prompts_leave_out_something_and_never_all():
    attributes = ("n", "color", "shape", "background")
    left_out = {sum(said[key] is None for key in attributes) for said, _ in drawn("open", "train")}
    assert left_out == {1, 2, 3}


def test_what_is_unsaid_is_painted_uniformly():
    pairs = drawn("open", "train", 4000)
    backgrounds = [painted["background"] for said, painted in pairs if said["background"] is None]
    shares = np.array([backgrounds.count(color) for color in shapes.COLORS]) / len(backgrounds)
    assert shares.min() > 0.08 and shares.max() < 0.17


def test_objects_never_have_the_colour_of_the_background():
    for kind in world.PROMPT_KINDS:
        for _, painted in drawn(kind, "train"):
            assert painted["background"] not in (painted["color"], painted["color2"])


def test_a_picture_is_a_function_of_spec_and_seed():
    spec = world.parse("two red circles on a blue background")
    one, same, other = (np.asarray(world.render(spec, random.Random(seed))) for seed in (0, 0, 1))
    assert one.shape == (shapes.SIZE, shapes.SIZE, 3)
    assert (one == same).all() and (one != other).any()


def test_unknown_kind_is_refused():
    with pytest.raises(ValueError, match="unknown kind 'counts'"):
        world.sample(random.Random(0), "counts")


def test_committed_prompts_are_what_the_command_writes(tmp_path):
    command = [sys.executable, "-m", "align.tiny.world", "--output", str(tmp_path)]
    subprocess.run(command, check=True, cwd=Path(world.__file__).parents[2])
    written = {path.relative_to(tmp_path): path.read_text() for path in tmp_path.rglob("*.jsonl")}
    places = [*PROMPTS.rglob("*.jsonl"), *IMAGES.rglob("*.jsonl")]
    committed = {path.relative_to(PROMPTS.parent): path.read_text() for path in places}
    assert written.keys() == committed.keys() and len(committed) == 2 * len(world.PROMPT_SETS) + 2
    assert [name for name in written if written[name] != committed[name]] == []
    for path in IMAGES.rglob("*.png"):  # pixels, not bytes: another zlib packs them otherwise
        with Image.open(path) as one, Image.open(tmp_path / path.relative_to(PROMPTS.parent)) as other:
            assert (np.asarray(one) == np.asarray(other)).all(), path


def test_the_style_is_measured_and_the_prompt_still_followed_in_it():
    rng = random.Random(0)
    said = [world.sample(rng, kind)[1] for kind in ("count", "pair", "word") * 10]
    prompts = [world.sentence(spec) for spec in said]
    for grounded in (False, True):
        pictures = [world.render(spec, random.Random(n), grounded=grounded) for n, spec in enumerate(said)]
        assert shapes.grounded(pictures, prompts) == [float(grounded)] * len(said)
        assert shapes.shapes_exact(pictures, prompts, spec=said) == [1.0] * len(said)


@pytest.mark.parametrize("name", world.PROMPT_SETS)
def test_prompt_sets(name):
    train, test = (list(world.prompt_rows(name, split)) for split in ("train", "held-out"))
    for rows, split in ((train, "train"), (test, "held-out")):
        assert len({row["prompt"] for row in rows}) == len(rows) >= 32
        assert all(world.parse(row["prompt"]) == row["spec"] and world.split_of(row["spec"]) == split for row in rows)
    if name == "background":
        assert all(row["spec"]["background"] is None for row in train + test)
    else:
        assert (len(train), len(test)) == world.PROMPT_SETS[name][:2]
