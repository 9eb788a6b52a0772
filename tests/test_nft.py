"""DiffusionNFT on the embedded model: what is drawn and noised, the loss against stock parts, the sampling policy's
weights, exact resuming, early errors."""

import json
from pathlib import Path

import pytest
import torch
from brightness import score as brightness
from datasets import Dataset
from diffusers import QwenImagePipeline, QwenImageTransformer2DModel
from group_runs import history, some_scored, weights
from peft import LoraConfig
from safetensors.torch import load_file
from scaled import largest_difference, loaded_by_stock

from align.grpo import GRPOConfig, GRPOTrainer
from align.models.families import load_model
from align.nft import SAMPLING_POLICY, NFTConfig, NFTTrainer
from align.parallel.sharding import gathered_state
from align.sampling.rollout import rollout
from align.tiny import CHECKPOINT

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
        "num_train_sigmas": 2,
        "per_device_train_batch_size": 32,
        "sampling_decay_rate": 0.3,
        "max_steps": 2,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "constant",
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": 3,
    } | overrides


def trainer(folder: Path, rewards=(brightness,), peft_config="lora", data=PROMPTS, **overrides) -> NFTTrainer:
    adapter = LoraConfig(r=4, lora_alpha=8, init_lora_weights="gaussian") if peft_config == "lora" else peft_config
    args = NFTConfig(**settings(folder, **overrides))
    return NFTTrainer(load_model("tiny"), list(rewards), args, data, peft_config=adapter)


def same_score(images, prompts):
    return [0.5] * len(images)


# --- What is drawn, and noised ---


def test_points_are_the_sampled_latents_and_the_group_decides_how_good_they_are(tmp_path):
    run = trainer(tmp_path, save_rollouts=True, max_steps=1, learning_rate=0.0)
    run.train()
    buffer = run._buffer
    keys = run._image_keys(0, 16, False)
    again = rollout(run.flow, buffer.requests, keys, run.args.plan(0))
    assert torch.equal(again.latents, buffer.latents) and not again.transitions
    scores = torch.tensor(brightness(again.images, [])).view(4, 4)
    advantage = (scores - scores.mean(1, keepdim=True)) / (scores.std(1, keepdim=True) + 1e-4)
    torch.testing.assert_close(buffer.optimality, (0.5 + advantage / 10).flatten(), atol=1e-5, rtol=0)
    schedule = run.flow.sigmas(3, 64, 64)[:-1]
    levels = buffer.sigma.view(2, 16)
    assert torch.isin(levels, schedule).all() and (levels[0] != levels[1]).all()
    assert torch.isin(schedule, levels).all()  # not the same ones of every image


def test_logit_normal_levels_are_all_different_and_of_the_run(tmp_path):
    runs = [
        trainer(tmp_path / str(n), train_sigmas="logit_normal", num_train_sigmas=4, max_steps=1, **more)
        for n, more in enumerate(({}, {}, {"seed": 4}))
    ]
    one, same, other = (run._draw_sigma(0, 16, 0) for run in runs)
    assert len(set(one.tolist())) == 64 and one.min() > 0 and one.max() < 1
    assert torch.equal(one, same) and not torch.isin(one, other).any()
    assert torch.equal(one.view(4, 16)[:, 8:].flatten(), runs[0]._draw_sigma(8, 8, 0))  # of another process's images


def test_old_velocities_are_those_of_the_policy_that_drew_the_images(tmp_path):
    run = trainer(tmp_path, max_steps=2, learning_rate=1e-2, sampling_decay_rate=0.4)
    run.train()
    held = dict(zip(weights(run), (p.clone() for p in run._old.average.shadow_params), strict=True))
    assert largest_difference(held, weights(run)) > 1e-3
    batch = run._buffer.micro_batch(0)
    with torch.no_grad():
        now = run._velocity(batch, run.model)
        with run._sampling_policy():
            assert largest_difference(held, weights(run)) == 0
            old = run._velocity(batch, run.model)
    assert torch.equal(old, batch.old_velocity) and not torch.allclose(now, old, atol=1e-3)


