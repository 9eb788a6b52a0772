"""Qwen-Image against stock diffusers, on the embedded model."""

from pathlib import Path

import numpy as np
import pytest
import torch
from asking import ask
from diffusers import QwenImagePipeline
from peft import LoraConfig

from align.models.families import load_model
from align.models.qwen_image import QwenImage
from align.sampling.noise import ImageKey
from align.sampling.rollout import SamplingPlan, rollout
from align.tiny import CHECKPOINT

PROMPTS = ["a circle", "three red circles on a blue background", "the word CAT in red on white", "two objects"]


def keys(count: int) -> list[ImageKey]:
    return [ImageKey(0, 0, i, 0) for i in range(count)]


def some_velocity(model: QwenImage, prompts: list[str], sigma: float = 0.7, **kwargs) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(len(prompts), *model.latent_shape(64, 64), generator=generator)
    sigmas = torch.full((len(prompts),), sigma)
    return model.velocity(latents, sigmas, model.encode(ask(prompts)), height=64, width=64, **kwargs)


@pytest.mark.parametrize("guidance_scale", [1.0, 4.0])
@pytest.mark.parametrize("size", [(64, 64), (64, 96)])
def test_deterministic_rollout_is_the_stock_pipeline(tiny, guidance_scale, size):
    height, width = size
    plan = SamplingPlan(height, width, num_inference_steps=7, guidance_scale=guidance_scale, batch_size=8)
    start = torch.randn(len(PROMPTS), *tiny.latent_shape(*size), generator=torch.Generator().manual_seed(3))
    ours = rollout(tiny, ask(PROMPTS), keys(len(PROMPTS)), plan, initial_latents=start)
    stock = QwenImagePipeline.from_pretrained(CHECKPOINT, dtype=torch.float32)
    stock.set_progress_bar_config(disable=True)
    call = {
        "prompt": PROMPTS,
        "negative_prompt": [" "] * len(PROMPTS) if guidance_scale > 1 else None,
        "true_cfg_scale": guidance_scale,
        "num_inference_steps": 7,
        "height": height,
        "width": width,
    }
    latents = stock(latents=start.clone(), output_type="latent", **call).images
    pictures = stock(latents=start.clone(), output_type="np", **call).images
    assert (ours.latents - latents).abs().max() < 1e-5
    mine = np.stack([np.asarray(image) for image in ours.images]) / 255.0
    assert np.abs(mine - pictures).max() <= 0.5 / 255 + 1e-5  # PIL images are rounded to a byte


def test_sigmas_are_the_stock_schedule(tiny):
    sigmas = tiny.sigmas(10, 64, 64)
    assert sigmas.shape == (11,)
    assert sigmas[0] == 1 and sigmas[-1] == 0
    assert (sigmas.diff() < 0).all()


def test_velocity_of_a_prompt_does_not_depend_on_what_it_is_batched_with(tiny):
    together = some_velocity(tiny, PROMPTS)
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(len(PROMPTS), *tiny.latent_shape(64, 64), generator=generator)
    for row, prompt in enumerate(PROMPTS):
        alone = tiny.velocity(
            latents[row : row + 1], torch.tensor([0.7]), tiny.encode(ask([prompt])), height=64, width=64
        )
        assert (alone[0] - together[row]).abs().max() < 1e-5


def test_guidance_needs_a_negative_prompt(tiny):
    with pytest.raises(ValueError, match="negative prompt"):
        some_velocity(tiny, PROMPTS, guidance_scale=2.0)


def test_each_distinct_prompt_is_encoded_once(tiny):
    seen = []
    tiny.pipeline.text_encoder.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    first = tiny.encode(ask(["a circle", "a square", "a circle"]))
    again = tiny.encode(ask(["a square", "a circle", "a cross"]))
    assert seen == [1, 1, 1]
    assert torch.equal(first[0].embeds, again[1].embeds)
    assert torch.equal(first[0].embeds, first[2].embeds)


def test_encode_and_decode_images_invert_each_other(tiny):
    plan = SamplingPlan(64, 64, num_inference_steps=6, batch_size=8)
    drawn = rollout(tiny, ask(PROMPTS), keys(len(PROMPTS)), plan)
    latents = tiny.encode_images(drawn.images, 64, 64)
    assert latents.shape == drawn.latents.shape
    again = tiny.decode_latents(latents, 64, 64)
    error = np.mean(
        [(np.asarray(a, float) - np.asarray(b, float)) ** 2 for a, b in zip(again, drawn.images, strict=True)]
    )
    assert 10 * np.log10(255**2 / error) > 20  # dB: the VAE's own reconstruction error, not a layout error


