"""The denoiser of the tiny model: QwenImageTransformer2DModel, trained by flow matching.

What lets it follow prompts after so little training: few degrees of freedom in the world, Muon for the
matrices inside the blocks, noise levels drawn where the composition is decided (high sigma), and a learning
rate that decays to zero.
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

UNPROMPTED = " "  # the prompt that says nothing; also the negative prompt of classifier-free guidance
GRID = SIZE // SCALE // 2  # tokens along a side: 2 x 2 latents make one


def build_denoiser(seed: int = 0) -> QwenImageTransformer2DModel:
    """An untrained MMDiT of 2.5 M parameters; its blocks begin as the identity, its output as zero."""
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
    zero = [denoiser.norm_out.linear, denoiser.proj_out]
    for block in denoiser.transformer_blocks:
        zero += [block.img_mod[1], block.txt_mod[1]]
    for name, parameter in denoiser.named_parameters():
        if parameter.dim() == 2:
            torch.nn.init.xavier_uniform_(parameter, generator=generator)
        elif name.endswith("bias"):
            torch.nn.init.zeros_(parameter)
    for layer in zero:
        torch.nn.init.zeros_(layer.weight)
    return denoiser


def build_scheduler() -> FlowMatchEulerDiscreteScheduler:
    """The scheduler of Qwen-Image, with one shift for all sizes (its own is tuned to sequences of 256 tokens
    and more).
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
    """Latents (batch, CHANNELS, 1, height, width) to tokens (batch, height * width / 4, 4 * CHANNELS), as the
    pipeline does.
    """
    batch, channels, _, height, width = latents.shape
    return QwenImagePipeline._pack_latents(latents, batch, channels, height, width)


class Conditions:
    """The stock pipeline's features of prompts, each distinct prompt encoded once."""

    def __init__(self, pipeline: QwenImagePipeline):
        self.pipeline = pipeline
        self.known: dict[str, torch.Tensor] = {}

    @torch.no_grad()
    def __call__(self, prompts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """Features (batch, longest, WIDTH), zero where padded, and the mask (batch, longest), true where not."""
        new = sorted({prompt for prompt in prompts if prompt not in self.known})
        for start in range(0, len(new), 256):
            part = new[start : start + 256]
            features, mask = self.pipeline.encode_prompt(part)
            lengths = [features.shape[1]] * len(part) if mask is None else mask.sum(1).tolist()
            self.known |= {
                prompt: f[:length].clone() for prompt, f, length in zip(part, features, lengths, strict=True)
            }
        rows = [self.known[prompt] for prompt in prompts]
        features = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        lengths = torch.tensor([len(row) for row in rows])
        return features, torch.arange(features.shape[1])[None] < lengths[:, None]


class Captioned:
    """Pictures of the training split with their latents: draws batches of (tokens, prompts)."""

    def __init__(
        self, specs: dict[str, list[dict]], tokens: dict[str, torch.Tensor], shares: dict[str, float], seed: int
    ):
        """specs and tokens by kind of picture ("count", "pair", "word"); shares by kind of prompt, where
        "open" shows counts.
        """
        self.specs, self.tokens, self.shares = specs, tokens, shares
        self.random = random.Random(seed)

    def batch(self, size: int, unprompted: float) -> tuple[torch.Tensor, list[str]]:
        """`unprompted` is the share of pictures that come without a prompt, for classifier-free guidance."""
        tokens, prompts = [], []
        for kind in self.random.choices(list(self.shares), list(self.shares.values()), k=size):
            painted = "count" if kind == "open" else kind
            index = self.random.randrange(len(self.specs[painted]))
            spec = self.specs[painted][index]
            said = open_up(spec, self.random) if kind == "open" else spec
            tokens.append(self.tokens[painted][index])
            prompts.append(UNPROMPTED if self.random.random() < unprompted else sentence(said))
        return torch.stack(tokens), prompts


def short_and_long(latents: torch.Tensor, prompts: list[str], conditions: Conditions):
    """Split a batch into the three quarters with the shorter prompts and the rest: (latents, features, mask)
    of each.
    """
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i].split()))
    cut = len(order) * 3 // 4
    for part in (order[:cut], order[cut:]):
        yield latents[part], *conditions([prompts[i] for i in part])


def train_denoiser(
    denoiser: QwenImageTransformer2DModel,
    conditions: Conditions,
    data: Captioned,
    steps: int,
    batch_size: int = 64,
    learning_rate: float = 1e-3,
    muon_learning_rate: float = 0.02,
    unprompted: float = 0.1,
    sigma_mean: float = 0.9,
    sigma_std: float = 1.1,
    seed: int = 0,
    report: Callable[[int], None] | None = None,
) -> None:
    """Train in place. sigma = sigmoid(N(sigma_mean, sigma_std)); `report` is called with the number of steps
    done, 8 times.
    """
    generator = torch.Generator().manual_seed(seed)
    hidden = [p for name, p in denoiser.transformer_blocks.named_parameters() if p.dim() == 2 and "_mod." not in name]
    rest = [p for p in denoiser.parameters() if not any(p is h for h in hidden)]
    optimizers = [
        torch.optim.AdamW(rest, lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.0),
        torch.optim.Muon(hidden, lr=muon_learning_rate, weight_decay=0.0),
    ]
    schedulers = [
        torch.optim.lr_scheduler.LambdaLR(o, lambda step: min(1.0, (step + 1) / 100, (steps - step) / (0.4 * steps)))
        for o in optimizers
    ]
    average = None
    for step in (progress := trange(steps, desc="denoiser", mininterval=5)):
        total = 0.0
        # Two passes, so that the short prompts are not padded to the length of the longest.
        for latents, features, mask in short_and_long(*data.batch(batch_size, unprompted), conditions):
            noise = torch.randn(latents.shape, generator=generator)
            sigma = torch.sigmoid(sigma_mean + sigma_std * torch.randn(len(latents), generator=generator))
            noisy = (1 - sigma[:, None, None]) * latents + sigma[:, None, None] * noise
            velocity = denoiser(
                hidden_states=noisy,
                timestep=sigma,
                encoder_hidden_states=features,
                encoder_hidden_states_mask=mask,
                img_shapes=[[(1, GRID, GRID)]] * len(latents),
                return_dict=False,
            )[0]
            loss = F.mse_loss(velocity, noise - latents) * len(latents) / batch_size
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(denoiser.parameters(), 1.0)
        for optimizer, scheduler in zip(optimizers, schedulers, strict=True):
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad(set_to_none=True)
        average = total if average is None else 0.98 * average + 0.02 * total
        if step % 50 == 49:
            progress.set_postfix(loss=f"{average:.4f}")
        if report is not None and (step + 1) * 8 // steps > step * 8 // steps:
            report(step + 1)
