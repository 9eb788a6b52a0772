"""SFT and DPO on the embedded model: losses against stock parts, caching, order, resume, and what a run leaves."""

import json
import math
import shutil
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import QwenImagePipeline
from matching_runs import GROUNDED, dpo, lora, losses, settings, sft, some_pairs
from peft import LoraConfig
from PIL import Image
from stock import stock_errors

from align.dpo import DPOConfig, DPOTrainer, dpo_errors
from align.engine.matching import matching_errors
from align.generate import GenerateArguments, generate
from align.models.contract import Request
from align.models.families import load_model
from align.models.qwen_image import QwenImage
from align.offline.examples import BucketSampler, draw_batch
from align.offline.latents import LatentStore
from align.parallel.sharding import gathered_state
from align.sft import SFTConfig, SFTTrainer
from align.tiny import CHECKPOINT
from preference_data.buckets import Bucket, make_buckets
from preference_data.cache import TensorCache
from preference_data.images import BadRow, ImageSource
from preference_data.pairs import build_pairs
from preference_data.readers import read_captioned, read_preferences
from preference_data.writer import RankedWriter
from rewards import load_rewards


def stock_latents(pipeline, images) -> torch.Tensor:
    """Clean packed latents of images by nothing but diffusers' own parts."""
    pixels = [torch.from_numpy(np.array(image.convert("RGB"))).float().permute(2, 0, 1) / 127.5 - 1 for image in images]
    latents = torch.cat([pipeline.vae.encode(p[None, :, None]).latent_dist.mode() for p in pixels])
    mean, std = (torch.tensor(pipeline.vae.config[f"latents_{n}"]).view(1, -1, 1, 1, 1) for n in ("mean", "std"))
    return pipeline._pack_latents((latents - mean) / std, len(images), 16, 8, 8)


# --- The losses ---


@torch.no_grad()
def test_dpo_loss_is_that_of_plain_diffusers_calls(tmp_path):
    """Policy and reference different: an independent computation gives the same to 1e-6, for every pair."""
    trainer = dpo(tmp_path)
    generator = torch.Generator().manual_seed(0)
    for parameter in trainer.trained_parameters().values():  # a policy that has moved away from its reference
        parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    trainer.flow.save(str(tmp_path / "lora"), gathered_state(trainer.trained_parameters(), keep=True))
    policy, reference = (QwenImagePipeline.from_pretrained(CHECKPOINT, dtype=torch.float32) for _ in range(2))
    policy.load_lora_weights(tmp_path / "lora")
    for place, pair in enumerate(some_pairs()):
        batch = trainer._prepare_inputs([(trainer.train_dataset.examples[place], place)])
        ours = trainer.compute_loss(trainer.model, batch).item()
        images = stock_latents(policy, [pair.chosen.open(), pair.rejected.open()])
        drawn = batch.noise[0], batch.sigma[0]
        win, lose = stock_errors(policy, images, pair.prompt, *drawn)
        win_ref, lose_ref = stock_errors(reference, images, pair.prompt, *drawn)
        margin = ((win - lose) - (win_ref - lose_ref)).item()
        assert abs(30 * margin) > 0.01
        assert ours == pytest.approx(math.log(1 + math.exp(30 * margin)), abs=1e-6)


@torch.no_grad()
def test_sft_loss_is_that_of_plain_diffusers_calls(tmp_path):
    trainer = sft(tmp_path, caption_dropout=0.0)
    rows = list(read_captioned(GROUNDED))[:3]
    batch = trainer._prepare_inputs([(trainer.train_dataset.examples[n], n) for n in range(3)])
    assert len(set(batch.sigma.tolist())) == 3
    pipeline = QwenImagePipeline.from_pretrained(CHECKPOINT, dtype=torch.float32)
    expected = [
        stock_errors(pipeline, stock_latents(pipeline, [row.image.open()]), row.prompt, noise, sigma)[0]
        for row, noise, sigma in zip(rows, batch.noise, batch.sigma, strict=True)
    ]
    # A fresh LoRA is no change: the trained model is still the stock one.
    assert trainer.compute_loss(trainer.model, batch).item() == pytest.approx(
        torch.stack(expected).mean().item(), abs=1e-6
    )


def test_the_first_dpo_loss_is_log_2_and_its_accuracy_one_half(tmp_path):
    trainer = dpo(tmp_path)
    trainer.train()
    first = next(entry for entry in trainer.state.log_history if "loss" in entry)
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert first["rewards/accuracies"] == 0.5 and first["rewards/margins"] == 0
    assert any(key.startswith("accuracy_sigma_") for key in first)
    assert losses(trainer)[-1] != pytest.approx(math.log(2), abs=1e-6)


