"""The CLIP family: a CLIPModel with its tokenizer and its images, and the cosine between a picture and a prompt."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import AutoTokenizer, CLIPImageProcessorPil, CLIPModel

from rewards.learned import weight_files
from rewards.learned.running import Placement, Prompts, check_pairs, without_ends
from rewards.pictures import to_rgb


class Clip:
    """Unit embeddings of images and prompts, and their cosines.

    model: in transformers' classes. prompts: ids for it, or ``None`` where only images are embedded. pixels: an RGB
    image to (3, side, side).
    """

    def __init__(
        self, model: CLIPModel, prompts: Prompts | None, pixels: Callable[[Image.Image], Tensor], placement: Placement
    ) -> None:
        self.model = model.eval().requires_grad_(False).to(placement.torch_dtype)
        self.prompts, self.pixels, self.placement = prompts, pixels, placement

    def embed_images(self, images: Sequence[Image.Image], device: torch.device) -> Tensor:
        """Unit embeddings (N, D) in float32, within :meth:`Placement.running`."""
        embedded = []
        for part in self.placement.batches(len(images)):
            # One image after the other: only what the model takes is held of each.
            pixels = torch.stack([self.pixels(to_rgb(image)) for image in images[part]])
            pixels = pixels.to(device, self.placement.torch_dtype)
            embedded.append(_unit(self.model.get_image_features(pixel_values=pixels).pooler_output))
        return torch.cat(embedded)

    def embed_prompts(self, prompts: Sequence[str], device: torch.device) -> Tensor:
        """Unit embeddings (N, D) in float32, within :meth:`Placement.running`; equal prompts are embedded once."""
        assert self.prompts is not None
        distinct = {prompt: row for row, prompt in enumerate(dict.fromkeys(prompts))}
        ids, _ = self.prompts(list(distinct))
        # Padding comes after the token that is read, and attention only looks back: no mask is needed.
        parts = [ids[part].to(device) for part in self.placement.batches(len(distinct))]
        embedded = torch.cat([_unit(self.model.get_text_features(input_ids=part).pooler_output) for part in parts])
        return embedded[[distinct[prompt] for prompt in prompts]]

    def cosines(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> list[float]:
        """The cosine of each image and its prompt, in [-1, 1]."""
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
    """A CLIP in transformers' format.

    Args:
        checkpoint: folder or hub name of the model. processor: of the tokenizer and the image processor; the model's
            own where ``None``. text: False leaves out the tokenizer and the tower it feeds.

    Raises:
        FileNotFoundError: naming what is missing. ValueError: when the weights are not a CLIP's.
    """
    images_and_text = {**weight_files.IMAGES, **(weight_files.TOKENIZER if text else {})}
    if processor is None:
        needs = {**weight_files.MODEL, **images_and_text}
        folder = beside = weight_files.find_folder(checkpoint, needs, reward=reward, arg="checkpoint")
    else:  # the small one first: what is missing is said before gigabytes are loaded
        beside = weight_files.find_folder(processor, images_and_text, reward=reward, arg="processor")
        folder = weight_files.find_folder(checkpoint, weight_files.MODEL, reward=reward, arg="checkpoint")
    image_processor = CLIPImageProcessorPil.from_pretrained(beside)
    tokenizer = AutoTokenizer.from_pretrained(beside) if text else None
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
    """transformers' own preprocessing by PIL, which needs no torchvision and gives the same pixels everywhere."""

    def pixels(image: Image.Image) -> Tensor:
        return processor(without_ends(image), return_tensors="pt")["pixel_values"][0]

    return pixels