# --- The loss ---


def test_the_loss_is_that_of_plain_diffusers_calls(tmp_path):
    """Trained, sampling and reference policy all different: an independent computation gives the same to 1e-5."""
    run = trainer(tmp_path, max_steps=1, beta=0.3, nft_beta=0.4, advantage_clip=2.0)
    run.train()
    generator = torch.Generator().manual_seed(0)
    run.flow.save(
        str(tmp_path / "old"), {n: p.clone() for n, p in zip(weights(run), run._old.average.shadow_params, strict=True)}
    )
    with torch.no_grad():
        for parameter in run.trained_parameters().values():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    run.flow.save(str(tmp_path / "now"), gathered_state(run.trained_parameters(), keep=True))
    stock = {name: QwenImagePipeline.from_pretrained(CHECKPOINT, dtype=torch.float32) for name in ("now", "old", "ref")}
    stock["now"].load_lora_weights(tmp_path / "now")
    stock["old"].load_lora_weights(tmp_path / "old")
    batch, expected = run._buffer.micro_batch(0), []
    with torch.no_grad():
        for place, image in enumerate(batch.images):
            x0, noise, s, r = (v[place] for v in (batch.latents, batch.noise, batch.sigma, batch.optimality))
            x, v = ((1 - s) * x0 + s * noise)[None], {}
            for name, pipeline in stock.items():
                embeds, _ = pipeline.encode_prompt(run._buffer.requests[image].prompt, max_sequence_length=512)
                v[name] = pipeline.transformer(
                    hidden_states=x, timestep=s[None], encoder_hidden_states=embeds, img_shapes=[[(1, 4, 4)]],
                    return_dict=False,
                )[0]  # fmt: skip
            errors = [
                x - s * mixed - x0 for mixed in (0.6 * v["old"] + 0.4 * v["now"], 1.4 * v["old"] - 0.4 * v["now"])
            ]
            positive, negative = ((e**2).mean() / e.abs().mean() for e in errors)
            matched = 2.0 / 0.4 * (r * positive + (1 - r) * negative)
            expected.append((matched + 0.3 * ((v["now"] - v["ref"]) ** 2).mean()).item())
        found = run.compute_loss(run.model, batch).item()
    assert len(expected) == 32 and found == pytest.approx(sum(expected) / 32, rel=1e-5)


def test_without_memory_the_old_velocity_is_the_present_one_and_its_forward_is_saved(tmp_path):
    """One update a rollout: the same losses and weights as with velocities taken apart, at fewer forwards."""
    saved, taken = (trainer(tmp_path / str(n), sampling_decay_rate=0.0, num_iterations=n, max_steps=n) for n in (1, 2))
    saved.train()
    taken.train()  # its first update is the same
    assert saved._buffer.old_velocity is None and taken._buffer.old_velocity is not None
    assert saved._old is None and taken._old is None
    assert history(saved, "loss")[0] == pytest.approx(history(taken, "loss")[0], rel=1e-6)
    assert history(saved, "grad_norm")[0] == pytest.approx(history(taken, "grad_norm")[0], rel=1e-5)
    assert history(taken, "old_distance")[0] == 0 < history(taken, "old_distance")[1]
    # 16 images x 3 steps, and 32 points: forward and backward 3, the old velocity 1 once a rollout.
    assert history(saved, "forward_equivalents") == [48 + 32 * 3]
    assert history(taken, "forward_equivalents") == [48 + 32 * (1 + 3), 48 + 32 * (1 + 3 + 3)]


def test_forward_equivalents_count_what_was_run(tmp_path):
    run = trainer(tmp_path, beta=0.1, guidance_scale=2.0, max_steps=1)
    run.train()
    assert history(run, "forward_equivalents") == [2 * (48 + 32 * (1 + 1 + 3))]