def test_held_out_prompts_without_rewards_and_without_a_grid_are_passed_over(tmp_path):
    args = SFTConfig(**settings(tmp_path, max_steps=1, num_grid_prompts=0))
    data, prompts = list(read_captioned(GROUNDED))[:4], [{"prompt": "a"}]
    trainer = SFTTrainer(load_model("tiny"), args, data, eval_prompts=prompts, peft_config=lora())
    trainer.train()
    assert not any(name.startswith("eval_") for name in trainer.evaluate())
    trainer.finish("tiny", "images")


def test_training_moves_the_held_out_loss_and_the_reference_stays(tmp_path):
    args = DPOConfig(**settings(tmp_path, beta=60.0, max_steps=12, learning_rate=3e-3))
    trainer = DPOTrainer(load_model("tiny"), args, some_pairs(), some_pairs(), peft_config=lora())
    before = trainer.evaluate()
    assert before["eval_accuracy"] == 0.5 and before["eval_loss"] == pytest.approx(math.log(2))
    trainer.train()
    after = trainer.evaluate()
    assert after["eval_loss"] < before["eval_loss"] and after["eval_accuracy"] > 0.5
    assert after == trainer.evaluate()  # fixed noise and noise levels
    batch = trainer._prepare_inputs([(trainer.train_dataset.examples[0], 0)])
    with torch.no_grad():
        fresh = load_model("tiny")
        assert torch.equal(
            dpo_errors(trainer.flow, batch, trainer.model, trainer.accelerator.autocast)[1],
            matching_errors(fresh, batch, fresh.transformer),
        )


# --- Cache, order, resume ---


def test_cached_and_uncached_runs_give_the_same_losses(tmp_path):
    runs = []
    for name, cache in (("fill", tmp_path / "cache"), ("full", tmp_path / "cache"), ("none", None)):
        trainer = sft(tmp_path / name, cache_dir=str(cache) if cache else "none")
        trainer.train()
        runs.append(losses(trainer))
    assert len(runs[0]) == 3 and runs[0] == runs[1] == runs[2]
    entries = list((tmp_path / "cache").rglob("*.safetensors"))
    assert len(entries) > 160  # an image each, and the prompts


def test_a_full_cache_needs_neither_vae_nor_text_encoder(tmp_path, monkeypatch):
    sft(tmp_path)

    def unused(*_, **__):
        raise AssertionError("encoded again")

    monkeypatch.setattr(QwenImage, "encode_images", unused)
    monkeypatch.setattr(QwenImagePipeline, "encode_prompt", unused)
    sft(tmp_path).train()


def test_a_model_keeps_its_cache_wherever_its_folder_lies(tmp_path):
    shutil.copytree(CHECKPOINT, tmp_path / "moved")
    model, moved = load_model("tiny"), load_model(tmp_path / "moved")
    for part in ("vae", "text_encoder"):
        assert model.fingerprint(part) == moved.fingerprint(part)


def test_a_cache_of_another_model_is_not_used(tmp_path):
    model, other = load_model("tiny"), load_model("tiny")
    with torch.no_grad():
        next(other.pipeline.vae.parameters()).mul_(1.01)
    assert model.fingerprint("vae") != other.fingerprint("vae")
    assert model.fingerprint("text_encoder") == other.fingerprint("text_encoder")
    image = [(Request("a"), [next(iter(read_captioned(GROUNDED))).image], "")]
    stores = [LatentStore(m, TensorCache(tmp_path), make_buckets(64, 16)) for m in (model, other)]
    first, second = (store.latents(store.prepare(image, "data")[0][0]) for store in stores)
    assert not torch.equal(first, second)


def test_a_resumed_run_goes_on_to_the_same_losses(tmp_path):
    whole = sft(tmp_path / "whole", max_steps=6, ema_decay=0.9)
    whole.train()
    sft(tmp_path / "part", max_steps=6, ema_decay=0.9, save_strategy="steps", save_steps=3).train()
    resumed = sft(tmp_path / "part", max_steps=6, ema_decay=0.9)
    resumed.train(resume_from_checkpoint=str(tmp_path / "part/checkpoint-3"))
    assert losses(resumed) == losses(whole)
    for name, parameter in whole.trained_parameters().items():
        assert torch.equal(parameter, resumed.trained_parameters()[name])


