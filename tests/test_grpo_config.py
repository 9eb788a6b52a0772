"""Settings of GRPO: the window of stochastic steps, the sums of batch sizes, and what is refused."""

from collections import Counter
from itertools import product
from pathlib import Path

import pytest
import torch

from align.grpo import GRPOConfig

torch.set_num_threads(1)


def config(**overrides) -> GRPOConfig:
    settings = {
        "output_dir": "unused",
        "use_cpu": True,
        "num_inference_steps": 10,
        "num_generations": 4,
        "generation_batch_size": 8,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 1,
        "seed": 5,
    }
    return GRPOConfig(**(settings | overrides))


def starts(settings: GRPOConfig, rollouts: int = 300) -> list[int]:
    return [settings.window.steps(index)[0] for index in range(rollouts)]


class SecondProcess(GRPOConfig):
    """The same settings, as the second of two processes sees them."""

    @property
    def process_index(self) -> int:
        return 1

    @property
    def world_size(self) -> int:
        return 2


# --- The window ---


def test_by_default_every_step_is_stochastic():
    assert config().window.steps(0) == tuple(range(10)) == config().window.steps(7)


def test_a_window_without_a_range_starts_at_the_first_step():
    settings = config(sde_window_size=3)
    assert {settings.window.steps(update) for update in range(20)} == {(0, 1, 2)}


@pytest.mark.parametrize(("size", "first", "end"), [(1, 0, 10), (2, 0, 5), (3, 4, 10), (2, 3, 5), (5, 0, 9)])
def test_the_window_is_drawn_from_all_its_range_and_nothing_else(size, first, end):
    settings = config(sde_window_size=size, sde_window_range=[first, end])
    windows = [settings.window.steps(update) for update in range(300)]
    assert all(window == tuple(range(window[0], window[0] + size)) for window in windows)
    assert {window[0] for window in windows} == set(range(first, end - size + 1))


def test_every_start_is_as_likely():
    counts = Counter(starts(config(sde_window_size=2, sde_window_range=[0, 5]), rollouts=2000))
    # 500 expected for each of 4 starts, standard deviation sqrt(2000 * 3 / 16) = 19.4.
    assert all(abs(count - 500) < 4 * 19.4 for count in counts.values()), counts


def test_the_draw_is_a_function_of_seed_and_update_alone():
    window = {"sde_window_size": 2, "sde_window_range": [0, 9]}
    drawn = starts(config(**window))
    torch.manual_seed(123)  # the state of the process's own generator is another one
    before = torch.get_rng_state()
    others = {"learning_rate": 0.1, "generation_batch_size": 16, "rollout_batch_size": 3, "height": 64, "data_seed": 4}
    assert starts(config(**window, **others)) == drawn
    assert torch.equal(torch.get_rng_state(), before)
    assert [config(**window).window.steps(update)[0] for update in reversed(range(300))] == drawn[::-1]


def test_a_sliding_window_moves_by_its_stride_and_begins_again():
    window = {"sde_window_size": 2, "sde_window_range": [1, 7], "sde_window_schedule": "sliding"}
    assert (
        starts(config(**window, sde_window_interval=3), rollouts=18)
        == [1] * 3 + [2] * 3 + [3] * 3 + [4] * 3 + [5] * 3 + [1] * 3
    )
    strides = starts(config(**window, sde_window_interval=1, sde_window_stride=2), rollouts=6)
    assert strides == [1, 3, 5, 2, 4, 1]
    assert set(starts(config(**{**window, "sde_window_range": None}))) == {0}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"sde_window_schedule": "slide"}, "sde_window_schedule must be one of random, sliding, found 'slide'"),
        ({"sde_window_interval": 0}, "sde_window_interval"),
        ({"sde_window_stride": 0}, "sde_window_stride"),
        ({"num_prefixes": 0}, r"num_prefixes 0 must lie within \[1, 4\], which is num_generations"),
        ({"num_prefixes": 5}, r"num_prefixes 5 must lie within \[1, 4\]"),
        ({"num_trained": 1}, r"num_trained 1 must lie within \[2, 4\]"),
        ({"num_trained": 5}, r"num_trained 5 must lie within \[2, 4\]"),
    ],
)
def test_windows_prefixes_and_trained_images_that_make_no_sense_are_refused(overrides, message):
    with pytest.raises(ValueError, match=message):
        config(**overrides)


def test_a_group_with_shared_prefixes_is_not_cut_in_two():
    settings = config(num_prefixes=1, num_generations=4, generation_batch_size=8, per_device_train_batch_size=1)
    settings.check_world(2)
    with pytest.raises(ValueError, match=r"num_prefixes .* 2 images on each of 4 processes .* num_generations 4"):
        settings.check_world(4)
    for apart in (None, 4):  # images that have nothing in common may be
        config(
            num_prefixes=apart, num_generations=4, generation_batch_size=8, per_device_train_batch_size=1
        ).check_world(4)