def test_the_first_gradient_is_zero_sum_and_the_mixing_does_not_matter_to_it(tmp_path):
    norms = {}
    for mixing in (0.1, 1.0):
        run = trainer(tmp_path / str(mixing), nft_beta=mixing, sampling_decay_rate=0.0, max_steps=1)
        run.train()
        norms[mixing] = history(run, "grad_norm")[0]
    assert norms[0.1] == pytest.approx(norms[1.0], rel=1e-4) and norms[1.0] > 1e-3


def test_groups_without_a_difference_and_images_without_a_score_are_left_out_and_count_nothing(tmp_path):
    run = trainer(tmp_path, rewards=[some_scored], max_steps=1)
    run.train()
    assert history(run, "dead_groups") == [0.5] and history(run, "rewards/some_scored/unscored") == [0.25]
    batch = run._buffer.micro_batch(0)
    assert {run._buffer.requests[image].prompt for image in batch.images} == {"a circle", "red objects"}
    assert len(batch) == 16 and batch.nominal_size == 32
    assert history(run, "forward_equivalents") == [48 + 16 * (1 + 3)]


def test_a_rollout_of_dead_groups_costs_no_forward_and_does_not_move_the_policy(tmp_path):
    run = trainer(tmp_path, rewards=[same_score])
    before = weights(run)
    run.train()
    assert history(run, "dead_groups") == [1.0, 1.0] and history(run, "loss") == [0.0, 0.0]
    assert history(run, "forward_equivalents")[-1] == 2 * 48
    assert largest_difference(before, weights(run)) == 0


@pytest.mark.parametrize(("size", "accumulation"), [(8, 4), (16, 2)])
def test_an_update_does_not_depend_on_the_micro_batch(tmp_path, size, accumulation):
    split = {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulation}
    whole, parts = (trainer(tmp_path / str(len(s)), rewards=[some_scored], **s) for s in ({}, split))
    whole.train()
    parts.train()
    assert largest_difference(weights(whole), weights(parts)) < 2e-5  # Adam's first steps are lr-sized: 1e-3
    assert history(whole, "loss") == pytest.approx(history(parts, "loss"), abs=1e-5)


def test_beta_holds_the_policy_at_its_reference(tmp_path):
    distances = {}
    for beta in (1e-6, 100.0):
        run = trainer(tmp_path / str(beta), beta=beta, max_steps=8, learning_rate=3e-3, sampling_decay_rate=0.0)
        run.train()
        distances[beta] = history(run, "reference_distance")
    assert distances[100.0][0] == distances[1e-6][0] == 0
    assert distances[100.0][-1] < 0.5 * distances[1e-6][-1]


def test_reward_rises_when_the_reward_is_easy(tmp_path):
    run = trainer(tmp_path, max_steps=12, num_generations=8, generation_batch_size=32, learning_rate=3e-3,
                  sampling_decay_rate=0.01, per_device_train_batch_size=64, solver="ab2")  # fmt: skip
    run.train()
    rewards = history(run, "reward")
    assert sum(rewards[-3:]) / 3 > sum(rewards[:3]) / 3 + 0.02


# --- The sampling policy ---


def test_the_sampling_policy_follows_by_its_schedule_and_draws_the_images(tmp_path):
    """Rollout i keeps min(rate x i, max) of it: by hand from the weights at the end of every update."""
    run = trainer(tmp_path, max_steps=4, sampling_decay_rate=0.2, sampling_decay_max=0.5, learning_rate=1e-2,
                  save_strategy="steps", save_steps=1)  # fmt: skip
    before = weights(run)
    run.train()
    assert history(run, "sampling_decay") == pytest.approx([0.0, 0.2, 0.4, 0.5])
    old = before
    for update, eta in ((1, 0.2), (2, 0.4), (3, 0.5)):
        assert largest_difference(old, load_file(tmp_path / f"checkpoint-{update}" / SAMPLING_POLICY)) < 1e-6
        now = load_file(tmp_path / f"checkpoint-{update}/model.safetensors")
        old = {name: eta * old[name] + (1 - eta) * now[name] for name in old}
    assert largest_difference(old, load_file(tmp_path / "checkpoint-4" / SAMPLING_POLICY)) < 1e-6
    assert largest_difference(old, weights(run)) > 1e-4
    with torch.no_grad():
        for name, parameter in run.trained_parameters().items():
            parameter.copy_(old[name])
    again = rollout(run.flow, run._buffer.requests, run._image_keys(3, 16, False), run.args.plan(3))
    assert (again.latents - run._buffer.latents).abs().max() < 1e-4


