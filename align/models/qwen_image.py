"""Qwen-Image on diffusers' and transformers' own classes; nothing of the model is written again here."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from diffusers import (
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
)
from diffusers.pipelines.qwenimage.pipeline_qwenimage import calculate_shift
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoConfig, Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer

from align.maths.flow import guided_velocity
from align.models.contract import NotFinite, Request
from align.models.loading import digest_module
from align.models.qwen_vae import speed_up_images
from align.models.trained import TrainedTransformer
from preference_data.cache import TensorCache, cache_key

#: As stock sampling cuts it.
MAX_TEXT_TOKENS = 512
#: Encoded prompts kept for another time, oldest dropped first: at Qwen-Image's width about a megabyte each.
MAX_REMEMBERED = 4096


class Condition(NamedTuple):
    """One encoded request: ``embeds`` (text tokens, channels) on the CPU, padded to the longest of its call.

    length: how many of the tokens are the prompt's. masked: whether any prompt of the call was padded. Sampling and
    replay so see the same padding however the rows are batched; in half precision another padding is another velocity.
    """

    embeds: Tensor
    length: int
    masked: bool


class QwenImage(TrainedTransformer):
    """A ``QwenImagePipeline`` as a :class:`~align.models.contract.FlowModel`.

    Args:
        pipeline: a loaded pipeline. Its VAE and text encoder are frozen, the VAE's decoder sped up for single images.
        offload: keep the VAE and the text encoder on the CPU and bring each to ``device`` only while it works.
        description: see :class:`~align.models.trained.TrainedTransformer`.
    """

    #: The joint attention, image and text streams: what Qwen-Image LoRAs usually adapt.
    lora_targets = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
    kept_by_block: ClassVar[dict[str, float]] = {"full": 28.2, "LoRA": 17.3}  # a test measures them

    def __init__(
        self, pipeline: QwenImagePipeline, offload: bool = False, description: dict[str, Any] | None = None
    ) -> None:
        super().__init__(pipeline, description)
        self.offload = offload
        self.condition_cache: TensorCache | None = None
        self._encoded: dict[str, Tensor] = {}
        self._fingerprints: dict[str, str] = {}
        speed_up_images(pipeline.vae.decoder)  # the encoder's work is cached, and stays stock diffusers' to the digit

    @classmethod
    def load(cls, folder: Path, dtype: torch.dtype, offload: bool, description: dict[str, Any]) -> "QwenImage":
        """Load a folder in the layout of Qwen/Qwen-Image."""
        pipeline = QwenImagePipeline.from_pretrained(folder, dtype=dtype, use_safetensors=True)
        return cls(pipeline, offload, description)

    @classmethod
    def outline(cls, folder: Path, description: dict[str, Any]) -> "QwenImage":
        """Build the model of a folder on the ``meta`` device, from its configs alone; with the tokenizer, if it is there."""
        transformer, vae = (folder / name for name in ("transformer", "vae"))
        with torch.device("meta"):
            modules = {
                "transformer": QwenImageTransformer2DModel.from_config(
                    QwenImageTransformer2DModel.load_config(transformer)
                ),
                "vae": AutoencoderKLQwenImage.from_config(AutoencoderKLQwenImage.load_config(vae)),
                "text_encoder": Qwen2_5_VLForConditionalGeneration(
                    AutoConfig.from_pretrained(folder / "text_encoder", trust_remote_code=False)
                ),
            }
        words = folder / "tokenizer"
        tokenizer = Qwen2Tokenizer.from_pretrained(words) if words.is_dir() else None
        scheduler = FlowMatchEulerDiscreteScheduler()
        return cls(QwenImagePipeline(scheduler, tokenizer=tokenizer, **modules), False, description)

    def timed_modules(self) -> dict[str, list[nn.Module]]:
        vae = [self.pipeline.vae.encoder, self.pipeline.vae.decoder]
        transformer = [self.transformer, *([self._reference_copy] if self._reference_copy is not None else [])]
        return {"transformer": transformer, "text_encoder": [self.pipeline.text_encoder], "vae": vae}

    def frozen_modules(self) -> list[nn.Module]:
        return [self.pipeline.text_encoder, self.pipeline.vae]

    def blocks(self) -> list[nn.Module]:
        return list(self.transformer.transformer_blocks)

    def dead_modules(self) -> list[str]:
        """Return the last block's text stream, which is computed and then discarded."""
        last = f"transformer_blocks.{len(self.transformer.transformer_blocks) - 1}"
        names = ("attn.to_add_out", "attn.add_q_proj", "attn.norm_added_q", "txt_mlp")
        return [f"{last}.{name}" for name in names]

    @property
    def width(self) -> int:
        return self.transformer.inner_dim

    # -- frozen modules --------------------------------------------------------------------------------------------

    @contextmanager
    def _at_work(self, module: Any) -> Iterator[Any]:
        module.to(self.device)
        try:
            with torch.no_grad():
                yield module
        finally:
            if self.offload:
                module.to("cpu")

    def encode(self, requests: Sequence[Request]) -> list[Condition]:
        if any(request.images for request in requests):
            raise ValueError("Qwen-Image is made for text to image: a request with input images needs an edit model")
        prompts = [request.prompt for request in requests]
        self._encode_new([prompt for prompt in dict.fromkeys(prompts) if prompt not in self._encoded])
        lengths = [len(self._encoded[prompt]) for prompt in prompts]
        longest, masked = max(lengths), min(lengths) < max(lengths)
        padded = {p: pad(self._encoded[p], (0, 0, 0, longest - len(self._encoded[p]))) for p in dict.fromkeys(prompts)}
        for prompt in list(self._encoded)[: max(0, len(self._encoded) - MAX_REMEMBERED)]:
            del self._encoded[prompt]
        return [Condition(padded[p], length, masked) for p, length in zip(prompts, lengths, strict=True)]

    def _encode_new(self, prompts: list[str]) -> None:
        """Remember the embeds of prompts that are not remembered yet, from the cache on disk where it has them."""
        cache, keys = self.condition_cache, dict[str, str]()
        if cache is not None and prompts:
            encoder = self.fingerprint("text_encoder")
            keys = {prompt: cache_key(kind="prompt", model=encoder, prompt=prompt) for prompt in prompts}
            found = {prompt: cache.get(key) for prompt, key in keys.items()}
            self._encoded |= {prompt: embeds for prompt, embeds in found.items() if embeds is not None}
            prompts = [prompt for prompt in prompts if found[prompt] is None]
        if not prompts:
            return
        with self._at_work(self.pipeline.text_encoder):
            for prompt in prompts:
                # One at a time: in a padded batch the last bits would depend on the neighbours, and a resumed run,
                # or one on more processes, would not be the same run.
                embeds, _ = self.pipeline.encode_prompt(
                    [prompt], device=self.device, max_sequence_length=MAX_TEXT_TOKENS
                )
                self._encoded[prompt] = embeds[0].clone().cpu()
                if cache is not None:
                    cache.put(keys[prompt], self._encoded[prompt])

    def prompt_tokens(self, prompt: str) -> tuple[int, int]:
        text = self.pipeline.prompt_template_encode.format(prompt)
        return len(
            self.pipeline.tokenizer(text).input_ids
        ) - self.pipeline.prompt_template_encode_start_idx, MAX_TEXT_TOKENS

    def fingerprint(self, module: str) -> str:
        if module not in self._fingerprints:
            loaded = getattr(self.pipeline, module)
            settings = loaded.config.to_dict() if module == "text_encoder" else dict(loaded.config)
            about: list[Any] = [{k: v for k, v in settings.items() if k[0] != "_"}]  # not where its folder lies
            if module == "text_encoder":  # what it is given is decided by these
                about.append([self.pipeline.tokenizer.get_vocab(), self.pipeline.prompt_template_encode])
            self._fingerprints[module] = digest_module(loaded, about)
        return self._fingerprints[module]

    def _latent_statistics(self) -> tuple[Tensor, Tensor]:
        config = self.pipeline.vae.config
        mean, std = (
            torch.tensor(v, device=self.device).view(1, -1, 1, 1, 1) for v in (config.latents_mean, config.latents_std)
        )
        return mean, std

    def encode_images(self, images: list[Image.Image], height: int, width: int) -> Tensor:
        pixels = self.pipeline.image_processor.preprocess(images, height=height, width=width).unsqueeze(2)
        mean, std = self._latent_statistics()
        with self._at_work(self.pipeline.vae) as vae:
            latents = vae.encode(pixels.to(self.device, vae.dtype)).latent_dist.mode().float()
        latents = (latents - mean) / std
        return self.pipeline._pack_latents(latents, *latents.shape[:2], *latents.shape[3:]).float()

    def decode_latents(self, latents: Tensor, height: int, width: int) -> list[Image.Image]:
        unpacked = self.pipeline._unpack_latents(latents, height, width, self.pipeline.vae_scale_factor)
        mean, std = self._latent_statistics()
        with self._at_work(self.pipeline.vae) as vae:
            pixels = vae.decode((unpacked.to(self.device) * std + mean).to(vae.dtype), return_dict=False)[0][:, :, 0]
        if not pixels.isfinite().all():
            raise NotFinite("pixels of an image are NaN or infinite")
        return self.pipeline.image_processor.postprocess(pixels.float(), output_type="pil")

    # -- geometry and schedule -----------------------------------------------------------------------------------

    @property
    def cell(self) -> int:
        return self.pipeline.vae_scale_factor * 2

    def _grid(self, height: int, width: int) -> tuple[int, int]:
        cell = self.cell
        if height % cell or width % cell or min(height, width) < cell:
            raise ValueError(_nearest_sizes(cell, height=height, width=width))
        return height // cell, width // cell

    def latent_shape(self, height: int, width: int) -> tuple[int, int]:
        rows, columns = self._grid(height, width)
        return rows * columns, self.transformer.config.in_channels

    def _mu(self, height: int, width: int) -> float:
        """Return the shift of the schedule at this resolution."""
        config = self.pipeline.scheduler.config
        lengths, shifts = (config.base_image_seq_len, config.max_image_seq_len), (config.base_shift, config.max_shift)
        return calculate_shift(self.latent_shape(height, width)[0], *lengths, *shifts)

    def sigmas(self, num_inference_steps: int, height: int, width: int) -> Tensor:
        scheduler = self.pipeline.scheduler
        grid = np.linspace(1.0, 1 / num_inference_steps, num_inference_steps)
        scheduler.set_timesteps(sigmas=grid, mu=self._mu(height, width))
        return scheduler.sigmas.clone().float()

    def shift_sigma(self, sigma: Tensor, height: int, width: int) -> Tensor:
        config = self.pipeline.scheduler.config
        if config.use_dynamic_shifting:
            return self.pipeline.scheduler.time_shift(self._mu(height, width), 1.0, sigma)
        return config.shift * sigma / (1 + (config.shift - 1) * sigma)

    # -- velocity ------------------------------------------------------------------------------------------------

    def velocity(
        self,
        latents: Tensor,
        sigma: Tensor,
        conditions: list[Condition],
        *,
        height: int,
        width: int,
        guidance_scale: float = 1.0,
        negative: Condition | None = None,
        transformer: nn.Module | None = None,
    ) -> Tensor:
        guided = guidance_scale > 1
        if guided and negative is None:
            raise ValueError(f"guidance_scale {guidance_scale} needs the condition of a negative prompt")
        rows = conditions if negative is None or not guided else [*conditions, *[negative] * len(conditions)]
        embeds, mask = self._pad(rows, latents.device)
        if guided:  # both branches in one batch: one forward, and one pass through DDP or DeepSpeed
            latents, sigma = torch.cat([latents, latents]), torch.cat([sigma, sigma])
        grid = (1, *self._grid(height, width))
        output = (self.transformer if transformer is None else transformer)(
            hidden_states=latents.to(self.dtype),
            timestep=sigma.to(self.dtype),
            encoder_hidden_states=embeds,
            encoder_hidden_states_mask=mask,
            img_shapes=[[grid]] * len(latents),
            return_dict=False,
        )[0].float()
        if not guided:
            return output
        velocity, velocity_negative = output.chunk(2)
        return guided_velocity(velocity, velocity_negative, guidance_scale)

    def _pad(self, conditions: list[Condition], device: torch.device) -> tuple[Tensor, Tensor | None]:
        """Return (B, T, D) embeds and their (B, T) mask, None when nothing was padded, as the stock pipeline passes it."""
        embeds = pad_sequence([c.embeds for c in conditions], batch_first=True).to(device, self.dtype)
        if not any(c.masked or len(c.embeds) < embeds.shape[1] for c in conditions):
            return embeds, None
        mask = torch.arange(embeds.shape[1]) < torch.tensor([c.length for c in conditions])[:, None]
        return embeds, mask.to(device)


def _nearest_sizes(cell: int, **sizes: int) -> str:
    """Say which of ``sizes`` is no positive multiple of ``cell``, and the nearest that are."""
    name, value = next((name, value) for name, value in sizes.items() if value < cell or value % cell)
    below = max(cell, value // cell * cell)
    return f"{name} {value} must be a positive multiple of {cell}: the nearest are {below} and {below + cell}"