def test_another_seed_draws_other_windows():
    window = {"sde_window_size": 2, "sde_window_range": [0, 9]}
    same = sum(a == b for a, b in zip(starts(config(**window)), starts(config(**window, seed=6)), strict=True))
    assert same < 100  # 300 / 8 = 37.5 by chance


def test_all_processes_draw_the_same_window():
    settings = {"output_dir": "unused", "use_cpu": True, "sde_window_size": 2, "sde_window_range": [0, 9]}
    second = SecondProcess(**settings)
    assert (second.process_index, second.world_size) == (1, 2)
    assert starts(second) == starts(GRPOConfig(**settings))


def test_cps_leaves_out_the_last_step_which_has_no_noise():
    assert config(sde_type="cps").window.steps(0) == tuple(range(9))
    windowed = config(sde_type="cps", sde_window_size=2, sde_window_range=[6, 9])
    assert set(starts(windowed)) == {6, 7}
    with pytest.raises(ValueError, match=r"sde_window_range \[6, 10\].*within \[0, 9\].*last of cps having no noise"):
        config(sde_type="cps", sde_window_size=2, sde_window_range=[6, 10])
    assert max(starts(config(sde_window_size=2, sde_window_range=[6, 10]))) == 8


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"sde_window_size": 0}, r"sde_window_size 0 must lie within \[1, 10\]: 10 steps$"),
        ({"sde_window_size": -1}, r"sde_window_size -1 must lie within \[1, 10\]"),
        ({"sde_window_size": 11}, r"sde_window_size 11 must lie within \[1, 10\]"),
        ({"sde_window_size": 10, "sde_type": "cps"}, r"sde_window_size 10 must lie within \[1, 9\].*last of cps"),
        ({"sde_window_size": 3, "sde_window_range": [0, 2]}, "sde_window_size 3 must be between 1 and the 2 steps"),
        ({"sde_window_size": 2, "sde_window_range": [0, 11]}, r"sde_window_range \[0, 11\] must lie within \[0, 10\]"),
        ({"sde_window_size": 2, "sde_window_range": [-1, 4]}, r"sde_window_range \[-1, 4\] must lie within"),
        ({"sde_window_size": 2, "sde_window_range": [4, 4]}, r"sde_window_range \[4, 4\] must lie within"),
        ({"sde_window_size": 2, "sde_window_range": [5, 3]}, r"sde_window_range \[5, 3\] must lie within"),
        ({"sde_window_size": 2, "sde_window_range": [3]}, r"sde_window_range must be two numbers.*found \[3\]"),
        ({"sde_window_size": 2, "sde_window_range": [1, 2, 3]}, "sde_window_range must be two numbers"),
    ],
)
def test_a_window_that_does_not_fit_is_refused(overrides, message):
    with pytest.raises(ValueError, match=message):
        config(**overrides)


# --- Values ---


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"epsilon": 0}, "epsilon must be positive, found 0"),
        ({"epsilon_high": -1e-4}, "epsilon_high must be positive"),
        ({"noise_level": 0.0}, r"noise_level must lie in \(0, 10\]"),
        ({"noise_level": 1.5, "sde_type": "cps"}, r"noise_level 1.5 is out of range for cps"),
        ({"consistency_tolerance": 0}, "consistency_tolerance must be positive"),
        ({"advantage_clip": 0}, "advantage_clip must be positive"),
        ({"beta": -0.01}, "beta must be at least 0, found -0.01"),
        ({"max_failed_fraction": 1.1}, r"max_failed_fraction must lie in \[0, 1\]"),
        ({"max_failed_fraction": -0.1}, r"max_failed_fraction must lie in \[0, 1\]"),
        ({"num_generations": 1}, "num_generations must be at least 2.*found 1"),
        ({"num_generations": 3}, "generation_batch_size 8 must be a multiple of num_generations 3.*nearest is 9"),
        ({"generation_batch_size": 0}, "generation_batch_size must be at least 1, found 0"),
        ({"generation_batch_size": -8}, "generation_batch_size must be at least 1, found -8"),
        ({"num_inference_steps": 0}, "num_inference_steps must be at least 2"),
        ({"rollout_batch_size": 0}, "rollout_batch_size must be at least 1"),
        ({"num_iterations": 0}, "num_iterations must be at least 1"),
        ({"num_generations_eval": 0}, "num_generations_eval must be at least 1"),
        ({"per_device_train_batch_size": 0}, "per_device_train_batch_size must be at least 1"),
        ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps must be at least 1"),
        ({"eval_num_inference_steps": 0}, "eval_num_inference_steps must be at least 2"),
        ({"eval_rollout_batch_size": -2}, "eval_rollout_batch_size must be at least 1"),
        ({"sde_type": "sdee"}, "sde_type must be one of sde, cps, found 'sdee'"),
        ({"scale_rewards": "groop"}, "scale_rewards must be one of group, batch, none, found 'groop'"),
        ({"multi_objective_aggregation": "sum"}, "multi_objective_aggregation must be one of sum_then_normalize"),
        ({"log_prob_reduction": "median"}, "log_prob_reduction must be one of mean, sum, found 'median'"),
        ({"remove_unused_columns": True}, "remove_unused_columns must be false"),
        ({"ema_decay": 1.0}, r"ema_decay must lie inside \(0, 1\), found 1.0"),
    ],
)
def test_a_value_that_cannot_work_is_refused(overrides, message):
    with pytest.raises(ValueError, match=message):
        config(**overrides)


