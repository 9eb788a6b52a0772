"""What an evaluation reports: means over prompts, their standard errors, and sums that compare like with like."""

import math

import pytest
import torch
from brightness import score as brightness
from datasets import Dataset

from align.models.families import load_model
from align.sampling.held_out import _metrics, _per_prompt, diversity, evaluate_prompts
from align.sampling.rollout import SamplingPlan
from rewards import Reward, load_rewards

NAN = math.nan


def rewards(*weights: float) -> list[Reward]:
    return [Reward(f"r{n}", lambda images, prompts: [], weight, (), ()) for n, weight in enumerate(weights)]


def metrics(table: list[list[float]], *weights: float, samples: int = 1) -> dict[str, float]:
    scores, shares = torch.tensor(table, dtype=torch.float64), torch.tensor([weights] * len(table))
    return _metrics(_per_prompt(scores, rewards(*weights), samples, shares), "eval")


def test_mean_and_standard_error_are_over_prompts():
    found = metrics([[0.0], [1.0], [1.0], [1.0]], 1.0, samples=2)  # two prompts: means 0.5 and 1
    assert found["eval_num_prompts"] == 2
    assert found["eval_r0"] == pytest.approx(0.75)
    assert found["eval_r0_se"] == pytest.approx(math.sqrt(0.125) / math.sqrt(2))  # sample std of (0.5, 1) over sqrt 2
    assert found["eval_reward"] == found["eval_r0"]


def test_a_measured_reward_does_not_enter_the_sum():
    found = metrics([[1.0, 5.0], [0.0, 7.0]], 2.0, 0.0)
    assert found["eval_reward"] == pytest.approx(1.0) and found["eval_r1"] == pytest.approx(6.0)


def test_an_image_that_lacks_a_part_of_its_sum_is_left_out_of_the_sum():
    found = metrics([[1.0, 1.0], [1.0, NAN]], 1.0, 1.0, samples=2)
    assert found["eval_reward"] == pytest.approx(2.0)
    assert found["eval_r1"] == pytest.approx(1.0)


def test_a_reward_that_does_not_apply_to_a_prompt_is_left_out_for_that_prompt_only():
    found = metrics([[1.0, 1.0], [1.0, NAN]], 1.0, 1.0, samples=1)
    assert found["eval_reward"] == pytest.approx(1.5)


def test_a_reward_that_scored_nothing_is_not_reported():
    assert "eval_r1" not in metrics([[1.0, NAN], [0.0, NAN]], 1.0, 0.0)


def test_diversity_is_the_root_mean_square_difference_of_pairs():
    flat = torch.zeros(2, 3, 2, 2)
    flat[0, 1] = 3.0  # pairs differ by 3, 0 and 3 in every element
    found = diversity(flat)
    assert found.tolist() == pytest.approx([2.0, 0.0])
    noise = torch.randn(1, 40, 64, 16, generator=torch.Generator().manual_seed(0))
    assert diversity(noise).item() == pytest.approx(math.sqrt(2), rel=0.01)


@pytest.fixture(scope="module")
def evaluated():
    """Three rows of one prompt, two images each, of which the first two rows' are kept."""
    plan = SamplingPlan(64, 64, num_inference_steps=3, sde_steps=(0,), noise_level=0.7, batch_size=4)
    data, scored = Dataset.from_dict({"prompt": ["a circle"] * 3}), load_rewards([brightness])
    options = {"samples": 2, "prefix": "eval", "keep_images_of": 2}
    model = load_model("tiny")
    return [evaluate_prompts(model, scored, data, plan, seed=seed, **options) for seed in (1, 1, 2)]


def test_every_image_of_an_evaluation_has_noise_of_its_own_that_only_the_seed_changes(evaluated):
    """With one noise for all prompts their scores move together: the standard errors would be far too small."""
    first, again, other = evaluated
    pictures = [image.tobytes() for _, images in first.images for image in images]
    assert len(set(pictures)) == 4 and len({row["score"] for row in first.rows}) == 3
    assert first.rows == again.rows and first.metrics == again.metrics
    assert not {row["score"] for row in first.rows} & {row["score"] for row in other.rows}


def test_the_grid_holds_as_many_prompts_as_are_asked_for(evaluated):
    assert [(prompt, len(images)) for prompt, images in evaluated[0].images] == [("a circle", 2)] * 2


def test_an_evaluation_samples_through_the_launchers_wrapper():
    """DeepSpeed gathers the weights that it has divided there; past it an evaluation would see pieces of them."""
    model, calls = load_model("tiny"), []

    class Wrapper(torch.nn.Module):
        def forward(self, *args, **options):
            calls.append(args)
            return model.transformer(*args, **options)

    plan, data = (
        SamplingPlan(64, 64, num_inference_steps=2, batch_size=4),
        Dataset.from_dict({"prompt": ["a circle"] * 3}),
    )
    options = {"seed": 0, "samples": 1, "prefix": "eval", "transformer": Wrapper()}
    evaluate_prompts(model, load_rewards([brightness]), data, plan, **options)
    assert len(calls) == 2
