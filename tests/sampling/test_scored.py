"""Sample and score, and the one rule for how many images a reward may fail on."""

import threading
import time
from dataclasses import replace

import pytest
import torch
from brightness import score as brightness

from align.models.families import load_model
from align.sampling.noise import ImageKey
from align.sampling.rollout import SamplingPlan
from align.sampling.scored import requests_of, sample_and_score
from align.sampling.scorer import Failures
from rewards import RewardError, load_rewards

ROWS = [{"prompt": "a circle", "level": n} for n in range(4)]
KEYS = [ImageKey(0, 0, n, 0) for n in range(4)]
PLAN = SamplingPlan(64, 64, num_inference_steps=2, batch_size=3)


def test_every_image_has_the_score_of_its_own_row(tiny):
    def bright_and_level(images, prompts, level):
        return [b + 10 * n for b, n in zip(brightness(images, prompts), level, strict=True)]

    samples = sample_and_score(tiny, load_rewards([bright_and_level]), ROWS, KEYS, PLAN)
    (scores,) = samples.agreed_scores(0.0)
    images = samples.rollout.images
    assert scores == pytest.approx([b + 10 * n for n, b in enumerate(brightness(images, ROWS))])
    assert [request.prompt for request in requests_of(ROWS)] == ["a circle"] * 4


def test_an_error_while_sampling_ends_the_scorer_and_its_thread(monkeypatch):
    model, called = load_model("tiny"), []

    def broken(*args):
        if called:
            raise RuntimeError("no memory")
        called.append(args)
        return decode(*args)

    decode = model.decode_latents
    monkeypatch.setattr(model, "decode_latents", broken)
    scored = []

    def counts(images, prompts):
        scored.append(len(images))
        return brightness(images, prompts)

    before = threading.active_count()
    with pytest.raises(RuntimeError, match="no memory"):
        sample_and_score(model, load_rewards([counts]), ROWS, KEYS, replace(PLAN, batch_size=1))
    for thread in [t for t in threading.enumerate() if t.name == "scoring"]:
        thread.join(60)
    assert threading.active_count() <= before and len(scored) <= 1


def test_a_scorer_calls_no_reward_before_the_one_that_comes_first_has_ended(tiny):
    running, most = [], []

    def slow(images, prompts):
        running.append(1)
        most.append(len(running))
        time.sleep(0.2)
        running.pop()
        return [0.0] * len(images)

    rewards = load_rewards([slow])
    first = sample_and_score(tiny, rewards, ROWS, KEYS, PLAN)
    second = sample_and_score(tiny, rewards, ROWS, KEYS, PLAN, after=first.scorer)
    assert first.agreed_scores(0.0) == second.agreed_scores(0.0) == [[0.0] * 4]
    assert max(most) == 1 and len(most) == 4


def test_the_share_of_failures_counts_all_images_so_far():
    failures = Failures(0.25)
    failures.add(3, [])
    failures.check()
    failures.add(1, [("slow", 1, "timed out")])
    failures.check()  # one of four
    failures.add(0, [("slow", 1, "gone")])
    with pytest.raises(RewardError, match=r"'slow' failed for 2 of 4 images: timed out \(max_failed_fraction=0.25\)"):
        failures.check()


def test_scores_of_a_process_are_there_without_the_others(tiny):
    def refuses(images, prompts):
        raise OSError("down")

    samples = sample_and_score(tiny, load_rewards([refuses]), ROWS[:2], KEYS[:2], PLAN)
    table, failed = samples.local_scores()
    assert torch.tensor(table).isnan().all() and failed == [("refuses", 2, "OSError: down")]