def test_the_upper_clip_range_is_the_lower_one_unless_it_is_given():
    assert config(epsilon=2e-4).clip_range == (2e-4, 2e-4)
    assert config(epsilon=2e-4, epsilon_high=3e-4).clip_range == (2e-4, 3e-4)


# --- Batch sizes ---


@pytest.mark.parametrize(
    ("images", "window", "batch", "iterations", "world", "per_pass"),
    [
        (8, 10, 4, 1, 1, 20),  # 8 x 10 transitions, 4 at a time
        (8, 2, 4, 3, 1, 4),
        (8, 2, 4, 1, 2, 2),  # each process holds 4 of the images
        (64, 4, 16, 2, 4, 4),
    ],
)
def test_micro_batches_of_a_pass_and_of_a_rollout(images, window, batch, iterations, world, per_pass):
    settings = config(
        generation_batch_size=images,
        sde_window_size=window,
        per_device_train_batch_size=batch,
        num_iterations=iterations,
    )
    settings.check_world(world)
    assert settings.micro_batches_per_pass(world) == per_pass
    assert settings.micro_batches_per_rollout(world) == per_pass * iterations


def test_a_world_passes_exactly_when_every_transition_finds_its_update():
    passed = refused = 0
    for images, window, batch, accumulation, world in product((4, 8, 12), (1, 2, 3), (1, 3, 4), (1, 2), (1, 2, 3)):
        settings = config(
            generation_batch_size=images,
            sde_window_size=window,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulation,
        )
        whole = images % world == 0 and (images // world * window) % (batch * accumulation) == 0
        try:
            settings.check_world(world)
        except ValueError:
            assert not whole
            refused += 1
        else:
            assert whole
            per_pass = settings.micro_batches_per_pass(world)
            assert per_pass * batch * world == images * window and per_pass % accumulation == 0
            passed += 1
    assert passed > 20 and refused > 20


def test_transitions_that_do_not_divide_are_counted_out():
    settings = config(sde_window_size=3, per_device_train_batch_size=5, gradient_accumulation_steps=2)
    with pytest.raises(ValueError) as caught:
        settings.check_world(2)
    message = str(caught.value)
    assert "4 images x 3 trained steps = 12 transitions on each process" in message
    assert "per_device_train_batch_size 5 x gradient_accumulation_steps 2 = 10 does not divide" in message
    assert "12 = batch size x accumulation" in message


def test_images_that_do_not_divide_over_the_processes_are_refused():
    with pytest.raises(ValueError, match="generation_batch_size 8 must be a multiple of the 3 processes"):
        config().check_world(3)


# --- Plans ---


def test_the_plan_of_a_rollout_is_what_the_settings_say():
    settings = config(
        height=96,
        width=64,
        guidance_scale=4.0,
        negative_prompt="grey",
        noise_level=0.8,
        sde_type="cps",
        sde_window_size=2,
        sde_window_range=[1, 8],
        log_prob_reduction="sum",
        rollout_batch_size=3,
    )
    for update in range(5):
        plan = settings.plan(update)
        assert (plan.height, plan.width, plan.num_inference_steps, plan.batch_size) == (96, 64, 10, 3)
        assert (plan.guidance_scale, plan.negative_prompt, plan.forwards_per_velocity) == (4.0, "grey", 2)
        assert (plan.noise_level, plan.sde_type, plan.log_prob_reduction) == (0.8, "cps", "sum")
        assert plan.sde_steps == settings.window.steps(update)
    sampler = settings.plan(0).sampler(torch.tensor([1.0, 0.75, 0.0]))
    assert (sampler.noise_level, sampler.sde_type, sampler.sigma_max) == (0.8, "cps", 0.75)
    assert sampler.log_prob_reduction == "sum"


def test_held_out_images_are_drawn_without_noise():
    settings = config(height=96, width=64, guidance_scale=4.0, negative_prompt="grey", rollout_batch_size=3)
    plan = settings.eval_plan()
    assert (plan.sde_steps, plan.noise_level) == ((), 0.0)
    assert (plan.height, plan.width, plan.guidance_scale, plan.negative_prompt) == (96, 64, 4.0, "grey")
    assert (plan.num_inference_steps, plan.batch_size) == (10, 3)
    other = config(eval_num_inference_steps=28, eval_rollout_batch_size=2).eval_plan()
    assert (other.num_inference_steps, other.batch_size) == (28, 2)


def test_making_a_config_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config()
    assert not list(Path().iterdir())


def test_a_window_range_without_a_size_is_the_whole_range():
    assert config(sde_window_range=[2, 5]).window.steps(3) == (2, 3, 4)