def test_the_model_trains_evaluates_and_exports_its_own_weights(tmp_path):
    run = trainer(tmp_path, learning_rate=1e-2)
    run.train()
    run.export()
    assert largest_difference(loaded_by_stock(tmp_path), weights(run)) == 0


def test_full_fine_tune_trains_and_exports_a_transformer_that_stock_diffusers_loads(tmp_path):
    run = trainer(tmp_path, peft_config=None, learning_rate=1e-4, beta=0.1)
    run.train()
    run.finish("tiny", "four prompts")
    loaded = QwenImageTransformer2DModel.from_pretrained(tmp_path / "transformer").state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in weights(run).items())
    assert "(DiffusionNFT)" in (tmp_path / "README.md").read_text()


# --- Checkpoints ---


#: Two updates on each rollout.
FIVE = {"per_device_train_batch_size": 16, "max_steps": 5, "save_strategy": "steps", "save_steps": 1}
FIVE |= {"learning_rate": 1e-2, "save_total_limit": 5}


@pytest.fixture(scope="module", params=[0.0, 0.3], ids=["no-memory", "memory"])
def straight(request, tmp_path_factory):
    """An undisturbed run of five updates, and what it was made with."""
    common = FIVE | {"sampling_decay_rate": request.param, "rewards": [some_scored]}
    run = trainer(tmp_path_factory.mktemp("straight"), **common)
    run.train()
    return run, common


@pytest.mark.parametrize("at", [1, 2, 3, 4])
def test_resume_is_bit_exact_between_and_within_rollouts(tmp_path, straight, at):
    """The sampling policy, and the velocities it left, are those of the straight run."""
    straight, common = straight
    decay, folder = common["sampling_decay_rate"], Path(straight.args.output_dir) / f"checkpoint-{at}"
    assert (folder / "rollout-0-of-1.safetensors").exists() == bool(at % 2)
    assert (folder / SAMPLING_POLICY).exists() == (decay > 0)
    resumed = trainer(tmp_path / "resumed", **common)
    resumed.train(resume_from_checkpoint=str(folder))
    assert largest_difference(weights(straight), weights(resumed)) == 0
    for key in ("loss", "reward", "forward_equivalents", "old_distance"):
        assert history(straight, key) == history(resumed, key), key
    if decay:
        held = [run._old.average.shadow_params for run in (straight, resumed)]
        assert all(torch.equal(one, other) for one, other in zip(*held, strict=True))


def test_resuming_as_another_run_is_refused(tmp_path):
    trainer(tmp_path / "a", save_strategy="steps", save_steps=1).train()
    folder = str(tmp_path / "a/checkpoint-1")
    run = json.loads((tmp_path / "a/checkpoint-1/checkpoint.json").read_text())["run"]
    assert run["algorithm"] == {"algorithm": "DiffusionNFT"} and run["fixed_on_resume"]["num_train_sigmas"] == 2
    for wrong, message in (
        ({"sampling_decay_rate": 0.0}, r"sampling_decay_rate is 0\.0 and was 0\.3"),
        ({"num_train_sigmas": 1, "per_device_train_batch_size": 16}, "num_train_sigmas is 1 and was 2"),
        ({"solver": "ab2"}, "solver is 'ab2' and was 'euler'"),
    ):
        with pytest.raises(ValueError, match=message):
            trainer(tmp_path / "b", **wrong).train(resume_from_checkpoint=folder)
    common = {k: v for k, v in settings(tmp_path / "c").items() if not k.startswith(("sampling_", "num_train_"))}
    grpo = GRPOConfig(**common | {"per_device_train_batch_size": 16, "gradient_accumulation_steps": 3})
    with pytest.raises(ValueError, match="algorithm is 'GRPO' and was 'DiffusionNFT'"):
        GRPOTrainer("tiny", [brightness], grpo, PROMPTS, peft_config=LoraConfig(r=4)).train(folder)
    (tmp_path / "a/checkpoint-1" / SAMPLING_POLICY).unlink()
    with pytest.raises(ValueError, match=r"checkpoint-1 lacks sampling_policy\.safetensors"):
        trainer(tmp_path / "d").train(resume_from_checkpoint=folder)


