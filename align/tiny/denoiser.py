"""Build the denoiser of the tiny model, a QwenImageTransformer2DModel, and train it by flow matching.

Four things let it follow prompts after so little training: pictures that vary little, Muon for the matrices inside
the blocks, mostly high noise levels, at which the composition is decided, and a learning rate that decays to zero.
"""

from __future__ import annotations

import random
from collections.abc import Callable

import torch
import torch.nn.functional as F
from diffusers import FlowMatchEulerDiscreteScheduler, QwenImagePipeline, QwenImageTransformer2DModel
from tqdm import trange

from align.tiny.text import WIDTH
from align.tiny.vae import CHANNELS, SCALE
from align.tiny.world import open_up, sentence
from rewards.shapes import SIZE

UNPROMPTED = " "  # the empty prompt; also the negative prompt of classifier-free guidance
GRID = SIZE // SCALE // 2  # tokens along each side of an image: 2 x 2 latents make one token


def build_denoiser(seed: int = 0) -> QwenImageTransformer2DModel:
    """Build an untrained MMDiT of 2.5 M parameters, whose blocks start as the identity and whose output is zero."""
    denoiser = QwenImageTransformer2DModel(
        patch_size=2,
        in_channels=4 * CHANNELS,
        out_channels=CHANNELS,
        num_layers=4,
        attention_head_dim=32,
        num_attention_heads=4,
        joint_attention_dim=WIDTH,
        guidance_embeds=False,
        axes_dims_rope=(8, 12, 12),
    )
    generator = torch.Generator().manual_seed(seed)
    zero_layers = [denoiser.norm_out.linear, denoiser.proj_out]
    for block in denoiser.transformer_blocks:
        zero_layers += [block.img_mod[1], block.txt_mod[1]]
    for name, parameter in denoiser.named_parameters():
        if parameter.dim() == 2:
            torch.nn.init.xavier_uniform_(parameter, generator=generator)
        elif name.endswith("bias"):
            torch.nn.init.zeros_(parameter)
    for layer in zero_layers:
        torch.nn.init.zeros_(layer.weight)
    return denoiser


def build_scheduler() -> FlowMatchEulerDiscreteScheduler:
    """Build the scheduler of Qwen-Image, but with one shift for all sizes.

    The published shift depends on the size, and is tuned for sequences of 256 tokens and more.
    """
    return FlowMatchEulerDiscreteScheduler(
        num_train_timesteps=1000,
        shift=1.0,
        use_dynamic_shifting=True,
        base_shift=1.1,
        max_shift=1.1,
        base_image_seq_len=256,
        max_image_seq_len=8192,
        invert_sigmas=False,
        shift_terminal=0.02,
        time_shift_type="exponential",
    )


def pack(latents: torch.Tensor) -> torch.Tensor:
    """Pack latents into tokens, as the pipeline does.

    (batch, CHANNELS, 1, height, width) becomes (batch, height * width / 4, 4 * CHANNELS).
    """
    batch, channels, _, height, width = latents.shape
    return QwenImagePipeline._pack_latents(latents, batch, channels, height, width)


