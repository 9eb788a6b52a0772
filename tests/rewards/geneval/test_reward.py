"""GenEval: the rules on hand-made detections, and the two models through their real classes."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_vision import write_clip, write_detector
from transformers import AutoImageProcessor, AutoTokenizer, CLIPModel, Mask2FormerForUniversalSegmentation

from rewards import load_rewards, score
from rewards.geneval.models import ColorClassifier, Detector, crop
from rewards.geneval.reward import GenEval
from rewards.geneval.rules import COLORS, MAX_OBJECTS, Detection, grade, keep, parse_task, relations
from rewards.learned.running import Placement

CLASSES = ("person", "bicycle", "car", "dog", "clock", "mouse", "couch")


def seen_at(label, x, y, score=0.95, size=10, color=None):
    """A detection of a square with its middle at x, y. The mask's only value is where the test's colour is kept."""
    mask = np.full((1, 1), COLORS.index(color)) if color else None
    return Detection(label, score, (x - size / 2, y - size / 2, x + size / 2, y + size / 2), mask)


def colors_of(objects):
    return [COLORS[int(found.mask[0, 0])] for found in objects]


def graded(tag, include, detections, exclude=None):
    task = parse_task(0, tag, include, exclude, CLASSES)
    return grade(task, keep(detections, task.threshold), colors_of)


def wants(label, count=1, **more):
    return {"class": label, "count": count, **more}


# --- The six tags ---


def test_single_object():
    assert graded("single_object", [wants("dog")], [seen_at("dog", 5, 5)]) == [1]
    assert graded(
        "single_object", [wants("dog")], [seen_at("dog", 5, 5), seen_at("dog", 50, 5), seen_at("car", 9, 9)]
    ) == [1]
    assert graded("single_object", [wants("dog")], [seen_at("car", 5, 5)]) == [0]
    assert graded("single_object", [wants("dog")], []) == [0]


def test_a_score_must_be_above_the_threshold_and_not_on_it():
    assert graded("single_object", [wants("dog")], [seen_at("dog", 5, 5, score=0.3)]) == [0]
    assert graded("single_object", [wants("dog")], [seen_at("dog", 5, 5, score=0.301)]) == [1]
    assert graded("counting", [wants("dog")], [seen_at("dog", 5, 5, score=0.9)]) == [0]
    assert graded("counting", [wants("dog")], [seen_at("dog", 5, 5, score=0.901)]) == [1]


def test_two_objects():
    include = [wants("dog"), wants("car")]
    assert graded("two_object", include, [seen_at("dog", 5, 5), seen_at("car", 50, 5)]) == [1, 1]
    assert graded("two_object", include, [seen_at("dog", 5, 5), seen_at("dog", 50, 5)]) == [1, 0]


def test_counting_wants_so_many_and_no_more():
    include, exclude = [wants("clock", 2)], [wants("clock", 3)]
    clocks = [seen_at("clock", 20 * i, 5) for i in range(4)]
    grades = [graded("counting", include, clocks[:n], exclude) for n in range(5)]
    assert grades == [[0, 1], [0.5, 1], [1, 1], [1, 2 / 3], [1, 0.5]]
    faint = [*clocks[:2], seen_at("clock", 90, 5, score=0.5)]
    assert graded("counting", include, faint, exclude) == [1, 1]  # one that is seen only faintly is not counted


def test_a_class_that_must_not_be_there():
    assert graded("single_object", [wants("dog")], [seen_at("dog", 5, 5), seen_at("car", 9, 9)], [wants("car")]) == [
        1,
        0,
    ]


def test_at_most_so_many_objects_of_one_class_are_kept_best_first():
    assert MAX_OBJECTS == 16  # evaluate_images.py, MAX_OBJECTS
    many = [seen_at("clock", i, 5, score=0.91 + i / 1000) for i in range(MAX_OBJECTS + 4)]
    kept = keep([*many, seen_at("dog", 5, 5, score=0.2)], 0.9)
    assert list(kept) == ["clock"] and len(kept["clock"]) == MAX_OBJECTS
    assert [found.box[0] for found in kept["clock"]][:2] == [MAX_OBJECTS + 3 - 5, MAX_OBJECTS + 2 - 5]


def test_colors():
    include = [wants("car", color="red")]
    assert graded("colors", include, [seen_at("car", 5, 5, color="red")]) == [1, 1]
    assert graded("colors", include, [seen_at("car", 5, 5, color="blue")]) == [1, 0]
    assert graded("colors", include, []) == [0, 0]
    # Only the most certain object is looked at, whatever colour another has.
    two = [seen_at("car", 5, 5, score=0.6, color="red"), seen_at("car", 50, 5, score=0.8, color="blue")]
    assert graded("colors", include, two) == [1, 0]
    assert graded("colors", [wants("car", 2, color="red")], two) == [1, 0.5]
    assert graded("colors", [wants("car", 2, color="red")], two[:1]) == [0.5, 0.5]


def test_color_attr_binds_each_color_to_its_object():
    include = [wants("car", color="red"), wants("dog", color="brown")]
    right = [seen_at("car", 5, 5, color="red"), seen_at("dog", 50, 5, color="brown")]
    swapped = [seen_at("car", 5, 5, color="brown"), seen_at("dog", 50, 5, color="red")]
    assert graded("color_attr", include, right) == [1, 1, 1, 1]
    assert graded("color_attr", include, swapped) == [1, 0, 1, 0]


def test_position():
    include = [wants("dog"), wants("car", position=["left of", 0])]
    dog = seen_at("dog", 50, 50)
    assert graded("position", include, [dog, seen_at("car", 10, 50)]) == [1, 1, 1]
    assert graded("position", include, [dog, seen_at("car", 90, 50)]) == [1, 1, 0]
    assert graded("position", include, [seen_at("car", 10, 50)]) == [0, 1, 0]  # nothing to be left of
    assert graded("position", include, [dog]) == [1, 0, 0]
    # The most certain car is on the wrong side; the other does not count.
    cars = [seen_at("car", 10, 50, score=0.5), seen_at("car", 90, 50, score=0.9)]
    assert graded("position", include, [dog, *cars]) == [1, 1, 0]
    # Of two wanted cars one is placed well.
    assert graded("position", [wants("dog"), wants("car", 2, position=["left of", 0])], [dog, *cars]) == [1, 1, 0.5]


@pytest.mark.parametrize(("distance", "grade"), [(3.9, 0), (4.1, 1), (7.9, 1)])
def test_beside_is_a_tenth_of_both_sizes_apart_as_in_geneval(distance, grade):
    """evaluate_images.py, POSITION_THRESHOLD 0.1: with another one scores compare with no published ones."""
    include = [wants("dog"), wants("car", position=["left of", 0])]
    # Both are 10 wide: what is left of the distance d, d - 0.1 x 20, must be more than half of it.
    objects = [seen_at("dog", 50, 50), seen_at("car", 50 - distance, 50)]
    assert graded("position", include, objects) == [1, 1, grade]


def test_a_place_is_graded_only_beside_an_object_that_is_as_wanted():
    include = [wants("dog", color="brown"), wants("car", position=["left of", 0])]
    objects = [seen_at("dog", 50, 50, color="white"), seen_at("car", 10, 50)]
    assert graded("position", include, objects) == [1, 0, 1, 0]


@pytest.mark.parametrize(
    ("x", "y", "expected"),
    [
        (0, 50, {"left of"}),
        (100, 50, {"right of"}),
        (50, 0, {"above"}),
        (50, 100, {"below"}),
        (0, 0, {"left of", "above"}),
        (100, 100, {"right of", "below"}),
        (50, 50, set()),  # at the same place
        (52, 50, set()),  # nearer than a tenth of both sizes
        (48, 49, set()),
        (0, 24, {"left of"}),  # as far down as is not half of the whole distance
        (10, 50, {"left of"}),
    ],
)
def test_relations_of_squares_of_ten_pixels_to_one_at_50_50(x, y, expected):
    assert relations(seen_at("dog", x, y), seen_at("car", 50, 50)) == expected


def test_relations_take_off_a_tenth_of_the_sizes():
    # Middles 30 apart, sizes 100 and 100: 30 - 20 = 10, less than half of 30; with sizes 50: 30 - 10 = 20, more.
    assert relations(seen_at("dog", 0, 0, size=100), seen_at("car", 30, 0, size=100)) == set()
    assert relations(seen_at("dog", 0, 0, size=50), seen_at("car", 30, 0, size=50)) == {"left of"}


# --- Metadata ---


def test_metadata_may_be_json_or_a_table_with_none_and_any_name_of_a_class():
    rows = [
        [wants("dog"), wants("car", position=["above", 0])],
        '[{"class": "dog", "count": 1}, {"class": "car", "count": 1, "position": ["above", 0]}]',
        [wants("dog", color=None, position=None), wants("car", color=None, position=["above", "0"])],
    ]
    assert len({parse_task(0, "position", row, None, CLASSES) for row in rows}) == 1
    for name, label in (("computer mouse", "mouse"), ("sofa", "couch"), ("person", "person")):
        assert parse_task(0, "single_object", [wants(name)], [], CLASSES).include[0].label == label


@pytest.mark.parametrize(
    ("tag", "include", "exclude", "found"),
    [
        ("color", [wants("dog")], None, "row 7: unknown tag 'color'. Did you mean 'colors'"),
        ("colors", [wants("dogg")], None, "row 7: unknown class 'dogg'. Did you mean 'dog'"),
        ("colors", [wants("dog", color="grey")], None, "row 7: unknown color 'grey'. Did you mean 'green'"),
        ("colors", [wants("dog", color="zzz")], None, "There are: black, blue"),
        ("position", [wants("dog", position=["left of", 0])], None, "index of an earlier entry"),
        ("position", [wants("dog"), wants("car", position="left of")], None, "index of an earlier entry"),
        (
            "position",
            [wants("dog"), wants("car", position=["left", 0])],
            None,
            "relation 'left'. Did you mean 'left of'",
        ),
        ("counting", [wants("dog", 0)], None, "count of 'dog' must be 1 or more, found 0"),
        ("counting", [wants("dog", "2")], None, "must be 1 or more, found '2'"),
        ("counting", [{"class": "dog"}], None, "not a mapping with class and count"),
        ("counting", ["dog"], None, "include contains 'dog', not a mapping"),
        ("counting", [wants("dog")], [wants("cat")], "unknown class 'cat'"),
        ("counting", "[{", None, "include is not JSON"),
        ("counting", [], None, "include is empty"),
        ("counting", None, None, "include is empty"),
    ],
)
def test_wrong_metadata_is_refused_with_its_row(tag, include, exclude, found):
    with pytest.raises(ValueError, match=found):
        parse_task(7, tag, include, exclude, CLASSES)


# --- The models ---


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("geneval")
    return {
        "unsure": write_detector(root / "unsure"),
        "person": write_detector(root / "person", sure_of="person"),
        "clip": write_clip(root / "clip"),
    }


def picture(width=96, height=64, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def detector(folders):
    return Detector(str(folders["person"]), Placement("cpu", batch_size=2))


def test_detections_are_those_of_transformers_own_postprocessing(folders, detector):
    image = picture(384, 384)
    model = Mask2FormerForUniversalSegmentation.from_pretrained(folders["person"]).eval()
    processor = AutoImageProcessor.from_pretrained(folders["person"])
    with torch.inference_mode():
        output = model(**processor(images=[image], return_tensors="pt"))
    theirs = processor.post_process_instance_segmentation(output, threshold=0.3, return_binary_maps=True)[0]
    ours = detector([image], 0.3)[0]
    assert len(ours) == len(theirs["segments_info"]) > 0
    order = sorted(range(len(ours)), key=lambda i: -theirs["segments_info"][i]["score"])
    for found, index in zip(ours, order, strict=True):
        # They enlarge masks at once, we by way of the size that the model saw: the outlines differ by a little.
        assert found.score == pytest.approx(theirs["segments_info"][index]["score"], abs=0.01)
        theirs_mask = theirs["segmentation"][index].numpy() > 0
        assert (found.mask & theirs_mask).sum() / (found.mask | theirs_mask).sum() > 0.9


def test_a_box_is_that_of_its_mask_in_the_images_own_pixels(detector):
    found = detector([picture(96, 64)], 0.3)[0]
    assert found and {d.label for d in found} == {"person"}
    assert [d.score for d in found] == sorted((d.score for d in found), reverse=True)
    for one in found:
        assert one.mask.shape == (64, 96) and one.mask.dtype == bool
        left, top, right, bottom = map(int, one.box)
        assert one.mask[top:bottom, left:right].sum() == one.mask.sum()
        assert one.mask[top].any() and one.mask[bottom - 1].any() and one.mask[:, left].any()


def test_a_batch_detects_what_each_image_alone_does(folders):
    # Of three sizes, in turn; a processor that keeps proportions would pad the smaller ones of a batch.
    detector = Detector(str(folders["person"]), Placement("cpu", batch_size=2))
    detector.processor = AutoImageProcessor.from_pretrained(
        folders["person"], size={"shortest_edge": 64, "longest_edge": 128}
    )
    images = [picture(*size, seed) for seed, size in enumerate([(96, 64), (64, 200), (1, 1)] * 3)]
    for image, together in zip(images, detector(images, 0.3), strict=True):
        alone = detector([image], 0.3)[0]
        assert [d.score for d in together] == pytest.approx([d.score for d in alone], abs=1e-5)
        assert [d.box for d in together] == [d.box for d in alone]


def test_nothing_is_detected_by_one_that_is_sure_of_nothing_nor_above_one(folders, detector):
    unsure = Detector(str(folders["unsure"]), Placement("cpu", batch_size=2))
    assert unsure([picture()], 0.9) == [[]] and detector([picture()], 1.0) == [[]] and detector([], 0.3) == []
    assert unsure.labels == ["person", "bicycle", "couch"]  # sofa, under the name that GenEval gives it


def test_what_is_not_of_an_object_is_grey_when_it_is_cut_out():
    mask = np.zeros((6, 8), dtype=bool)
    mask[2:4, 3:6] = True
    mask[2, 3] = False
    cut = crop(Image.new("RGB", (8, 6), "red"), Detection("dog", 1.0, (3, 2, 6, 4), mask))
    assert cut.size == (3, 2)
    assert cut.getpixel((0, 0)) == (153, 153, 153) and cut.getpixel((1, 0)) == (255, 0, 0)
    assert crop(Image.new("RGB", (8, 6), "red"), Detection("dog", 1.0, (3, 2, 6, 4))).getpixel((0, 0)) == (255, 0, 0)


def test_colors_are_the_nearest_in_clips_space_one_text_at_a_time(folders):
    classifier = ColorClassifier(str(folders["clip"]), Placement("cpu", batch_size=2))
    image = picture(40, 40)
    objects = [Detection("dog", 0.9, (x, 0.0, x + 12, 20.0)) for x in (0.0, 9.0, 18.0, 27.0, 20.0)]
    found = classifier(image, objects)
    model, tokenizer = CLIPModel.from_pretrained(folders["clip"]), AutoTokenizer.from_pretrained(folders["clip"])
    processor = AutoImageProcessor.from_pretrained(folders["clip"])

    def text(words):
        out = model.get_text_features(**tokenizer([words], return_tensors="pt")).pooler_output[0]
        return out / out.norm()

    with torch.inference_mode():
        colors = []
        for color in COLORS:
            forms = (f"a photo of a {color} dog", f"a photo of a {color}-colored dog", f"a photo of a {color} object")
            mean = sum(text(form) for form in forms) / 3
            colors.append(mean / mean.norm())
        for one, name in zip(objects, found, strict=True):
            pixels = processor(images=[crop(image, one)], return_tensors="pt")["pixel_values"]
            features = model.get_image_features(pixel_values=pixels).pooler_output[0]
            fits = [float(features @ color) for color in colors]
            assert fits[COLORS.index(name)] == pytest.approx(max(fits), abs=1e-5)
    assert classifier(image, []) == []


# --- The reward ---


def load(folders, detector="person", **args):
    paths = {"detector": str(folders[detector]), "clip": str(folders["clip"])}
    return load_rewards([{"use": "geneval", "args": paths | args}])


def test_the_reward_scores_columns_of_metadata(folders):
    rewards = load(folders)
    assert rewards[0].required == ("tag", "include") and rewards[0].columns == ("tag", "include", "exclude")
    images = [picture(seed=i) for i in range(4)]
    columns = {
        "tag": ["single_object", "single_object", "two_object", "counting"],
        "include": [
            [wants("person")],
            [wants("bicycle")],
            json.dumps([wants("person"), wants("sofa")]),
            [wants("person")],
        ],
    }
    # Every query sees a person with a score between the two thresholds: none where one is counted.
    scores, failures = score(rewards, images, [""] * 4, columns)
    assert not failures and scores == [[1.0, 0.0, 0.0, 0.0]]
    soft, _ = score(load(folders, mode="soft"), images, [""] * 4, columns)
    assert soft == [[1.0, 0.0, 0.5, 0.0]]
    excluded = columns | {"exclude": [[wants("person", 2)], None, [], None]}
    assert score(rewards, images, [""] * 4, excluded)[0] == [[0.0, 0.0, 0.0, 0.0]]


def test_colors_are_asked_of_clip_and_are_the_same_with_offloading_and_any_batch(folders):
    images = [picture(seed=i) for i in range(3)]
    columns = {"tag": ["colors"] * 3}
    found = []
    for args in ({"batch_size": 1}, {"batch_size": 3, "offload": True}):
        (reward,) = load(folders, mode="soft", **args)
        by_color = [
            reward.function(images, [""] * 3, include=[[wants("person", color=c)]] * 3, **columns) for c in COLORS
        ]
        found.append(by_color)
        # Each image's person has one of the ten colours.
        assert [sum(values) for values in zip(*by_color, strict=True)] == pytest.approx([10 * 0.5 + 0.5] * 3)
    assert found[0] == found[1]


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_images_of_any_size_and_mode_are_scored(folders, dtype):
    (reward,) = load(folders, dtype=dtype)
    images = [
        picture().convert("L"),
        picture().convert("RGBA"),
        Image.new("RGB", (1, 1)),
        Image.new("RGB", (8000, 8000)),
    ]
    scores = reward.function(images, [""] * 4, tag=["colors"] * 4, include=[[wants("person", color="red")]] * 4)
    assert len(scores) == 4 and set(scores) <= {0.0, 1.0}
    assert reward.function([], [], tag=[], include=[]) == []


@pytest.mark.parametrize(
    ("args", "found"),
    [
        ({"mode": "hard"}, "mode must be one of strict, soft, found 'hard'"),
        ({"dtype": "float8"}, "unknown dtype 'float8'. Did you mean 'float32'"),
        ({"batch_size": 0}, "batch_size must be a positive integer, found 0"),
    ],
)
def test_wrong_arguments_are_refused_before_anything_is_loaded(args, found):
    with pytest.raises(ValueError, match=found):
        load_rewards([{"use": "geneval", "args": args}])


def test_a_missing_checkpoint_says_what_to_get(folders, tmp_path):
    with pytest.raises(OSError, match=r"hf download nobody/nothing.*detector"):
        GenEval(detector="nobody/nothing", clip=str(folders["clip"]))
    with pytest.raises(OSError, match=r"reward 'geneval': clip .* has no config"):
        GenEval(detector=str(folders["person"]), clip=str(tmp_path))


@pytest.mark.parametrize(
    ("part", "weight"), [("person", "class_predictor.weight"), ("clip", "visual_projection.weight")]
)
def test_a_checkpoint_that_lacks_a_weight_is_refused(folders, tmp_path, part, weight):
    shutil.copytree(folders[part], tmp_path / part)
    state = load_file(tmp_path / part / "model.safetensors")
    del state[weight]
    save_file(state, tmp_path / part / "model.safetensors", metadata={"format": "pt"})
    lacking = {name: str(folders[name]) for name in ("person", "clip")} | {part: str(tmp_path / part)}
    with pytest.raises(ValueError, match=rf"is not a checkpoint of the reward 'geneval'; missing: {weight}"):
        GenEval(detector=lacking["person"], clip=lacking["clip"])


def test_a_bad_row_fails_the_call_with_its_number(folders):
    scores, failures = score(load(folders), [picture()], [""], {"tag": ["colors"], "include": [[wants("dog")]]})
    assert (
        np.isnan(scores[0][0])
        and "row 0: unknown class 'dog'. There are: bicycle, couch, person." in failures["geneval"]
    )
