"""Online DPO on the embedded model: which pairs are made, their loss against stock parts, exact resuming, early errors."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from brightness import score as brightness
from datasets import Dataset
from diffusers import QwenImagePipeline
from group_runs import history, prompts_of, some_scored, weights
from peft import LoraConfig
from scaled import largest_difference
from stock import stock_errors

from align.dpo import dpo_errors
from align.dpo_online import OnlineDPOConfig, OnlineDPOTrainer
from align.engine.matching import matching_errors
from align.grpo import GRPOConfig, GRPOTrainer
from align.models.families import load_model
from align.parallel.sharding import gathered_state
from align.tiny import CHECKPOINT
from preference_data.readers import read_preferences

PROMPTS = Dataset.from_dict({"prompt": ["a circle", "two squares", "red objects", "a blue cross"]})


def settings(folder: Path, **overrides):
    return {
        "output_dir": str(folder),
        "height": 64,
        "width": 64,
        "num_inference_steps": 3,
        "num_generations": 4,
        "generation_batch_size": 16,
        "rollout_batch_size": 16,
        "per_device_train_batch_size": 4,
        "beta": 60.0,
        "max_steps": 2,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "constant",
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": 3,
    } | overrides


def trainer(folder: Path, rewards=(brightness,), peft_config="lora", data=PROMPTS, **overrides) -> OnlineDPOTrainer:
    adapter = LoraConfig(r=4, lora_alpha=8, init_lora_weights="gaussian") if peft_config == "lora" else peft_config
    args = OnlineDPOConfig(**settings(folder, **overrides))
    return OnlineDPOTrainer(load_model("tiny"), list(rewards), args, data, peft_config=adapter)


# --- Pairs ---


def test_pairs_are_the_brightest_and_the_darkest_of_their_group(tmp_path):
    run = trainer(tmp_path, save_rollouts=True, max_steps=1)
    run.train()
    buffer, rows = run._buffer, list(read_preferences(tmp_path / "rollouts"))
    assert [row.prompt for row in rows] == prompts_of(buffer) and buffer.groups == [0, 1, 2, 3]
    assert buffer.latents.shape == (4, 2, 16, 64) and len(rows[0].images) == 4
    for row, pair in zip(rows, buffer.latents, strict=True):
        values = brightness([image.open() for image in row.images], [])
        decoded = run.flow.decode_latents(pair, 64, 64)
        assert brightness(decoded, []) == pytest.approx([max(values), min(values)], abs=1e-6)
        assert max(values) > min(values)


def test_what_is_trained_on_is_what_the_sampler_ended_on(tmp_path):
    """The stock pipeline, from the same noise, gives the images of every pair: no VAE in between, no noise injected."""
    run = trainer(tmp_path, max_steps=1, learning_rate=0.0)
    run.train()
    pipeline = QwenImagePipeline.from_pretrained(CHECKPOINT, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    from align.sampling.noise import ImageKey, seeded_noise

    for group, (prompt, pair) in enumerate(zip(prompts_of(run._buffer), run._buffer.latents, strict=True)):
        noise = torch.stack([seeded_noise(ImageKey(3, 0, group, n).initial(), (16, 64)) for n in range(4)])
        drawn = pipeline(
            prompt, height=64, width=64, num_inference_steps=3, num_images_per_prompt=4, latents=noise,
            output_type="latent", true_cfg_scale=1.0,
        ).images  # fmt: skip
        distances = (drawn[None] - pair[:, None]).abs().amax((2, 3))
        assert distances.amin(1).max() < 1e-4 and distances.argmin(1)[0] != distances.argmin(1)[1]


def test_groups_without_a_pair_are_left_out_and_counted(tmp_path):
    run = trainer(tmp_path, rewards=[some_scored], max_steps=1)
    run.train()
    assert history(run, "dead_groups") == [0.5]
    assert sorted(prompts_of(run._buffer)) == ["a circle", "red objects"]
    assert history(run, "rewards/some_scored/unscored") == [0.25]
    # 16 images x 3 steps; two pairs: reference, and the policy's forward and backward.
    assert history(run, "forward_equivalents") == [48 + 2 * 2 * (1 + 3)]
    assert history(run, "loss")[0] == pytest.approx(math.log(2) / 2, abs=1e-6)  # groups without a pair count 0


def test_an_image_without_a_score_is_never_part_of_a_pair(tmp_path):
    def not_the_brightest(images, prompts):
        scores = brightness(images, prompts)
        return [None if s == max(scores[n // 4 * 4 : n // 4 * 4 + 4]) else s for n, s in enumerate(scores)]

    runs = [trainer(tmp_path / str(n), rewards=[r], max_steps=1) for n, r in enumerate((brightness, not_the_brightest))]
    for run in runs:
        run.train()
    everything, some = (run._buffer.latents for run in runs)
    assert len(some) == 4 and torch.equal(everything[:, 1], some[:, 1])
    assert all(not torch.equal(one, other) for one, other in zip(everything[:, 0], some[:, 0], strict=True))


@pytest.mark.parametrize("overrides", [{"rewards": [lambda images, prompts: [0.5] * len(images)]}, {"min_margin": 2.0}])
def test_a_rollout_without_pairs_costs_no_forward_and_does_not_move_the_policy(tmp_path, overrides):
    run = trainer(tmp_path, num_iterations=2, max_steps=4, **overrides)
    before = weights(run)
    run.train()
    assert history(run, "dead_groups") == [1.0, 1.0] and history(run, "loss") == [0.0] * 4
    assert history(run, "forward_equivalents")[-1] == 2 * 48
    assert largest_difference(before, weights(run)) == 0


def test_every_pair_of_every_pass_has_noise_of_its_own_and_shares_it_between_its_images(tmp_path):
    run = trainer(tmp_path, num_iterations=2, max_steps=1, per_device_train_batch_size=2, gradient_accumulation_steps=2)
    run.train()
    batches = [run._buffer.micro_batch(index) for index in range(4)]
    noised = [run.noised(batch) for batch in batches]
    assert all(batch.noise.shape == (2, 16, 64) and batch.latents.shape[:2] == (2, 2) for batch in noised)
    assert len({sigma for batch in noised for sigma in batch.sigma.tolist()}) == 8
    places = [place for batch in batches for place in batch.places]
    assert sorted(places) == [(0, number, group) for number in (0, 1) for group in range(4)]
    later = run.noised(
        replace(batches[0], places=[(1, *place[1:]) for place in batches[0].places])
    )  # the next rollout's
    assert not torch.isin(later.sigma, noised[0].sigma).any()
    assert (later.noise - noised[0].noise).abs().amax((1, 2)).min() > 0.1
    again = run.noised(run._buffer.micro_batch(1))
    assert torch.equal(again.noise, noised[1].noise) and torch.equal(again.sigma, noised[1].sigma)


# --- The loss ---


def test_the_first_loss_is_log_2_and_the_reference_stays(tmp_path):
    run = trainer(tmp_path, num_iterations=3, max_steps=3, learning_rate=3e-3)
    run.train()
    first = next(entry for entry in run.state.log_history if "loss" in entry)
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert first["rewards/accuracies"] == 0.5 and first["rewards/margins"] == 0 and first["dead_groups"] == 0
    assert len(history(run, "reward")) == 1 and len(history(run, "rewards/margins")) == 3  # one rollout, three updates
    assert history(run, "loss")[-1] != pytest.approx(math.log(2), abs=1e-3)
    batch, fresh = run.noised(run._buffer.micro_batch(0)), load_model("tiny")
    with torch.no_grad():
        errors, reference = dpo_errors(run.flow, batch, run.model, run.accelerator.autocast)
        assert torch.equal(reference, matching_errors(fresh, batch, fresh.transformer))
        assert not torch.equal(errors, reference)


def test_the_loss_is_that_of_plain_diffusers_calls(tmp_path):
    """Policy and reference different: an independent computation gives the same to 1e-6."""
    run = trainer(tmp_path, max_steps=1)
    run.train()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in run.trained_parameters().values():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
        run.flow.save(str(tmp_path / "lora"), gathered_state(run.trained_parameters(), keep=True))
        policy, reference = (QwenImagePipeline.from_pretrained(CHECKPOINT, dtype=torch.float32) for _ in range(2))
        policy.load_lora_weights(tmp_path / "lora")
        batch = run._buffer.micro_batch(0)
        noised, expected = run.noised(batch), []
        for place, (pair, prompt) in enumerate(zip(batch.latents, prompts_of(batch), strict=True)):
            drawn = noised.noise[place], noised.sigma[place]
            win, lose = stock_errors(policy, pair, prompt, *drawn)
            win_ref, lose_ref = stock_errors(reference, pair, prompt, *drawn)
            margin = ((win - lose) - (win_ref - lose_ref)).item()
            assert abs(30 * margin) > 0.01
            expected.append(math.log(1 + math.exp(30 * margin)))
        assert run.compute_loss(run.model, batch).item() == pytest.approx(sum(expected) / 4, abs=1e-6)


def test_a_process_without_a_pair_keeps_in_step_and_trains_nothing(tmp_path):
    """On several GPUs it would train on a picture of zeros, or leave the others waiting for its gradients."""
    run = trainer(tmp_path)
    loss = run._keep_in_step(run.model)
    loss.backward()
    assert loss.item() == 0 and all(p.grad is not None and not p.grad.any() for p in run.trained_parameters().values())


def test_the_second_rollout_is_drawn_by_the_trained_policy(tmp_path):
    still, moving = (trainer(tmp_path / str(rate), learning_rate=rate) for rate in (0.0, 1e-2))
    for run in (still, moving):
        run.train()
    assert history(still, "reward")[0] == history(moving, "reward")[0]
    assert history(still, "reward")[1] != history(moving, "reward")[1]


@pytest.mark.parametrize(("size", "accumulation"), [(2, 2), (1, 4)])
def test_an_update_does_not_depend_on_the_micro_batch(tmp_path, size, accumulation):
    """Also where groups are dead, and some micro-batches hold fewer pairs than others, or none."""
    split = {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulation}
    sgd = {"optim": "sgd", "learning_rate": 0.1, "rewards": [some_scored]}  # Adam's first steps would amplify rounding
    whole, parts = (trainer(tmp_path / str(len(s)), **sgd, **s) for s in ({}, split))
    before = weights(whole)
    whole.train()
    parts.train()
    moved = largest_difference(weights(whole), before)
    assert moved > 1e-3 and largest_difference(weights(whole), weights(parts)) < 1e-3 * moved
    assert history(whole, "loss") == pytest.approx(history(parts, "loss"), abs=1e-5)


def test_full_fine_tune_refers_to_a_frozen_copy(tmp_path):
    run = trainer(tmp_path, peft_config=None, learning_rate=1e-4, num_iterations=2)
    run.train()
    first, second = history(run, "loss")
    assert first == pytest.approx(math.log(2), abs=1e-6) != second
    run.finish("tiny", "four prompts")
    assert (tmp_path / "transformer").is_dir() and "(online DPO)" in (tmp_path / "README.md").read_text()


def test_reward_rises_when_the_reward_is_easy(tmp_path):
    run = trainer(tmp_path, num_iterations=4, max_steps=24, num_generations=8, generation_batch_size=32)
    run.train()
    rewards = history(run, "reward")
    assert len(rewards) == 6 and sum(rewards[-2:]) / 2 > sum(rewards[:2]) / 2 + 0.02


# --- Checkpoints ---


#: Four updates on each rollout: two passes of two.
SIX = {"num_iterations": 2, "per_device_train_batch_size": 2, "max_steps": 6}
SIX |= {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 6}


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """An undisturbed run of six updates, and what it was made with."""
    common = SIX | {"rewards": [some_scored]}
    run = trainer(tmp_path_factory.mktemp("straight"), **common)
    run.train()
    return run, common


@pytest.mark.parametrize("at", [1, 2, 3, 4])
def test_resume_is_bit_exact_between_and_within_rollouts(tmp_path, straight, at):
    straight, common = straight
    folder = Path(straight.args.output_dir) / f"checkpoint-{at}"
    assert (folder / "pairs.safetensors").exists() == (at < 4)
    resumed = trainer(tmp_path / "resumed", **common)
    resumed.train(resume_from_checkpoint=str(folder))
    assert largest_difference(weights(straight), weights(resumed)) == 0
    for key in ("loss", "reward", "forward_equivalents"):
        assert history(straight, key) == history(resumed, key)


def test_a_run_goes_on_with_other_micro_batches_but_not_as_another_run(tmp_path):
    common = {"num_iterations": 2, "max_steps": 4}
    straight = trainer(tmp_path / "a", save_strategy="steps", save_steps=1, **common)
    straight.train()
    folder = str(tmp_path / "a/checkpoint-1")
    split = trainer(tmp_path / "b", per_device_train_batch_size=1, gradient_accumulation_steps=4, **common)
    split.train(resume_from_checkpoint=folder)
    assert largest_difference(weights(straight), weights(split)) < 2e-5
    assert history(split, "reward") == pytest.approx(history(straight, "reward"), abs=1e-4)
    with pytest.raises(
        ValueError, match=r"= 2 rows an update, and it was 4 when .* --per_device_train_batch_size 4 or"
    ):
        trainer(tmp_path / "c", per_device_train_batch_size=2, **common).train(resume_from_checkpoint=folder)
    with pytest.raises(ValueError, match=r"min_margin is 0\.1 and was 0\.0"):
        trainer(tmp_path / "d", min_margin=0.1, **common).train(resume_from_checkpoint=folder)
    grpo = GRPOConfig(
        **settings(tmp_path / "e", beta=0.0, per_device_train_batch_size=16, gradient_accumulation_steps=3)
    )
    other = GRPOTrainer("tiny", [brightness], grpo, PROMPTS, peft_config=LoraConfig(r=4))
    with pytest.raises(ValueError, match="algorithm is 'GRPO' and was 'online DPO'"):
        other.train(resume_from_checkpoint=folder)
    (tmp_path / "a/checkpoint-1/pairs.safetensors").unlink()
    with pytest.raises(ValueError, match=r"checkpoint-1 lacks pairs\.safetensors: the last good one .*checkpoint-4"):
        trainer(tmp_path / "f", **common).train(resume_from_checkpoint=folder)


# --- Errors before the model is loaded ---


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"num_generations": 1}, "num_generations must be at least 2"),
        ({"generation_batch_size": 18}, "must be a multiple of num_generations 4, for whole groups: the nearest is 16"),
        ({"min_margin": -1.0}, "min_margin must be at least 0, found -1"),
        ({"beta": 0.0}, "beta must be positive, found 0"),
        ({"loss_type": "sigmid"}, "loss_type must be one of sigmoid, hinge, ipo, found 'sigmid'"),
        ({"label_smoothing": 0.5}, r"label_smoothing must lie in \[0, 0.5\)"),
        ({"logit_std": 0.0}, "logit_std must be positive"),
        ({"num_iterations": 0}, "num_iterations must be at least 1, found 0"),
        ({"per_device_train_batch_size": 3}, r"16 / num_generations 4 = 4 groups.* = 3 does not divide.*would be 4"),
        (
            {"gradient_accumulation_steps": 2},
            r"batch_size 4 x gradient_accumulation_steps 2 x 1 processes = 8 does not",
        ),
    ],
)
def test_a_wrong_setting_is_named(tmp_path, wrong, message):
    with pytest.raises(ValueError, match=message):
        OnlineDPOConfig(**settings(tmp_path, **wrong)).check_world(1)


def test_a_pass_is_as_many_micro_batches_as_the_processes_share(tmp_path):
    """Else every process would take all of the pairs, and a rollout would be trained on once for each of them."""
    args = OnlineDPOConfig(**settings(tmp_path, per_device_train_batch_size=1, num_iterations=3))
    assert [args.micro_batches_per_pass(n) for n in (1, 2, 4)] == [4, 2, 1] and args.micro_batches_per_rollout(2) == 6


def test_what_does_not_fit_together_is_said_before_the_model_is_loaded(tmp_path):
    args, missing = OnlineDPOConfig(**settings(tmp_path)), str(tmp_path / "no-model")
    with pytest.raises(ValueError, match="every reward has weight 0: nothing would be trained on"):
        OnlineDPOTrainer(missing, [{"use": "shapes_following", "weight": 0.0}], args, spec_of(PROMPTS))
    with pytest.raises(ValueError, match=r"a rollout takes 4 prompts .* and the data holds 2"):
        OnlineDPOTrainer(missing, [brightness], args, PROMPTS.select(range(2)))
    with pytest.raises(ValueError, match="lora_dropout must be 0"):
        OnlineDPOTrainer(missing, [brightness], args, PROMPTS, peft_config=LoraConfig(r=4, lora_dropout=0.1))


def spec_of(data: Dataset) -> Dataset:
    """The column that the built-in rewards ask for."""
    return data.add_column("spec", [{"kind": "count"}] * len(data))


def test_a_checkpoint_says_what_its_updates_are_made_of(tmp_path):
    trainer(tmp_path, save_strategy="steps", save_steps=2).train()
    run = json.loads((tmp_path / "checkpoint-2/checkpoint.json").read_text())["run"]
    assert run["algorithm"] == {"algorithm": "online DPO"} and run["fixed_on_resume"]["rows_per_update"] == 4
