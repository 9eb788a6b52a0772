"""Build and train the VAE of the tiny model: an AutoencoderKLQwenImage of 0.7 M parameters.

The Qwen-Image VAE is made for video. Its convolutions are causal in time, and a single frame is multiplied only
with the last of their three temporal taps. So these taps are trained as 2-D convolutions and copied back
afterwards; the other taps are zero. For one frame the result is exact, and two to three times faster.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLQwenImage
from diffusers.models.autoencoders.autoencoder_kl_qwenimage import (
    QwenImageAttentionBlock,
    QwenImageCausalConv3d,
    QwenImageResidualBlock,
)
from PIL import Image
from tqdm import trange

CHANNELS = 16  # channels of the latents
SCALE = 8  # pixels of the image along each side of one latent


def build_vae() -> AutoencoderKLQwenImage:
    """Build an untrained VAE, which maps 64 x 64 pixels to latents of 16 x 8 x 8."""
    return AutoencoderKLQwenImage(
        base_dim=8,
        z_dim=CHANNELS,
        dim_mult=[1, 2, 4, 4],
        num_res_blocks=1,
        attn_scales=[],
        temperal_downsample=[False, True, True],
        latents_mean=[0.0] * CHANNELS,
        latents_std=[1.0] * CHANNELS,
    )


def to_pixels(images: Sequence[Image.Image]) -> torch.Tensor:
    """Convert images to a tensor (batch, 3, 1 frame, height, width) with values in [-1, 1]."""
    stacked = torch.from_numpy(np.stack([np.asarray(image) for image in images]))
    return (stacked.permute(0, 3, 1, 2).float() / 127.5 - 1).unsqueeze(2)


def to_images(pixels: torch.Tensor) -> list[Image.Image]:
    """Convert pixels back to images, clipped to [-1, 1]; the inverse of `to_pixels`."""
    scaled = ((pixels[:, :, 0].clamp(-1, 1) + 1) * 127.5).round().byte()
    return [Image.fromarray(image) for image in scaled.permute(0, 2, 3, 1).numpy()]


def _frame_forward(conv: QwenImageCausalConv3d, kernel: torch.Tensor, x: torch.Tensor, cache_x=None) -> torch.Tensor:
    """Compute the causal convolution of one frame as a 2-D convolution.

    `x` is (batch, in, 1, height, width), `kernel` is (out, in * kernel height * kernel width). `cache_x` is unused:
    diffusers passes it to the method that this one replaces.
    """
    _, channels, _, height, width = conv.weight.shape
    pad = (conv._padding[2], conv._padding[0])
    y = F.conv2d(x[:, :, 0], kernel.view(-1, channels, height, width), conv.bias, conv.stride[1:], pad)
    return y.unsqueeze(2)


@contextlib.contextmanager
def one_frame(vae: AutoencoderKLQwenImage) -> Iterator[list[torch.nn.Parameter]]:
    """Replace the VAE's causal convolutions by 2-D convolutions of single frames, until the block ends.

    Yields the 2-D kernels as matrices, which may be trained; at the end they are copied back into the VAE.
    """
    kernels = {}
    for module in vae.modules():
        # The convolutions in time alone (kernel 3 x 1 x 1) never act on a single frame.
        if isinstance(module, QwenImageCausalConv3d) and module.stride[0] == 1:
            kernels[module] = torch.nn.Parameter(module.weight[:, :, -1].detach().flatten(1).clone())
            module.forward = functools.partial(_frame_forward, module, kernels[module])
    try:
        yield list(kernels.values())
    finally:
        for module, kernel in kernels.items():
            del module.forward  # uncovers the method of the class
            with torch.no_grad():
                module.weight[:, :, -1] = kernel.view_as(module.weight[:, :, -1])


def _initialise(vae: AutoencoderKLQwenImage, seed: int) -> None:
    """Initialise the weights in place, seeded.

    The last temporal tap of each convolution preserves variance, the other taps are zero, and the residual branches
    start small.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in vae.modules():
            if not isinstance(module, (QwenImageCausalConv3d, torch.nn.Conv2d)):
                continue
            weight = module.weight
            if isinstance(module, QwenImageCausalConv3d):
                weight.zero_()
                weight = weight[:, :, -1]
            weight.copy_(torch.randn(weight.shape, generator=generator) / weight[0].numel() ** 0.5)
            if module.bias is not None:
                module.bias.zero_()
        for module in vae.modules():
            if isinstance(module, QwenImageResidualBlock):
                module.conv2.weight.mul_(0.3)
            elif isinstance(module, QwenImageAttentionBlock):
                module.proj.weight.mul_(0.1)
        vae.decoder.conv_out.weight.mul_(0.3)


