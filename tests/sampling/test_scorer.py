"""Scores of parts of a rollout, while the next part is sampled, and what fails in them."""

import contextlib
import math
import signal
import subprocess
import sys
import threading
from datetime import datetime

import pytest
import torch
from asking import ask
from datasets import Dataset
from PIL import Image
from services import ODD

from align.models.families import load_model
from align.sampling.held_out import check_columns
from align.sampling.noise import ImageKey
from align.sampling.rollout import SamplingPlan, rollout
from align.sampling.scorer import BackgroundScorer, Failures
from rewards import RewardError, load_rewards

ROWS = [{"prompt": f"p{n}", "level": n, "kind": "text" if n % 2 else "photo"} for n in range(6)]
IMAGES = [Image.new("RGB", (4, 4), (n, 0, 0)) for n in range(6)]
PARTS = [slice(0, 2), slice(2, 4), slice(4, 6)]


def red(images, prompts, level):
    assert prompts == [f"p{n}" for n in level]
    return [image.getpixel((0, 0))[0] for image in images]


def fails_on_three(images, prompts):
    if "p3" in prompts:
        raise OSError("no route to host")
    return [1.0] * len(images)


def table(rewards, parts=PARTS, allowed=0.0):
    with BackgroundScorer(load_rewards(rewards), ROWS) as scoring:
        for part in parts:
            scoring.add(part, IMAGES[part])
        return scoring.agreed_scores(allowed)


@pytest.mark.parametrize("parts", [PARTS, PARTS[::-1], [slice(0, 6)], [slice(4, 6), slice(0, 4)]])
def test_scores_stand_where_their_images_do(parts):
    assert table([red], parts) == [[0, 1, 2, 3, 4, 5]]


def test_without_rewards_there_are_no_scores():
    with BackgroundScorer([], ROWS) as scoring:
        scoring.add(PARTS[0], IMAGES[:2])
        (column,) = scoring.agreed_scores(0.0)
    assert len(column) == 6 and all(map(math.isnan, column))


def test_what_failed_is_unscored_as_a_whole_and_the_rest_counts(caplog):
    measured = {"use": "brightness:score", "weight": 0.0}
    first, second, third = table([red, fails_on_three, measured], allowed=0.4)
    assert [math.isnan(v) for v in first] == [math.isnan(v) for v in second] == [False, False, True, True, False, False]
    assert not any(map(math.isnan, third))  # only measured: it takes part in no sum
    assert "'fails_on_three' failed for 2 of 6 images: OSError: no route to host; they are left unscored" in caplog.text


def test_the_share_that_failed_is_of_the_images_of_all_processes():
    """Of the last process's images alone, a run on many GPUs would stop at a single failure that is allowed."""
    failures = Failures(allowed=0.25)
    failures.add(2, [("ocr", 1, "timed out")])
    failures.add(6, [("ocr", 1, "down")])
    failures.check()  # 2 of 8
    assert failures.describe("ocr") == "reward 'ocr' failed for 2 of 8 images: timed out"
    failures.add(2, [("ocr", 1, "down")])
    with pytest.raises(RewardError, match=r"'ocr' failed for 3 of 10 images: timed out \(max_failed_fraction=0.25\)"):
        failures.check()


def test_only_images_whose_sum_lacks_the_part_are_unscored():
    text_only = {"use": "tests_of_scoring:fails", "weight": {"by": "kind", "text": 1.0, "default": 0.0}}
    first, _ = table([red, text_only], [slice(0, 6)], allowed=1.0)
    assert [math.isnan(v) for v in first] == [False, True] * 3


@pytest.fixture(autouse=True)
def module_of_rewards(tmp_path, monkeypatch):
    (tmp_path / "tests_of_scoring.py").write_text("def fails(images, prompts):\n    raise OSError('down')\n")
    monkeypatch.syspath_prepend(tmp_path)