@pytest.mark.parametrize("size", [(65, 64), (64, 8), (0, 64)])
def test_resolution_that_does_not_divide_is_refused(tiny, size):
    with pytest.raises(ValueError, match="positive multiple of 16"):
        tiny.latent_shape(*size)


# -- what is trained ---------------------------------------------------------------------------------------------------


def gradients(model: QwenImage) -> dict[str, float]:
    some_velocity(model, PROMPTS).square().mean().backward()
    trained = {n: p for n, p in model.transformer.named_parameters() if p.requires_grad}
    return {name: 0.0 if p.grad is None else p.grad.abs().max().item() for name, p in trained.items()}


def test_parameters_named_dead_are_exactly_those_without_gradient(tiny):
    named = set(tiny.unfreeze())
    for name, parameter in tiny.transformer.named_parameters():
        parameter.requires_grad_(True)
        if "norm_added_q" in name or "bias" in name:
            continue
    without = {name for name, largest in gradients(tiny).items() if largest == 0.0}
    assert without == named


def test_full_fine_tune_leaves_dead_parameters_frozen(tiny):
    dead = tiny.unfreeze()
    assert all(largest > 0 for largest in gradients(tiny).values())
    assert not any(p.requires_grad for n, p in tiny.transformer.named_parameters() if n in dead)


def test_lora_leaves_out_dead_layers_and_says_so(tiny):
    dead = tiny.add_lora(LoraConfig(r=4, lora_alpha=8))
    assert dead == ["transformer_blocks.3.attn.add_q_proj", "transformer_blocks.3.attn.to_add_out"]
    trained = [n for n, p in tiny.transformer.named_parameters() if p.requires_grad]
    assert trained and all("lora_" in name for name in trained)
    assert not any(name.startswith(d) for name in trained for d in dead)
    # B starts at 0, so A gets no gradient at the very first step; every B must.
    assert all(largest > 0 for name, largest in gradients(tiny).items() if "lora_B" in name)


@pytest.mark.parametrize(("target", "hint"), [("to_qq", "to_q"), ("txt_mlp.net.2.proj", "txt_mlp.net.0.proj")])
def test_lora_target_that_matches_nothing_is_an_error_with_the_nearest(tiny, target, hint):
    with pytest.raises(ValueError, match=f"matches no linear layer.*'{hint}'"):
        tiny.add_lora(LoraConfig(target_modules=["to_q", target]))


def test_lora_on_dead_layers_only_is_an_error(tiny):
    with pytest.raises(ValueError, match="never get a gradient"):
        tiny.add_lora(LoraConfig(target_modules=["transformer_blocks.3.attn.to_add_out"]))


def test_lora_targets_may_be_a_regular_expression(tiny):
    dead = tiny.add_lora(
        LoraConfig(target_modules=r".*\.attn\.(to_q|to_add_out)", exclude_modules=r"transformer_blocks\.0\..*")
    )
    assert dead == ["transformer_blocks.3.attn.to_add_out"]
    adapted = {n.split(".lora_")[0] for n, p in tiny.transformer.named_parameters() if p.requires_grad}
    assert adapted == {f"transformer_blocks.{b}.attn.{m}" for b in (1, 2, 3) for m in ("to_q", "to_add_out")} - set(
        dead
    )


def perturb(model: QwenImage, scale: float = 0.05) -> None:
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.transformer.parameters():
            if parameter.requires_grad:
                parameter.add_(scale * torch.randn(parameter.shape, generator=generator))


def trained_state(model: QwenImage) -> dict[str, torch.Tensor]:
    return {n: p.detach() for n, p in model.transformer.named_parameters() if p.requires_grad}


def test_reference_is_the_base_with_the_adapter_off(tiny):
    base = some_velocity(tiny, PROMPTS)
    tiny.add_lora(LoraConfig(r=4, lora_alpha=8))
    tiny.keep_reference()
    perturb(tiny)
    moved = some_velocity(tiny, PROMPTS)
    with tiny.reference(tiny.transformer) as module:
        reference = some_velocity(tiny, PROMPTS, transformer=module)
    assert torch.equal(reference, base)
    assert (moved - base).abs().max() > 1e-3
    assert torch.equal(some_velocity(tiny, PROMPTS), moved)
    assert all(p.requires_grad for n, p in tiny.transformer.named_parameters() if "lora_" in n)


def test_reference_of_a_full_fine_tune_is_a_frozen_copy(tiny):
    base = some_velocity(tiny, PROMPTS)
    tiny.unfreeze()
    with pytest.raises(RuntimeError, match="no reference"), tiny.reference(tiny.transformer):
        pass
    tiny.keep_reference()
    perturb(tiny)
    with tiny.reference(tiny.transformer) as module:
        assert torch.equal(some_velocity(tiny, PROMPTS, transformer=module), base)
        assert not any(p.requires_grad for p in module.parameters())


