"""Qwen-Image on diffusers' and transformers' own classes; nothing of the model is written again here."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from diffusers import QwenImagePipeline
from diffusers.pipelines.qwenimage.pipeline_qwenimage import calculate_shift
from diffusers.training_utils import _collate_lora_metadata, cast_training_params
from huggingface_hub import save_torch_state_dict
from peft import LoraConfig, get_peft_model_state_dict
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence

from align.maths.flow import guided_velocity
from align.models.loading import describe_transformer, digest_adapter, digest_module, resolve_folder
from align.models.lora import match_targets
from align.models.qwen_vae import speed_up_images
from preference_data.cache import TensorCache, cache_key

#: As stock sampling cuts it.
MAX_TEXT_TOKENS = 512
#: Encoded prompts kept for another time, oldest dropped first: at Qwen-Image's width about a megabyte each.
MAX_REMEMBERED = 4096
#: Names of the adapters on the transformer; diffusers saves the metadata of the one called "default".
TRAINED, REFERENCE = "default", "reference"
#: diffusers' own name of a transformer's files.
WEIGHTS = "diffusion_pytorch_model{suffix}.safetensors"


class Condition(NamedTuple):
    """One encoded prompt: ``embeds`` (text tokens, channels) on the CPU, padded to the longest of its call.

    length: how many of the tokens are the prompt's. masked: whether any prompt of the call was padded. Sampling and
    replay so see the same padding however the rows are batched; in half precision another padding is another velocity.
    """

    embeds: Tensor
    length: int
    masked: bool


class QwenImage:
    """A ``QwenImagePipeline`` as a :class:`~align.models.contract.FlowModel`.

    Args:
        pipeline: a loaded pipeline. Its VAE and text encoder are frozen, the VAE's decoder sped up for single images.
        offload: keep the VAE and the text encoder on the CPU and bring each to ``device`` only while it works.
    """

    def __init__(self, pipeline: QwenImagePipeline, offload: bool = False) -> None:
        self.pipeline = pipeline
        self.transformer = pipeline.transformer
        self.device = self.transformer.device
        self.offload = offload
        self.dtype = self.transformer.dtype
        self.adapter = False
        self.prompt_cache: TensorCache | None = None
        self._encoded: dict[str, Tensor] = {}
        self._fingerprints: dict[str, str] = {}
        self._reference_copy: nn.Module | None = None
        self._adapter_folder: Path | None = None
        self._described = {"name": "a pipeline"} | {k: v for k, v in self.transformer.config.items() if k[0] != "_"}
        for module in (pipeline.vae, pipeline.text_encoder, self.transformer):
            module.eval().requires_grad_(False)
        speed_up_images(pipeline.vae.decoder)  # the encoder's work is cached, and stays stock diffusers' to the digit

    @classmethod
    def from_pretrained(
        cls, name: str | Path, dtype: torch.dtype = torch.float32, offload: bool = False
    ) -> "QwenImage":
        """Load a folder in the layout of Qwen/Qwen-Image, a hub name, or ``tiny``.

        Raises FileNotFoundError naming the part that a folder lacks, or what to download and where to put it.
        """
        folder = resolve_folder(name)
        pipeline = QwenImagePipeline.from_pretrained(folder, dtype=dtype, use_safetensors=True)
        model = cls(pipeline, offload=offload)
        model._described = describe_transformer(str(name), folder)
        return model

    def parts(self) -> dict[str, list[nn.Module]]:
        pipeline = self.pipeline
        vae = [pipeline.vae.encoder, pipeline.vae.decoder]
        transformer = [self.transformer, *([self._reference_copy] if self._reference_copy is not None else [])]
        return {"transformer": transformer, "text_encoder": [pipeline.text_encoder], "vae": vae}

    # -- frozen parts --------------------------------------------------------------------------------------------

    @contextmanager
    def _at_work(self, module: Any) -> Iterator[Any]:
        module.to(self.device)
        try:
            with torch.no_grad():
                yield module
        finally:
            if self.offload:
                module.to("cpu")

    def encode_prompts(self, prompts: list[str]) -> list[Condition]:
        new = [p for p in dict.fromkeys(prompts) if p not in self._encoded]
        cached = self.prompt_cache
        keys = {p: cache_key(kind="prompt", model=self.fingerprint("text_encoder"), prompt=p) for p in new if cached}
        if cached is not None:
            self._encoded |= {p: found for p, key in keys.items() if (found := cached.get(key)) is not None}
            new = [p for p in new if p not in self._encoded]
        if new:
            with self._at_work(self.pipeline.text_encoder):
                for prompt in new:
                    # One at a time: in a padded batch the last bits would depend on the neighbours, and a resumed run,
                    # or one on more processes, would not be the same run.
                    embeds, _ = self.pipeline.encode_prompt(
                        [prompt], device=self.device, max_sequence_length=MAX_TEXT_TOKENS
                    )
                    self._encoded[prompt] = embeds[0].clone().cpu()
                    if cached is not None:
                        cached.put(keys[prompt], self._encoded[prompt])
        lengths = [len(self._encoded[p]) for p in prompts]
        longest, masked = max(lengths), min(lengths) < max(lengths)
        padded = {p: pad(self._encoded[p], (0, 0, 0, longest - len(self._encoded[p]))) for p in dict.fromkeys(prompts)}
        for prompt in list(self._encoded)[: max(0, len(self._encoded) - MAX_REMEMBERED)]:
            del self._encoded[prompt]
        return [Condition(padded[p], length, masked) for p, length in zip(prompts, lengths, strict=True)]

    def fingerprint(self, part: str) -> str:
        if part not in self._fingerprints:
            module = getattr(self.pipeline, part)
            settings = module.config.to_dict() if part == "text_encoder" else dict(module.config)
            about: list[Any] = [{k: v for k, v in settings.items() if k[0] != "_"}]  # not where its folder lies
            if part == "text_encoder":  # what it is given is decided by these
                about.append([self.pipeline.tokenizer.get_vocab(), self.pipeline.prompt_template_encode])
            self._fingerprints[part] = digest_module(module, about)
        return self._fingerprints[part]

    def identity(self) -> dict[str, dict[str, Any]]:
        trained: dict[str, Any] = {"tuning": "full"}
        if self.adapter:
            config = self.transformer.peft_config[TRAINED]
            targets = config.target_modules
            trained = {
                "tuning": "LoRA",
                "adapter": digest_adapter(self._adapter_folder) if self._adapter_folder else None,
                "lora_r": config.r,
                "lora_alpha": config.lora_alpha,
                "lora_target_modules": targets if isinstance(targets, str) else sorted(targets),
            }
        return {"model": self._described, "trained": trained}

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
        return self.pipeline.image_processor.postprocess(pixels.float(), output_type="pil")

    # -- geometry and schedule -----------------------------------------------------------------------------------

    @property
    def cell(self) -> int:
        return self.pipeline.vae_scale_factor * 2

    def _grid(self, height: int, width: int) -> tuple[int, int]:
        cell = self.cell
        if height % cell or width % cell or min(height, width) < cell:
            raise ValueError(
                f"height {height} and width {width} must be multiples of {cell}, the size of one latent token"
            )
        return height // cell, width // cell

    def latent_shape(self, height: int, width: int) -> tuple[int, int]:
        rows, columns = self._grid(height, width)
        return rows * columns, self.transformer.config.in_channels

    def _mu(self, height: int, width: int) -> float:
        """By how much the schedule is shifted at this resolution."""
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
        """(B, T, D) embeds and their (B, T) mask, None when nothing was padded, as the stock pipeline passes it."""
        embeds = pad_sequence([c.embeds for c in conditions], batch_first=True).to(device, self.dtype)
        if not any(c.masked or len(c.embeds) < embeds.shape[1] for c in conditions):
            return embeds, None
        mask = torch.arange(embeds.shape[1]) < torch.tensor([c.length for c in conditions])[:, None]
        return embeds, mask.to(device)

    # -- what is trained -----------------------------------------------------------------------------------------

    def dead_modules(self) -> list[str]:
        """Modules that no loss can train: the last block's text stream is computed and then discarded."""
        last = f"transformer_blocks.{len(self.transformer.transformer_blocks) - 1}"
        parts = ("attn.to_add_out", "attn.add_q_proj", "attn.norm_added_q", "txt_mlp")
        return [f"{last}.{part}" for part in parts]

    def _is_dead(self, name: str) -> bool:
        return any(name == dead or name.startswith(dead + ".") for dead in self.dead_modules())

    def add_lora(self, config: LoraConfig) -> list[str]:
        names = [name for name, module in self.transformer.named_modules() if isinstance(module, nn.Linear)]
        config = copy.deepcopy(config)
        matched = match_targets(config, names)
        dead = [n for n in matched if self._is_dead(n)]
        if len(dead) == len(matched):
            raise ValueError(
                f"LoRA targets {config.target_modules!r} match only layers that never get a gradient: {dead}"
            )
        # Full names, so that the saved metadata says exactly what was adapted and the loader need not guess.
        config.target_modules, config.exclude_modules = sorted(set(matched) - set(dead)), None
        self.transformer.requires_grad_(False)
        self.transformer.add_adapter(config)
        cast_training_params(self.transformer, dtype=torch.float32)
        self.adapter = True
        return dead

    def load_adapter(self, folder: str | Path) -> None:
        """Go on training the LoRA in ``folder``, at the strength its metadata says."""
        self.pipeline.load_lora_weights(folder, adapter_name=TRAINED)
        self.transformer.requires_grad_(False)
        for name, parameter in self.transformer.named_parameters():
            parameter.requires_grad_(f".{TRAINED}." in name and not self._is_dead(name))
        cast_training_params(self.transformer, dtype=torch.float32)
        self.adapter, self._adapter_folder = True, Path(folder)

    def unfreeze(self) -> list[str]:
        if self.adapter:
            raise ValueError(
                "an adapter is attached: train the adapter, or load the model without it for a full fine-tune"
            )
        dead = []
        for name, parameter in self.transformer.named_parameters():
            parameter.requires_grad_(not self._is_dead(name))
            if self._is_dead(name):
                dead.append(name)
        return dead

    def keep_reference(self) -> None:
        if not self.adapter:
            self._reference_copy = copy.deepcopy(self.transformer).eval().requires_grad_(False)
        elif self._adapter_folder is not None:  # the policy started from this adapter: so does the reference
            self.pipeline.load_lora_weights(self._adapter_folder, adapter_name=REFERENCE)
            self._activate(TRAINED)

    def share_reference(self, share: Callable[[nn.Module], nn.Module]) -> None:
        if self._reference_copy is not None:
            self._reference_copy = share(self._reference_copy)

    def _activate(self, adapter: str) -> None:
        self.transformer.set_adapter(adapter)
        for name, parameter in self.transformer.named_parameters():  # peft makes the active adapter trainable
            if "lora_" in name:
                parameter.requires_grad_(f".{TRAINED}." in name and not self._is_dead(name))

    @contextmanager
    def reference(self, transformer: nn.Module) -> Iterator[nn.Module]:
        if self._reference_copy is not None:
            yield self._reference_copy.to(self.device)
        elif REFERENCE in getattr(self.transformer, "peft_config", {}):
            self._activate(REFERENCE)
            try:
                yield transformer
            finally:
                self._activate(TRAINED)
        elif self.adapter:
            self.transformer.disable_adapters()
            try:
                yield transformer
            finally:
                self.transformer.enable_adapters()
        else:
            raise RuntimeError("no reference: attach an adapter, or call keep_reference() before training")

    def save(self, folder: str | Path, state_dict: dict[str, Tensor]) -> None:
        if self.adapter:
            # Without the metadata the loader falls back to alpha = rank, and the adapter comes back at another strength.
            QwenImagePipeline.save_lora_weights(
                folder,
                transformer_lora_layers=get_peft_model_state_dict(self.transformer, state_dict=state_dict),
                **_collate_lora_metadata({"transformer": self.transformer}),
            )
        else:
            # Not by save_pretrained: it writes the module's own tensors, which are empty where ZeRO-3 shares them out.
            self.transformer.save_config(Path(folder) / "transformer")
            save_torch_state_dict(state_dict, Path(folder) / "transformer", filename_pattern=WEIGHTS)
