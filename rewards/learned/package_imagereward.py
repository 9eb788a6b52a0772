"""ImageReward by the PyPI package ``image-reward``. Runs in the environment of ``requirements/imagereward.txt``.

Its own ``load()`` reads the checkpoint by a pickle that may run code, and drops keys that do not fit; here its model is
built and filled by our reader, and scores by its own ``score()``.
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
from rewards.learned.weight_files import TOKENIZER, find_file, find_folder, load_weights, read_state_dict
from rewards.pictures import to_rgb

#: A buffer that the package's model has and that some files carry.
_POSITIONS = "blip.text_encoder.embeddings.position_ids"


def imagereward(
    checkpoint: str = "THUDM/ImageReward:ImageReward.pt",
    med_config: str = "THUDM/ImageReward:med_config.json",
    tokenizer: str = "google-bert/bert-base-uncased",
    device: str | None = None,
    allow_pickle: bool = False,
) -> Callable[[list[Image.Image], list[str]], list[float]]:
    """A reward of (images, prompts); `med_config` is the package's description of its text tower."""
    where = Placement(device).resolve()
    path = find_file(checkpoint, reward="imagereward", arg="checkpoint", file="ImageReward.pt")
    model = build(tokenizer, med_config, where)
    state = read_state_dict(path, reward="imagereward", allow_pickle=allow_pickle)
    load_weights(model, _with_buffers(state, model.state_dict()), reward="imagereward", source=path)
    model.eval()

    def reward(images: list[Image.Image], prompts: list[str]) -> list[float]:
        check_pairs(images, prompts)
        with torch.no_grad():
            return [model.score(prompt, to_rgb(image)) for image, prompt in zip(images, prompts, strict=True)]

    return reward


def build(tokenizer: str, med_config: str, device: torch.device) -> Any:
    """The package's model with random weights, its tokenizer from a folder where the package asks the hub."""
    config = find_file(med_config, reward="imagereward", arg="med_config", file="med_config.json")
    words = find_folder(tokenizer, TOKENIZER, reward="imagereward", arg="tokenizer")
    if "clip" not in sys.modules and importlib.util.find_spec("clip") is None:
        sys.modules["clip"] = types.ModuleType("clip")  # imported undeclared, for another score than this one
    from ImageReward.ImageReward import ImageReward
    from ImageReward.models.BLIP import blip_pretrain
    from transformers import BertTokenizer

    def local_tokenizer() -> Any:
        """The package's ``init_tokenizer``, from a folder."""
        made = BertTokenizer.from_pretrained(str(words))
        made.add_special_tokens({"bos_token": "[DEC]"})
        made.add_special_tokens({"additional_special_tokens": ["[ENC]"]})
        return made

    blip_pretrain.init_tokenizer = local_tokenizer
    return ImageReward(med_config=str(config), device=device).to(device)


def _with_buffers(state: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """The state dict, with the model's own buffer of positions and BLIP's unused projections where it lacks them."""
    spare = (_POSITIONS, "blip.vision_proj.", "blip.text_proj.")
    return {**{key: value for key, value in own.items() if key.startswith(spare)}, **state}
