"""A model without its weights: its real classes at their real size, on the ``meta`` device, built from configs alone."""

from pathlib import Path

import torch
from diffusers import (
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
)
from peft import LoraConfig
from transformers import AutoConfig, Qwen2_5_VLForConditionalGeneration

from align.models.qwen_image import QwenImage


def outline(folder: Path, lora: LoraConfig | None = None, adapter: bool = False) -> QwenImage:
    """The Qwen-Image of a folder with what is trained made ready, holding no memory.

    Args:
        folder: in the layout of Qwen/Qwen-Image; its weights may be missing.
        lora: the adapter that is attached.
        adapter: one that is not known here is trained; without either the whole transformer is.
    """
    with torch.device("meta"):
        parts = {
            "transformer": QwenImageTransformer2DModel.from_config(
                QwenImageTransformer2DModel.load_config(folder / "transformer")
            ),
            "vae": AutoencoderKLQwenImage.from_config(AutoencoderKLQwenImage.load_config(folder / "vae")),
            "text_encoder": Qwen2_5_VLForConditionalGeneration(AutoConfig.from_pretrained(folder / "text_encoder")),
        }
        model = QwenImage(QwenImagePipeline(FlowMatchEulerDiscreteScheduler(), tokenizer=None, **parts))
        if lora is not None:
            model.add_lora(lora)
        elif not adapter:
            model.unfreeze()
        model.adapter = model.adapter or adapter
    return model