def test_every_example_comes_once_an_epoch_in_batches_of_one_size():
    buckets = [Bucket(64, 64)] * 8 + [Bucket(48, 80)] * 4
    sampler = BucketSampler(buckets, batch_size=4, seed=0)
    drawn = list(sampler)
    assert len(drawn) == len(sampler) == 12
    assert sorted(index for index, _ in drawn) == list(range(12))
    assert [place for _, place in drawn] == list(range(12))
    for start in range(0, 12, 4):
        assert len({buckets[index] for index, _ in drawn[start : start + 4]}) == 1
    sampler.set_epoch(1)
    later = list(sampler)
    assert [i for i, _ in later] != [i for i, _ in drawn] and later[0][1] == 12
    again = BucketSampler(buckets, batch_size=4, seed=0)
    assert list(again) == drawn


@pytest.mark.parametrize(("common", "rare", "batch"), [(2000, 8, 16), (37, 1, 8), (3, 3, 32), (10, 3, 4)])
def test_a_rare_shape_is_drawn_no_more_often_than_the_others(common, rare, batch):
    """8 odd-shaped images among 2008 had a fifth of all draws, because they were repeated until they filled a batch."""
    buckets = [Bucket(64, 64)] * common + [Bucket(48, 80)] * rare
    sampler, counts = BucketSampler(buckets, batch, seed=0), Counter()
    for epoch in range(24):
        sampler.set_epoch(epoch)
        drawn = [index for index, _ in sampler]
        for start in range(0, len(drawn), batch):
            assert len({buckets[index] for index in drawn[start : start + batch]}) == 1
        counts.update(drawn)
        fresh = BucketSampler(buckets, batch, seed=0)
        fresh.set_epoch(epoch)
        next(iter(sampler))  # begun and left: an epoch may be asked for again
        assert list(fresh) == list(sampler)
    drawn = [counts[index] for index in range(common + rare)]
    assert sum(drawn) == 24 * len(sampler) and max(drawn) - min(drawn) <= 2 + batch // min(common, rare)


def test_images_of_several_shapes_train_at_several_sizes(tmp_path):
    rows = [
        (Request("wide"), [ImageSource.of(Image.new("RGB", (200, 100), "red"), "wide")], ""),
        (Request("tall"), [ImageSource.of(Image.new("RGB", (100, 200), "blue"), "tall")], ""),
        (Request("square"), [ImageSource.of(Image.new("RGB", (90, 100), "green"), "square")], ""),
    ]
    store = LatentStore(load_model("tiny"), TensorCache(tmp_path), make_buckets(64, 16, 2.0))
    examples, _ = store.prepare(rows, "data")
    assert [e.bucket.width > e.bucket.height for e in examples[:2]] == [True, False]
    for example in examples:
        args = SFTConfig(**settings(tmp_path))
        batch = draw_batch([(example, 0)], store, args, torch.device("cpu"))
        assert batch.latents.shape[2] == example.bucket.height * example.bucket.width // 256
        assert matching_errors(store.model, batch, store.model.transformer).shape == (1, 1)


def test_dropped_captions_become_the_negative_prompt(tmp_path):
    trainer = sft(tmp_path, caption_dropout=0.5)
    rows = [(trainer.train_dataset.examples[0], place) for place in range(200)]
    prompts = [request.prompt for request in trainer._prepare_inputs(rows).requests]
    assert 70 < prompts.count(" ") < 130 and set(prompts) == {" ", trainer.train_dataset.examples[0].request.prompt}


# --- Held-out figures ---


def test_held_out_dpo_figures_equal_hand_numbers(tmp_path):
    """The standard error is of pairs: of all draws it would be too small, since a pair's noise levels move together."""
    run = dpo(tmp_path, eval_sigmas=2)
    # (pairs, levels, errors of chosen and rejected by the policy and by the reference); reward 30 x (reference - policy)
    values = torch.tensor(
        [[[0.9, 1.0, 1.0, 1.0], [0.98, 1.0, 1.0, 1.0]], [[1.0, 0.99, 1.0, 1.0], [0.9, 1.0, 1.0, 1.0]]]
    )
    found = run.held_out_summary(values.double(), "eval")
    margins = [3.0, 0.6, -0.3, 3.0]
    loss = [math.log(1 + math.exp(-m)) for m in margins]
    expected = {
        "eval_num_pairs": 2, "eval_loss": sum(loss) / 4, "eval_accuracy": 0.75, "eval_pair_accuracy": 1.0,
        "eval_loss_se": abs(loss[0] + loss[1] - loss[2] - loss[3]) / 4, "eval_accuracy_se": 0.25,
        "eval_margin": sum(margins) / 4, "eval_chosen_error_to_reference": (0.9 + 0.98 + 1.0 + 0.9) / 4,
        "eval_accuracy_at_0.25": 0.5, "eval_accuracy_at_0.75": 1.0,
    }  # fmt: skip
    assert found == pytest.approx(expected, abs=1e-6)