def test_saved_lora_loads_in_stock_diffusers_with_its_strength(tiny, tmp_path):
    tiny.add_lora(LoraConfig(r=4, lora_alpha=12))  # alpha is neither the rank nor twice it
    perturb(tiny)
    tiny.save(tmp_path, trained_state(tiny))
    stock = QwenImagePipeline.from_pretrained(CHECKPOINT, dtype=torch.float32)
    stock.load_lora_weights(tmp_path)
    torch.testing.assert_close(some_velocity(QwenImage(stock), PROMPTS), some_velocity(tiny, PROMPTS))


def test_training_goes_on_from_a_saved_adapter_and_refers_to_it(tiny, tmp_path):
    tiny.add_lora(LoraConfig(r=4, lora_alpha=8))
    perturb(tiny)
    tiny.save(tmp_path, trained_state(tiny))
    started = some_velocity(tiny, PROMPTS)

    other = load_model("tiny")
    other.load_adapter(tmp_path)
    other.keep_reference()
    assert trained_state(other).keys() == trained_state(tiny).keys()
    assert torch.equal(some_velocity(other, PROMPTS), started)
    perturb(other)
    with other.reference(other.transformer) as module:
        assert torch.equal(some_velocity(other, PROMPTS, transformer=module), started)
    assert (some_velocity(other, PROMPTS) - started).abs().max() > 1e-3
    assert trained_state(other).keys() == trained_state(tiny).keys()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_policy_and_reference_start_from_the_file_itself_in_any_precision(tiny, tmp_path, dtype):
    """In bfloat16 the first loss of online DPO was 0.466 where the two are the same and it is log 2."""
    tiny.add_lora(LoraConfig(r=4, lora_alpha=8))
    perturb(tiny)
    saved = trained_state(tiny)
    tiny.save(tmp_path, saved)
    model = load_model("tiny", dtype)
    model.load_adapter(tmp_path)
    model.keep_reference()
    assert all(torch.equal(tensor, saved[name]) for name, tensor in trained_state(model).items())
    policy = some_velocity(model, PROMPTS)
    with model.reference(model.transformer) as module:
        assert torch.equal(some_velocity(model, PROMPTS, transformer=module), policy)


def test_nothing_is_dropped_from_a_sample_or_from_the_reference(tiny, tmp_path):
    """An adapter that was saved with dropout comes back with it, and training leaves the model in its mode."""
    tiny.add_lora(LoraConfig(r=4, lora_alpha=8, lora_dropout=0.5))
    perturb(tiny)
    tiny.save(tmp_path, trained_state(tiny))
    tiny.transformer.eval()
    started = some_velocity(tiny, PROMPTS)

    other = load_model("tiny")
    other.load_adapter(tmp_path)
    other.keep_reference()
    other.transformer.train()
    assert (some_velocity(other, PROMPTS) - started).abs().max() > 1e-2  # as a loss sees it
    with other.reference(other.transformer) as module:
        assert torch.equal(some_velocity(other, PROMPTS, transformer=module), started)
    plan = SamplingPlan(64, 64, 2)
    drawn = [rollout(model, ask(PROMPTS), keys(4), plan).latents for model in (tiny, other)]
    assert torch.equal(*drawn)
    assert any(m.training for m in other.transformer.modules() if isinstance(m, torch.nn.Dropout))


def test_saved_full_fine_tune_loads_in_stock_diffusers(tiny, tmp_path):
    tiny.unfreeze()
    perturb(tiny, 0.01)
    tiny.save(tmp_path, {name: p.detach() for name, p in tiny.transformer.named_parameters()})  # the frozen ones too
    loaded = type(tiny.transformer).from_pretrained(Path(tmp_path) / "transformer")
    assert torch.equal(some_velocity(tiny, PROMPTS, transformer=loaded), some_velocity(tiny, PROMPTS))


def test_an_adapter_and_a_full_fine_tune_exclude_each_other(tiny):
    tiny.add_lora(LoraConfig(r=4))
    with pytest.raises(ValueError, match="adapter is attached"):
        tiny.unfreeze()


def test_lora_weights_are_float32_on_a_half_precision_base():
    model = load_model("tiny", torch.bfloat16)
    model.add_lora(LoraConfig(r=4))
    assert {p.dtype for p in model.transformer.parameters() if p.requires_grad} == {torch.float32}
    velocity = some_velocity(model, PROMPTS)
    assert velocity.dtype == torch.float32
    full = some_velocity(load_model("tiny"), PROMPTS)
    assert (velocity - full).abs().mean() / full.abs().mean() < 0.05