def _decode(vae: AutoencoderKLQwenImage, latents: torch.Tensor) -> torch.Tensor:
    """Decode latents to pixels, without the clipping of `vae.decode`, which would stop gradients."""
    vae.clear_cache()
    return vae.decoder(vae.post_quant_conv(latents), feat_cache=vae._feat_map, feat_idx=[0])


def train_vae(
    vae: AutoencoderKLQwenImage,
    images: Sequence[Image.Image],
    steps: int,
    batch_size: int = 32,
    learning_rate: float = 2e-3,
    muon_learning_rate: float = 0.03,
    kl_weight: float = 5e-4,
    seed: int = 0,
) -> None:
    """Train the VAE in place.

    The loss is mean absolute error + mean squared error + kl_weight * KL. The first 85 % of the steps use crops of
    32 x 32 pixels, which are faster.
    """
    _initialise(vae, seed)
    pixels, generator = to_pixels(images), torch.Generator().manual_seed(seed)
    crop, size = 32, pixels.shape[-1]
    with one_frame(vae) as kernels:
        # Muon is for maps between hidden features, which the first and the last layer are not.
        hidden_kernels = [k for k in kernels if min(k.shape) >= 8 and k.shape[1] != 27]
        hidden_ids = {id(p) for p in hidden_kernels}
        other_parameters = [p for p in (*kernels, *vae.parameters()) if id(p) not in hidden_ids]
        optimizers = [
            torch.optim.AdamW(other_parameters, lr=learning_rate, betas=(0.9, 0.99), weight_decay=0.0),
            torch.optim.Muon(hidden_kernels, lr=muon_learning_rate, weight_decay=0.0),
        ]
        schedule = lambda step: min(1.0, (step + 1) / 50) * (0.51 + 0.49 * np.cos(np.pi * step / steps))  # noqa: E731
        schedulers = [torch.optim.lr_scheduler.LambdaLR(optimizer, schedule) for optimizer in optimizers]
        for step in (progress := trange(steps, desc="VAE", mininterval=5)):
            batch = pixels[torch.randint(len(pixels), (batch_size,), generator=generator)]
            if step < 0.85 * steps:
                top, left = (4 * torch.randint((size - crop) // 4 + 1, (2,), generator=generator)).tolist()
                batch = batch[..., top : top + crop, left : left + crop]
            posterior = vae.encode(batch).latent_dist
            error = _decode(vae, posterior.sample(generator=generator)) - batch
            loss = error.abs().mean() + error.square().mean() + kl_weight * posterior.kl().mean()
            loss.backward()
            torch.nn.utils.clip_grad_norm_([*kernels, *vae.parameters()], 1.0)
            for optimizer, scheduler in zip(optimizers, schedulers, strict=True):
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad(set_to_none=True)
            if step % 100 == 99:
                progress.set_postfix(psnr=f"{-10 * np.log10(error.square().mean().item() / 4):.1f} dB")


@torch.no_grad()
def encode(vae: AutoencoderKLQwenImage, images: Sequence[Image.Image], batch_size: int = 64) -> torch.Tensor:
    """Encode images to latents (batch, CHANNELS, 1, height / SCALE, width / SCALE), not normalised."""
    with one_frame(vae):
        return torch.cat(
            [
                vae.encode(to_pixels(images[i : i + batch_size])).latent_dist.mode()
                for i in range(0, len(images), batch_size)
            ]
        )


@torch.no_grad()
def decode(vae: AutoencoderKLQwenImage, latents: torch.Tensor, batch_size: int = 64) -> list[Image.Image]:
    """Decode latents, as `encode` returns them, to images."""
    with one_frame(vae):
        return [image for batch in latents.split(batch_size) for image in to_images(vae.decode(batch).sample)]


def psnr(images: Sequence[Image.Image], others: Sequence[Image.Image]) -> float:
    """Return the mean peak signal-to-noise ratio between pairs of images, in dB."""
    error = (to_pixels(images) - to_pixels(others)).square().mean((1, 2, 3, 4)) / 4
    return float(-10 * error.clamp_min(1e-10).log10().mean())