def test_held_out_sft_figures_equal_hand_numbers(tmp_path):
    """As for DPO: the standard error is of images, and each level's loss has its own name."""
    values = torch.tensor([[[1.0], [3.0]], [[2.0], [6.0]]], dtype=torch.float64)
    found = sft(tmp_path, list(read_captioned(GROUNDED))[:4], eval_sigmas=2).held_out_summary(values, "eval")
    expected = {"eval_loss": 3.0, "eval_loss_se": 1.0, "eval_loss_at_0.25": 1.5, "eval_loss_at_0.75": 4.5}
    assert found == pytest.approx(expected)


def test_the_order_of_the_images_is_that_of_data_seed_and_their_noise_that_of_seed(tmp_path):
    """Without it no two seeds could be compared on the same data, or one seed on other data."""
    data, all_seeds = list(read_captioned(GROUNDED))[:12], ({}, {"data_seed": 8}, {"data_seed": 8, "seed": 4})
    runs = [sft(tmp_path / str(n), data, **seeds) for n, seeds in enumerate(all_seeds)]
    one, other, third = (list(run._get_train_sampler()) for run in runs)
    assert one != other == third
    batches = [run._prepare_inputs([(run.train_dataset.examples[0], 0)]) for run in runs]
    assert torch.equal(batches[0].noise, batches[1].noise) and not torch.equal(batches[1].noise, batches[2].noise)


# --- Bad input ---


