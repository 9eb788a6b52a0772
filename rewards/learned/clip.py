"""CLIP models: embeddings of images and prompts, and the cosine of the two."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import AutoTokenizer, CLIPImageProcessorPil, CLIPModel

from rewards.learned import weight_files
from rewards.learned.running import Placement, Prompts, check_pairs, crop_long_ends
from rewards.pictures import to_rgb


class Clip:
    """A CLIP that embeds images and prompts as unit vectors.

    model: a CLIPModel of transformers. prompts: converts prompts to its token ids; None if only images are embedded.
    pixels: converts an RGB image to its input (3, side, side).
    """

    def __init__(
        self, model: CLIPModel, prompts: Prompts | None, pixels: Callable[[Image.Image], Tensor], placement: Placement
    ) -> None:
        self.model = model.eval().requires_grad_(False).to(placement.torch_dtype)
        self.prompts, self.pixels, self.placement = prompts, pixels, placement

    def embed_images(self, images: Sequence[Image.Image], device: torch.device) -> Tensor:
        """Embed images as unit vectors (N, D) in float32, within :meth:`Placement.running`."""
        embedded = []
        for batch in self.placement.batches(len(images)):
            # One image after the other, so that only the model's input of each stays in memory.
            pixels = torch.stack([self.pixels(to_rgb(image)) for image in images[batch]])
            pixels = pixels.to(device, self.placement.torch_dtype)
            embedded.append(_unit(self.model.get_image_features(pixel_values=pixels).pooler_output))
        return torch.cat(embedded)

    def embed_prompts(self, prompts: Sequence[str], device: torch.device) -> Tensor:
        """Embed prompts as unit vectors (N, D) in float32, equal ones once, within :meth:`Placement.running`."""
        assert self.prompts is not None
        distinct = {prompt: row for row, prompt in enumerate(dict.fromkeys(prompts))}
        ids, _ = self.prompts(list(distinct))
        # No mask is needed: padding comes after the token that is read, and attention is causal.
        batches = [ids[batch].to(device) for batch in self.placement.batches(len(distinct))]
        embedded = torch.cat([_unit(self.model.get_text_features(input_ids=batch).pooler_output) for batch in batches])
        return embedded[[distinct[prompt] for prompt in prompts]]

    def cosines(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> list[float]:
        """Return the cosine of each image and its prompt, in [-1, 1]."""
        check_pairs(images, prompts)
        if not images:
            return []
        with self.placement.running(self.model) as device:
            cosines = self.embed_images(images, device) * self.embed_prompts(prompts, device)
            return cosines.sum(-1).tolist()


def _unit(features: Tensor) -> Tensor:
    return torch.nn.functional.normalize(features.float(), dim=-1)


def load_clip(
    checkpoint: str | Path, processor: str | Path | None, placement: Placement, *, reward: str, text: bool = True
) -> Clip:
    """Load a CLIP in transformers' format.

    Args:
        checkpoint: folder or hub name of the model. processor: folder or hub name of the tokenizer and the image
            processor; None for the model's own. text: False leaves out the tokenizer and the text tower.

    Raises:
        FileNotFoundError: naming what is missing. ValueError: the weights are not those of a CLIP.
    """
    processor_files = {**weight_files.IMAGE_PROCESSOR_FILES, **(weight_files.TOKENIZER_FILES if text else {})}
    if processor is None:
        all_files = {**weight_files.MODEL_FILES, **processor_files}
        folder = processor_folder = weight_files.find_folder(checkpoint, all_files, reward=reward, arg="checkpoint")
    else:  # the small files first, so that a missing one is reported before gigabytes are downloaded
        processor_folder = weight_files.find_folder(processor, processor_files, reward=reward, arg="processor")
        folder = weight_files.find_folder(checkpoint, weight_files.MODEL_FILES, reward=reward, arg="checkpoint")
    image_processor = CLIPImageProcessorPil.from_pretrained(processor_folder)
    tokenizer = AutoTokenizer.from_pretrained(processor_folder, trust_remote_code=False) if text else None
    model = weight_files.load_model(CLIPModel, folder, reward=reward, dtype=torch.float32)
    prompts = None
    if tokenizer is not None:
        config = model.config.text_config
        prompts = Prompts(
            tokenizer,
            reward=reward,
            limit=config.max_position_embeddings,
            pad=tokenizer.eos_token_id,
            vocabulary=config.vocab_size,
        )
    else:
        model.text_model = model.text_projection = None
    return Clip(model, prompts, _pixels_by(image_processor), placement)


def _pixels_by(processor: Any) -> Callable[[Image.Image], Tensor]:
    """Return transformers' preprocessing with PIL, which needs no torchvision and gives the same pixels everywhere."""

    def pixels(image: Image.Image) -> Tensor:
        return processor(crop_long_ends(image), return_tensors="pt")["pixel_values"][0]

    return pixels