def test_more_failures_than_allowed_stop_the_run():
    with pytest.raises(
        RewardError, match=r"'fails_on_three' failed for 2 of 6 images: OSError.*max_failed_fraction=0.3"
    ):
        table([fails_on_three], allowed=0.3)


def test_a_broken_contract_in_any_part_stops_the_run():
    def short(images, prompts):
        return [0.0] * (1 if "p4" in prompts else 2)

    with pytest.raises(RewardError, match="'short' returned 1 scores for 2 images"):
        table([short], allowed=1.0)


def test_a_part_is_scored_while_the_next_is_sampled():
    """The reward of the first part waits until the second is there: one after the other it would wait for ever."""
    second_is_there = threading.Event()

    def waits(images, prompts):
        return [float(second_is_there.wait(60))] * len(images)

    model = load_model("tiny")
    rows = [{"prompt": "a circle"}] * 4
    with BackgroundScorer(load_rewards([waits]), rows) as scoring:

        def add(part, images):
            scoring.add(part, images)
            if part.start:
                second_is_there.set()

        plan = SamplingPlan(64, 64, num_inference_steps=2, batch_size=2)
        keys = [ImageKey(0, 0, n, 0) for n in range(4)]
        result = rollout(model, ask(["a circle"] * 4), keys, plan, on_images=add)
        assert scoring.agreed_scores(0.0) == [[1.0] * 4]
    assert len(result.images) == 4 and torch.isfinite(result.latents).all()


def test_an_error_while_sampling_ends_the_scoring():
    called = []

    def counts(images, prompts):
        called.append(len(images))
        return [0.0] * len(images)

    with pytest.raises(RuntimeError, match="sampling"), BackgroundScorer(load_rewards([counts]), ROWS) as scoring:
        raise RuntimeError("sampling")
    with pytest.raises(RuntimeError, match="has ended"):
        scoring.add(PARTS[0], IMAGES[:2])
    assert not called


def test_whatever_scoring_raises_becomes_the_runs_error_on_every_process():
    def late(images, prompts):
        return [0.0] * len(images)

    class Odd(dict):
        def __getitem__(self, key):
            if key == "prompt" and len(called) > 1:
                raise OSError("the data set's file is gone")
            called.append(key)
            return super().__getitem__(key)

    called: list[str] = []
    with BackgroundScorer(load_rewards([late]), [Odd(row) for row in ROWS]) as scoring:
        scoring.add(slice(0, 6), IMAGES)
        with pytest.raises(RewardError, match="scoring failed: OSError: the data set's file is gone"):
            scoring.agreed_scores(1.0)


def test_a_number_beyond_all_floats_is_no_score():
    def huge(images, prompts):
        return [10**400] * len(images)

    assert all(map(math.isnan, table([huge])[0]))


HANGS = """
import signal, sys, time
from PIL import Image
from align.sampling.scorer import BackgroundScorer
from rewards import load_rewards

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it

def hangs(images, prompts):
    print("called", flush=True)
    time.sleep(1000)

with BackgroundScorer(load_rewards([hangs]), [{"prompt": "p"}]) as scoring:
    scoring.add(slice(0, 1), [Image.new("RGB", (4, 4))])
    scoring.agreed_scores(0.0)
"""


def test_a_reward_that_hangs_does_not_outlive_an_interrupt():
    process = subprocess.Popen([sys.executable, "-c", HANGS], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "called\n"
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode != 0 and "KeyboardInterrupt" in said


def test_a_column_that_cannot_be_sent_is_said_before_anything_is_scored():
    data = Dataset.from_dict({"prompt": ["a"], "level": [datetime(2026, 1, 1)]})
    rewards = load_rewards([{"use": f"{ODD}:needing", "environment": {"python": sys.executable}}])
    with (
        contextlib.closing(rewards[0]),
        pytest.raises(ValueError, match=r"column 'level', row 0: datetime cannot be sent"),
    ):
        check_columns(rewards, [data.add_column("target", [1.0])])