def test_a_broken_image_stops_or_is_listed(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    Image.new("RGB", (64, 64), "red").save(folder / "good.png")
    (folder / "bad.png").write_bytes((folder / "good.png").read_bytes()[:60])
    for name in ("good", "bad"):
        (folder / f"{name}.txt").write_text("a picture")
    data = read_captioned(str(folder))
    with pytest.raises(BadRow, match=r"bad\.png.*on_bad_row: skip"):
        sft(tmp_path / "run", data)
    skipping = SFTTrainer(
        load_model("tiny"),
        SFTConfig(**settings(tmp_path / "run")),
        read_captioned(str(folder), on_bad_row="skip"),
        peft_config=lora(),
        on_bad_row="skip",
    )
    assert len(skipping.train_dataset) == 1
    assert len(skipping.store.skipped) == 1 and "bad.png" in skipping.store.skipped[0]


@pytest.mark.parametrize(
    ("config", "wrong", "message"),
    [
        (SFTConfig, {"caption_dropout": 1.5}, r"caption_dropout must lie in \[0, 1\], found 1.5"),
        (SFTConfig, {"max_aspect_ratio": 0.5}, r"max_aspect_ratio must lie in \[1, 100\]"),
        (SFTConfig, {"logit_std": 0.0}, "logit_std must be positive"),
        (DPOConfig, {"beta": 0.0}, "beta must be positive, found 0"),
        (DPOConfig, {"loss_type": "sigmid"}, "loss_type must be one of sigmoid, hinge, ipo, found 'sigmid'"),
        (DPOConfig, {"label_smoothing": 0.5}, r"label_smoothing must lie in \[0, 0.5\)"),
        (DPOConfig, {"label_smoothing": 0.1, "loss_type": "ipo"}, "belongs to loss_type sigmoid"),
        (DPOConfig, {"sft_weight": -1.0}, "sft_weight must be at least 0"),
    ],
)
def test_a_wrong_setting_is_named(tmp_path, config, wrong, message):
    with pytest.raises(ValueError, match=message):
        config(**settings(tmp_path, **wrong))


# --- The chain: preferences made, trained on, exported ---


def test_preferences_are_made_resumed_and_trained_on(tmp_path):
    from datasets import Dataset

    prompts = Dataset.from_dict({"prompt": ["two circles", "a cross", "blue squares"]})
    rewards = load_rewards("brightness:score")
    args = GenerateArguments(dataset_name="-", output_dir="-", num_generations=3, height=64, width=64)
    args.num_inference_steps, args.rollout_batch_size = 3, 6  # two prompts a batch
    model = load_model("tiny")

    def make(folder, process):
        with RankedWriter(folder, shard=process, rows_per_file=1, rewards=["score"]) as writer:
            return generate(model, prompts, rewards, args, writer, process)

    # The first of two processes did its share and the other died: one process does the rest.
    assert make(tmp_path / "twice", (0, 2)) == 2 and make(tmp_path / "twice", (0, 1)) == 1
    assert make(tmp_path / "once", (0, 1)) == 3 and make(tmp_path / "once", (0, 1)) == 0
    sets = [sorted(read_preferences(tmp_path / name), key=lambda row: row.prompt) for name in ("once", "twice")]
    for one, other in zip(*sets, strict=True):
        assert (one.prompt, one.scores) == (other.prompt, other.scores)
        assert [i.digest() for i in one.images] == [i.digest() for i in other.images]
    pairs = build_pairs(read_preferences(tmp_path / "once"))
    trainer = dpo(tmp_path / "run", pairs, max_steps=2)
    trainer.train()
    trainer.finish("tiny", "made pairs")
    stock = QwenImagePipeline.from_pretrained(CHECKPOINT)
    stock.load_lora_weights(tmp_path / "run")
    assert "(DPO)" in (tmp_path / "run/README.md").read_text()
    assert json.loads((tmp_path / "run/trainer_state.json").read_text())["global_step"] == 2


@pytest.mark.parametrize("make", [sft, dpo])
def test_dropout_is_of_training_alone(tmp_path, make):
    """The loss at fixed noise once moved by 3 % between two looks at the same weights."""
    run = make(tmp_path, peft_config=LoraConfig(r=4, lora_dropout=0.5, init_lora_weights=False), eval_dataset=True)
    run.model.train()
    first, second = (run.evaluate() for _ in range(2))
    assert first["eval_loss"] == second["eval_loss"]
    assert run.model.training


def test_each_algorithm_starts_from_what_the_last_one_left(tmp_path):
    first = sft(tmp_path / "sft")
    first.train()
    first.finish("tiny", "grounded")
    model = load_model("tiny")
    model.load_adapter(tmp_path / "sft")
    second = DPOTrainer(model, DPOConfig(**settings(tmp_path / "dpo", beta=60.0)), some_pairs())
    for name, parameter in first.trained_parameters().items():
        assert torch.equal(parameter, second.trained_parameters()[name]), name
    second.train()
    # The reference is the adapter that training started from, not the bare model: so the first loss is log 2.
    assert losses(second)[0] == pytest.approx(math.log(2), abs=1e-6)


def test_what_the_data_are_is_said_before_training_and_on_the_card(tmp_path, caplog):
    """Three of ten pictures were trained on, captions of 1,400 tokens were cut, three quarters of an image cropped: no word."""
    folder = tmp_path / "data"
    folder.mkdir()
    for name, size in (("a.png", (64, 64)), ("b.jpg", (256, 64)), ("c.png", (32, 32)), ("same.png", (64, 64))):
        Image.new("RGB", size, "red").save(folder / name)
        (folder / name).with_suffix(".txt").write_text("red " * (600 if name == "a.png" else 3))
    (folder / "d.heic").write_bytes(b"x")
    run = sft(tmp_path / "run", read_captioned(str(folder)), max_steps=1)
    told = [
        "training data: 4",
        "captions from .txt: 4",
        "1 texts are longer than the 512 tokens that are read, the longest 605: what comes after has no effect",
        "trained at (width x height) 96x48: 1, 64x64: 3",
        "32.0% of the pixels are cropped away; 1 images lose more than 20%",
        "1 images are enlarged, the smallest 2.0 times",
        "1 images are the same as an earlier one",
        f"left out, .heic is not read: 1 ({folder / 'd.heic'})",
    ]
    assert run.told == told and all(line in caplog.text for line in told)
    run.train()
    run.finish("tiny", str(folder))
    card = (tmp_path / "run" / "README.md").read_text()
    assert "- training data: 4\n- captions from .txt: 4\n" in card and "d.heic" in card


def test_a_filter_that_leaves_no_pair_says_how_many_it_took(tmp_path):
    pairs = build_pairs([replace(pair, margin=1.0) for pair in some_pairs()], min_margin=1e9)
    with pytest.raises(BadRow, match="training data: holds nothing to train on; left out, pairs: below margin: 4"):
        dpo(tmp_path, pairs)