# --- Errors before the model is loaded ---


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"nft_beta": 0.0}, "nft_beta must be positive, found 0"),
        ({"beta": -1.0}, "beta must be at least 0, found -1"),
        ({"advantage_clip": 0.0}, "advantage_clip must be positive"),
        ({"sampling_decay_rate": -0.1}, r"sampling_decay_rate must be at least 0, found -0\.1"),
        ({"sampling_decay_max": 1.0}, r"sampling_decay_max must lie in \[0, 1\), found 1\.0"),
        ({"solver": "heun"}, "solver must be one of euler, ab2, found 'heun'"),
        ({"train_sigmas": "uniform"}, "train_sigmas must be one of schedule, logit_normal, found 'uniform'"),
        ({"num_train_sigmas": 0}, "num_train_sigmas must be at least 1, found 0"),
        ({"num_train_sigmas": 4}, "num_train_sigmas 4 is more than the schedule's 3 noise levels"),
        ({"num_generations": 1}, "num_generations must be at least 2"),
        (
            {"per_device_train_batch_size": 12},
            r"16 images x 2 noise levels = 32 points .* = 12 does not divide: .* would be 32",
        ),
    ],
)
def test_a_wrong_setting_is_named(tmp_path, wrong, message):
    with pytest.raises(ValueError, match=message):
        NFTConfig(**settings(tmp_path, **wrong)).check_world(1)


def test_what_does_not_fit_together_is_said_before_the_model_is_loaded(tmp_path):
    args, missing = NFTConfig(**settings(tmp_path)), str(tmp_path / "no-model")
    with pytest.raises(ValueError, match=r"a rollout takes 4 prompts .* and the data holds 2"):
        NFTTrainer(missing, [brightness], args, PROMPTS.select(range(2)))
    with pytest.raises(ValueError, match="lora_dropout must be 0"):
        NFTTrainer(missing, [brightness], args, PROMPTS, peft_config=LoraConfig(r=4, lora_dropout=0.1))


def test_the_dropout_of_an_adapter_is_left_out_and_said(tmp_path, caplog):
    first = load_model("tiny")
    first.add_lora(LoraConfig(r=4, lora_dropout=0.5))
    state = {name: p.detach() for name, p in first.transformer.named_parameters() if p.requires_grad}
    first.save(tmp_path / "adapter", state)
    model = load_model("tiny")
    model.load_adapter(tmp_path / "adapter")
    run = NFTTrainer(model, [brightness], NFTConfig(**settings(tmp_path / "run")), PROMPTS)
    assert "the adapter's dropout of 0.5 is left out" in caplog.text
    assert not any(m.p for m in run.model.modules() if isinstance(m, torch.nn.Dropout))


def test_every_step_of_the_schedule_is_trained_by_default(tmp_path):
    args = NFTConfig(**settings(tmp_path, num_train_sigmas=None, per_device_train_batch_size=48))
    args.check_world(1)
    assert args.points_per_image == 3 and args.one_update(1)
    assert NFTConfig(**settings(tmp_path, sampling_decay_rate=0.0)).full_copy() is None
