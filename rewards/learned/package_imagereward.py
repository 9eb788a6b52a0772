"""ImageReward with the PyPI package ``image-reward``, in the environment of ``requirements/imagereward.txt``.

The package's own ``load()`` reads the checkpoint with a pickle that may run code, and drops keys that do not fit. Here
our reader fills its model, which then scores with its own ``score()``.
"""

from __future__ import annotations

import importlib.util
import sys
import types
from collections.abc import Callable, Mapping
from typing import Any

import torch
from PIL import Image

from rewards.learned.running import Placement, check_pairs
from rewards.learned.weight_files import TOKENIZER_FILES, find_file, find_folder, load_weights, read_safetensors
from rewards.pictures import to_rgb

#: A buffer of the package's model, which some checkpoints contain.
_POSITIONS = "blip.text_encoder.embeddings.position_ids"


def imagereward(
    checkpoint: str = "THUDM/ImageReward:ImageReward.pt",
    med_config: str = "THUDM/ImageReward:med_config.json",
    tokenizer: str = "google-bert/bert-base-uncased",
    device: str | None = None,
) -> Callable[[list[Image.Image], list[str]], list[float]]:
    """Load the package's model and return the reward; `med_config` is the package's config of the text tower.

    The checkpoint must be safetensors, as for :func:`rewards.learned.package_hpsv2.hpsv2`.
    """
    torch_device = Placement(device).resolve()
    path = find_file(checkpoint, reward="imagereward", arg="checkpoint", file="ImageReward.pt")
    model = build(tokenizer, med_config, torch_device)
    state = read_safetensors(path, reward="imagereward")
    load_weights(model, _with_buffers(state, model.state_dict()), reward="imagereward", source=path)
    model.eval()

    def reward(images: list[Image.Image], prompts: list[str]) -> list[float]:
        check_pairs(images, prompts)
        with torch.no_grad():
            return [model.score(prompt, to_rgb(image)) for image, prompt in zip(images, prompts, strict=True)]

    return reward


def build(tokenizer: str, med_config: str, device: torch.device) -> Any:
    """Build the package's model with random weights, with its tokenizer from a folder instead of the hub."""
    config = find_file(med_config, reward="imagereward", arg="med_config", file="med_config.json")
    tokenizer_folder = find_folder(tokenizer, TOKENIZER_FILES, reward="imagereward", arg="tokenizer")
    if "clip" not in sys.modules and importlib.util.find_spec("clip") is None:
        sys.modules["clip"] = types.ModuleType(
            "clip"
        )  # the package imports it for another score, without depending on it
    from ImageReward.ImageReward import ImageReward
    from ImageReward.models.BLIP import blip_pretrain
    from transformers import BertTokenizer

    def local_tokenizer() -> Any:
        """Do what the package's ``init_tokenizer`` does, with a folder."""
        bert_tokenizer = BertTokenizer.from_pretrained(str(tokenizer_folder))
        bert_tokenizer.add_special_tokens({"bos_token": "[DEC]"})
        bert_tokenizer.add_special_tokens({"additional_special_tokens": ["[ENC]"]})
        return bert_tokenizer

    blip_pretrain.init_tokenizer = local_tokenizer
    return ImageReward(med_config=str(config), device=device).to(device)


def _with_buffers(state: Mapping[str, Any], model_state: Mapping[str, Any]) -> dict[str, Any]:
    """Complete a state dict with the model's own buffer of positions and BLIP's unused projections."""
    optional = (_POSITIONS, "blip.vision_proj.", "blip.text_proj.")
    return {**{key: value for key, value in model_state.items() if key.startswith(optional)}, **state}
