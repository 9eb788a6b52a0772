"""What SFT and DPO leave, against stock diffusers; full fine-tunes; and caches filled by another model."""

import math

import pytest
import torch
from asking import ask
from diffusers import QwenImagePipeline, QwenImageTransformer2DModel
from matching_runs import GROUNDED, lora, losses, settings, sft, some_pairs

from align.dpo import DPOConfig, DPOTrainer, dpo_errors
from align.engine.matching import matching_errors
from align.models.families import load_model
from align.offline.examples import draw_batch
from align.sampling.noise import ImageKey
from align.sampling.rollout import SamplingPlan, rollout
from align.sft import SFTConfig, SFTTrainer
from align.tiny import CHECKPOINT
from preference_data.readers import read_captioned

PROMPTS = ["a red circle on a white background", "two crosses", "the word FLOW"]  # of different lengths


def full(algorithm: str, folder, **overrides):
    """A full fine-tune."""
    model, more = load_model("tiny"), {"learning_rate": 1e-3, **overrides}
    if algorithm == "sft":
        return SFTTrainer(model, SFTConfig(**settings(folder, **more)), read_captioned(GROUNDED))
    return DPOTrainer(model, DPOConfig(**settings(folder, beta=60.0, **more)), some_pairs())


def test_a_style_lora_draws_the_same_images_in_a_stock_pipeline(tmp_path):
    trainer = sft(tmp_path, max_steps=8, learning_rate=1e-2)
    trainer.train()
    trainer.finish("tiny", "grounded")
    keys = [ImageKey(0, "test", number, 0) for number in range(len(PROMPTS))]
    noise = torch.randn(len(PROMPTS), 16, 64, generator=torch.Generator().manual_seed(1))
    for scale in (1.0, 3.0):
        plan = SamplingPlan(height=64, width=64, num_inference_steps=4, guidance_scale=scale, negative_prompt="blurry")
        bare, ours = (
            rollout(model, ask(PROMPTS), keys, plan, initial_latents=noise).latents
            for model in (load_model("tiny"), trainer.flow)
        )
        stock = QwenImagePipeline.from_pretrained(CHECKPOINT, dtype=torch.float32)
        stock.load_lora_weights(tmp_path)
        stock.set_progress_bar_config(disable=True)
        theirs = stock(
            PROMPTS,
            negative_prompt=["blurry"] * len(PROMPTS),
            true_cfg_scale=scale,
            height=64,
            width=64,
            num_inference_steps=4,
            latents=noise.clone(),
            output_type="latent",
        ).images
        assert (ours - theirs).abs().max() < 1e-4
        assert (ours - bare).abs().max() > 0.01  # the style is something


@pytest.mark.parametrize("algorithm", ["sft", "dpo"])
def test_a_full_fine_tune_loads_in_stock_diffusers(tmp_path, algorithm):
    trainer = full(algorithm, tmp_path)
    trainer.train()
    trainer.finish("tiny", "data")
    assert not list(tmp_path.glob("*lora*"))
    stock = QwenImageTransformer2DModel.from_pretrained(tmp_path / "transformer")
    bare, trained = load_model("tiny"), trainer.flow
    assert stock.state_dict().keys() == bare.transformer.state_dict().keys()
    generator = torch.Generator().manual_seed(0)
    latents, sigma = torch.randn(3, 16, 64, generator=generator), torch.tensor([0.9, 0.5, 0.1])
    with torch.no_grad():
        velocities = [
            model.velocity(latents, sigma, bare.encode(ask(PROMPTS)), height=64, width=64, transformer=transformer)
            for model, transformer in ((trained, trained.transformer), (bare, stock), (bare, bare.transformer))
        ]
    assert torch.equal(velocities[0], velocities[1])
    assert (velocities[0] - velocities[2]).abs().max() > 1e-3


def test_the_reference_of_a_full_dpo_run_is_the_frozen_start(tmp_path):
    trainer = full("dpo", tmp_path, max_steps=2)
    batch = draw_batch([(trainer.train_dataset.examples[0], 0)], trainer.store, trainer.args, torch.device("cpu"))
    bare = load_model("tiny")
    with torch.no_grad():
        start = matching_errors(bare, batch, bare.transformer)
        before = dpo_errors(trainer.flow, batch, trainer.model, trainer.accelerator.autocast)
    trainer.train()
    with torch.no_grad():
        after = dpo_errors(trainer.flow, batch, trainer.model, trainer.accelerator.autocast)
    assert losses(trainer)[0] == pytest.approx(math.log(2), abs=1e-6)
    assert torch.equal(before[0], start) and torch.equal(before[1], start) and torch.equal(after[1], start)
    assert not torch.equal(after[0], start)
    assert losses(trainer)[1] != pytest.approx(math.log(2), abs=1e-6)


@pytest.mark.parametrize("part", ["vae", "text_encoder"])
def test_a_run_uses_nothing_that_another_model_has_cached(tmp_path, part):
    def trained(name: str, cache: str, changed: bool) -> list[float]:
        model = load_model("tiny")
        if changed:
            with torch.no_grad():
                for parameter in getattr(model.pipeline, part).parameters():
                    parameter.mul_(1.05)
        args = SFTConfig(**settings(tmp_path / name, cache_dir=cache, max_steps=2))
        trainer = SFTTrainer(model, args, list(read_captioned(GROUNDED))[:8], peft_config=lora())
        trainer.train()
        return losses(trainer)

    shared = str(tmp_path / "shared")
    first = trained("first", shared, changed=False)
    other = trained("other", shared, changed=True)
    assert other == trained("alone", "none", changed=True) and other != first
    assert first == trained("again", shared, changed=False)  # its own entries are still there
