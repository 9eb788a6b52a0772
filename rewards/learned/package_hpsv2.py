"""HPSv2 with the PyPI package ``hpsv2``, in the environment of ``requirements/hpsv2.txt``, never in the trainer's.

The package's own ``score()`` reads its checkpoint again in every call, with a pickle that may run code. Here its model,
preprocessing and tokenizer are built once and called as ``score()`` calls them.
"""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from PIL import Image

from rewards.learned.running import Placement, check_pairs
from rewards.learned.weight_files import find_file, load_weights, read_safetensors
from rewards.pictures import to_rgb

FILES = {"v2.0": "HPS_v2_compressed.pt", "v2.1": "HPS_v2.1_compressed.pt"}
_VOCABULARY = "bpe_simple_vocab_16e6.txt.gz"


def hpsv2(
    version: str = "v2.1", checkpoint: str | None = None, device: str | None = None
) -> Callable[[list[Image.Image], list[str]], list[float]]:
    """Load the package's model and return the reward; args as for :func:`rewards.learned.hpsv2.hpsv2`.

    The checkpoint must be safetensors: this environment's torch cannot read a pickle safely (see
    :func:`rewards.learned.packages.package_checkpoint`).
    """
    torch_device = Placement(device).resolve()
    path = find_file(
        checkpoint or f"xswu/HPSv2:{FILES[version]}", reward="hpsv2", arg="checkpoint", file=FILES[version]
    )
    _install_vocabulary()
    from hpsv2.src.open_clip import create_model_and_transforms, get_tokenizer

    model, _, preprocess = create_model_and_transforms(
        "ViT-H-14",
        None,  # no weights: they are loaded below
        precision="amp",
        device=torch_device,
        light_augmentation=True,
        aug_cfg={},
        output_dict=True,
        with_score_predictor=False,
        with_region_predictor=False,
    )
    load_weights(model, read_safetensors(path, reward="hpsv2"), reward="hpsv2", source=path)
    model.eval()
    tokenize = get_tokenizer("ViT-H-14")

    def reward(images: list[Image.Image], prompts: list[str]) -> list[float]:
        check_pairs(images, prompts)
        scores = []
        with torch.no_grad(), torch.autocast("cuda", enabled=torch_device.type == "cuda"):
            for image, prompt in zip(images, prompts, strict=True):
                pixels = preprocess(to_rgb(image)).unsqueeze(0).to(torch_device)
                out = model(pixels, tokenize([prompt]).to(torch_device))
                scores.append((out["image_features"] @ out["text_features"].T).item())
        return scores

    return reward


def _install_vocabulary() -> None:
    """Copy the vocabulary, which the package's wheel lacks, from open-clip-torch to where the package looks for it."""
    folders = {}
    for package in ("hpsv2", "open_clip"):
        spec = importlib.util.find_spec(package)
        if spec is None or not spec.submodule_search_locations:
            raise ImportError(f"the package of the reward 'hpsv2' needs {package}, which this environment lacks")
        folders[package] = Path(spec.submodule_search_locations[0])
    target = folders["hpsv2"] / "src" / "open_clip" / _VOCABULARY
    if not target.exists():
        shutil.copyfile(folders["open_clip"] / _VOCABULARY, target)
