"""The VAE sped up for single images against diffusers' own, on the tiny one and on one of the true VAE's make."""

import copy

import pytest
import torch
from diffusers.models import AutoencoderKLQwenImage

from align.models.families import load_model
from align.models.qwen_vae import SingleFrameConv3d, speed_up_images
from align.tiny import CHECKPOINT


def random_vae() -> AutoencoderKLQwenImage:
    """The default configuration of diffusers, Qwen-Image's, but for its width."""
    torch.manual_seed(0)
    return AutoencoderKLQwenImage(base_dim=8).eval()


def tiny_vae() -> AutoencoderKLQwenImage:
    return AutoencoderKLQwenImage.from_pretrained(CHECKPOINT / "vae").eval()


def sped_up(vae: AutoencoderKLQwenImage) -> AutoencoderKLQwenImage:
    other = copy.deepcopy(vae)
    speed_up_images(other)
    assert sum(isinstance(module, SingleFrameConv3d) for module in other.modules()) > 20
    assert not any(isinstance(module, SingleFrameConv3d) for module in vae.modules())
    return other


def close(a: torch.Tensor, b: torch.Tensor) -> None:
    assert a.shape == b.shape
    assert (a - b).abs().max() <= 1e-4 * b.abs().max()


def test_a_model_decodes_fast_and_encodes_as_stock():
    vae = load_model("tiny").pipeline.vae
    assert any(isinstance(module, SingleFrameConv3d) for module in vae.decoder.modules())
    assert not any(isinstance(module, SingleFrameConv3d) for module in vae.encoder.modules())


@pytest.mark.parametrize("make", [tiny_vae, random_vae])
@torch.no_grad()
def test_one_frame_is_coded_as_by_the_stock_vae(make):
    vae = make()
    ours = sped_up(vae)
    pixels = torch.rand(2, 3, 1, 48, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1
    latents = vae.encode(pixels).latent_dist.mode()
    assert latents.std() > 0.1
    close(ours.encode(pixels).latent_dist.mode(), latents)
    decoded = vae.decode(latents).sample
    assert decoded.std() > 0.01
    close(ours.decode(latents).sample, decoded)


@torch.no_grad()
def test_several_frames_are_coded_as_by_the_stock_vae():
    vae = random_vae()
    frames = torch.rand(1, 3, 9, 32, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1
    latents = vae.encode(frames).latent_dist.mode()
    assert latents.shape[2] == 3
    close(sped_up(vae).encode(frames).latent_dist.mode(), latents)
    close(sped_up(vae).decode(latents).sample, vae.decode(latents).sample)


def test_gradients_are_those_of_the_stock_vae():
    vae = random_vae()
    ours = sped_up(vae)
    latents = torch.randn(1, 16, 1, 4, 4, generator=torch.Generator().manual_seed(1))
    for each in (vae, ours):
        each.decode(latents).sample.square().sum().backward()
    weights = [p.grad for p in vae.decoder.parameters() if p.grad is not None]
    assert len(weights) > 40
    for stock, fast in zip(weights, (p.grad for p in ours.decoder.parameters() if p.grad is not None), strict=True):
        assert (stock - fast).abs().max() <= 1e-4 * stock.abs().max() + 1e-6


def test_weights_are_saved_as_before_and_load_in_the_stock_class(tmp_path):
    vae = tiny_vae()
    sped_up(vae).save_pretrained(tmp_path)
    loaded = AutoencoderKLQwenImage.from_pretrained(tmp_path).state_dict()
    assert loaded.keys() == vae.state_dict().keys()
    assert all(torch.equal(loaded[name], weight) for name, weight in vae.state_dict().items())