class Conditions:
    """Encode prompts with the stock pipeline, each distinct prompt once."""

    def __init__(self, pipeline: QwenImagePipeline):
        self.pipeline = pipeline
        self.features_of: dict[str, torch.Tensor] = {}

    @torch.no_grad()
    def __call__(self, prompts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the features of prompts, padded to the longest one.

        Returns:
            features: (batch, longest, WIDTH), zero where padded.
            mask: (batch, longest), false where padded.
        """
        new = sorted({prompt for prompt in prompts if prompt not in self.features_of})
        for start in range(0, len(new), 256):
            chunk = new[start : start + 256]
            features, mask = self.pipeline.encode_prompt(chunk)
            lengths = [features.shape[1]] * len(chunk) if mask is None else mask.sum(1).tolist()
            self.features_of |= {
                prompt: padded[:length].clone() for prompt, padded, length in zip(chunk, features, lengths, strict=True)
            }
        rows = [self.features_of[prompt] for prompt in prompts]
        features = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        lengths = torch.tensor([len(row) for row in rows])
        return features, torch.arange(features.shape[1])[None] < lengths[:, None]


class CaptionedPictures:
    """Draw training batches of (tokens, prompts) from pictures of the training split."""

    def __init__(
        self, specs: dict[str, list[dict]], tokens: dict[str, torch.Tensor], shares: dict[str, float], seed: int
    ):
        """Keep the pictures' specs and tokens, and the share of each kind of prompt.

        `specs` and `tokens` are by kind of picture ("count", "pair", "word"). `shares` is by kind of prompt; an
        "open" prompt is shown by the picture of a count.
        """
        self.specs, self.tokens, self.shares = specs, tokens, shares
        self.random = random.Random(seed)

    def batch(self, size: int, unprompted_share: float) -> tuple[torch.Tensor, list[str]]:
        """Draw a batch of tokens (size, GRID * GRID, 4 * CHANNELS) and their prompts.

        `unprompted_share` is the probability that a picture has the empty prompt, for classifier-free guidance.
        """
        tokens, prompts = [], []
        for kind in self.random.choices(list(self.shares), list(self.shares.values()), k=size):
            picture_kind = "count" if kind == "open" else kind
            index = self.random.randrange(len(self.specs[picture_kind]))
            picture_spec = self.specs[picture_kind][index]
            prompt_spec = open_up(picture_spec, self.random) if kind == "open" else picture_spec
            tokens.append(self.tokens[picture_kind][index])
            prompts.append(UNPROMPTED if self.random.random() < unprompted_share else sentence(prompt_spec))
        return torch.stack(tokens), prompts


def short_and_long(tokens: torch.Tensor, prompts: list[str], conditions: Conditions):
    """Split a batch into the three quarters with the shorter prompts and the rest.

    Yields (tokens, features, mask) of each.
    """
    by_length = sorted(range(len(prompts)), key=lambda i: len(prompts[i].split()))
    cut = len(by_length) * 3 // 4
    for indices in (by_length[:cut], by_length[cut:]):
        yield tokens[indices], *conditions([prompts[i] for i in indices])


def train_denoiser(
    denoiser: QwenImageTransformer2DModel,
    conditions: Conditions,
    data: CaptionedPictures,
    steps: int,
    batch_size: int = 64,
    learning_rate: float = 1e-3,
    muon_learning_rate: float = 0.02,
    unprompted_share: float = 0.1,
    sigma_mean: float = 0.9,
    sigma_std: float = 1.1,
    seed: int = 0,
    report: Callable[[int], None] | None = None,
) -> None:
    """Train the denoiser in place.

    Noise levels are drawn as sigma = sigmoid(N(sigma_mean, sigma_std)). `report` is called 8 times, with the number
    of steps done so far.
    """
    generator = torch.Generator().manual_seed(seed)
    matrices = [p for name, p in denoiser.transformer_blocks.named_parameters() if p.dim() == 2 and "_mod." not in name]
    other_parameters = [p for p in denoiser.parameters() if not any(p is matrix for matrix in matrices)]
    optimizers = [
        torch.optim.AdamW(other_parameters, lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.0),
        torch.optim.Muon(matrices, lr=muon_learning_rate, weight_decay=0.0),
    ]
    schedulers = [
        torch.optim.lr_scheduler.LambdaLR(o, lambda step: min(1.0, (step + 1) / 100, (steps - step) / (0.4 * steps)))
        for o in optimizers
    ]
    average_loss = None
    for step in (progress := trange(steps, desc="denoiser", mininterval=5)):
        batch_loss = 0.0
        # Two passes, so that short prompts are not padded to the length of the longest one.
        for tokens, features, mask in short_and_long(*data.batch(batch_size, unprompted_share), conditions):
            noise = torch.randn(tokens.shape, generator=generator)
            sigma = torch.sigmoid(sigma_mean + sigma_std * torch.randn(len(tokens), generator=generator))
            noisy = (1 - sigma[:, None, None]) * tokens + sigma[:, None, None] * noise
            velocity = denoiser(
                hidden_states=noisy,
                timestep=sigma,
                encoder_hidden_states=features,
                encoder_hidden_states_mask=mask,
                img_shapes=[[(1, GRID, GRID)]] * len(tokens),
                return_dict=False,
            )[0]
            loss = F.mse_loss(velocity, noise - tokens) * len(tokens) / batch_size
            loss.backward()
            batch_loss += loss.item()
        torch.nn.utils.clip_grad_norm_(denoiser.parameters(), 1.0)
        for optimizer, scheduler in zip(optimizers, schedulers, strict=True):
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad(set_to_none=True)
        average_loss = batch_loss if average_loss is None else 0.98 * average_loss + 0.02 * batch_loss
        if step % 50 == 49:
            progress.set_postfix(loss=f"{average_loss:.4f}")
        if report is not None and (step + 1) * 8 // steps > step * 8 // steps:
            report(step + 1)
