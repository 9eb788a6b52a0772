"""HPSv2 and HPSv2.1 (Wu et al. 2023): open_clip's ViT-H/14 trained on which pictures people preferred."""

from __future__ import annotations

import html
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer
from transformers.initialization import no_init_weights

from rewards.learned import weight_files
from rewards.learned.clip import Clip
from rewards.learned.packages import check_native
from rewards.learned.running import Placement, Prompts, normalize, to_tensor

FILES = {"v2.0": "HPS_v2_compressed.pt", "v2.1": "HPS_v2.1_compressed.pt"}
REPOSITORY = "xswu/HPSv2"
TOKENIZER = "openai/clip-vit-large-patch14"
#: The width of an attention head, which a state dict does not tell: of the image tower, and of the text tower.
HEAD_WIDTH = {"vision": 80, "text": 64}

_RENAMED = {
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
    "logit_scale": "logit_scale",
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.ln_pre.weight": "vision_model.pre_layrnorm.weight",
    "visual.ln_pre.bias": "vision_model.pre_layrnorm.bias",
    "visual.ln_post.weight": "vision_model.post_layernorm.weight",
    "visual.ln_post.bias": "vision_model.post_layernorm.bias",
}
#: open_clip keeps these as (input, output), a linear layer as (output, input).
_TRANSPOSED = {"text_projection": "text_projection.weight", "visual.proj": "visual_projection.weight"}
_IN_BLOCK = {
    "attn.out_proj": "self_attn.out_proj",
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
#: Buffers that some versions of open_clip saved.
_IGNORED = ("attn_mask",)


class HPSv2:
    """The cosine of the image's and the prompt's embedding, as ``hpsv2.score`` gives it: about 0.2 to 0.4.

    clip: the model in transformers' classes. truncated: prompts longer than its 77 tokens, so far.
    """

    def __init__(self, clip: Clip) -> None:
        self.clip = clip

    @property
    def truncated(self) -> int:
        return self.clip.prompts.truncated if self.clip.prompts else 0

    def __call__(self, images: list[Image.Image], prompts: list[str]) -> list[float]:
        return self.clip.cosines(images, prompts)


def hpsv2(
    version: str = "v2.1",
    backend: str = "native",
    checkpoint: str | Path | None = None,
    tokenizer: str | Path = TOKENIZER,
    antialias: bool = True,
    device: str | None = None,
    dtype: str = "float32",
    batch_size: int = 16,
    offload: bool = False,
    allow_pickle: bool = False,
) -> HPSv2:
    """HPSv2 from its original checkpoint.

    Args:
        version: "v2.0" or "v2.1". backend: "native", or "package" for the PyPI package in an environment of its own.
        checkpoint: the file, its folder, or ``owner/name:file`` on the hub; the version's own when ``None``.
        tokenizer: folder or hub name of CLIP's tokenizer. antialias: whether a picture is smoothed as it is made
            smaller: torchvision does so from 0.17 on, and the package scores as the torchvision beside it does.
        allow_pickle: see :func:`rewards.learned.weight_files.read_state_dict`. device, dtype, batch_size, offload: see
            :class:`Placement`.

    Raises:
        FileNotFoundError: naming what to get. ValueError: a checkpoint that is not this, or an arg out of range.
        ImportError: when ftfy is missing.
    """
    if version not in FILES:
        raise ValueError(f"unknown version {version!r} of hpsv2. There are: {', '.join(FILES)}.")
    check_native("hpsv2", backend)
    clean = _cleaner()
    placement = Placement(device, dtype, offload, batch_size)
    path = weight_files.find_file(
        checkpoint or f"{REPOSITORY}:{FILES[version]}", reward="hpsv2", arg="checkpoint", file=FILES[version]
    )
    folder = weight_files.find_folder(tokenizer, weight_files.TOKENIZER, reward="hpsv2", arg="tokenizer")
    words = CLIPTokenizer.from_pretrained(folder)
    state = weight_files.read_state_dict(path, reward="hpsv2", allow_pickle=allow_pickle)
    model = build_clip(state, path)
    text = model.config.text_config
    limit, rows = text.max_position_embeddings, text.vocab_size
    prompts = Prompts(words, reward="hpsv2", limit=limit, pad=0, vocabulary=rows, clean=clean)  # open_clip pads by 0
    side = model.config.vision_config.image_size
    return HPSv2(Clip(model, prompts, lambda image: pixels(image, side, antialias), placement))


def build_clip(state: Mapping[str, Tensor], source: Path) -> CLIPModel:
    """A CLIPModel of the sizes and with the weights of an open_clip state dict.

    Raises:
        ValueError: naming the first keys that do not fit.
    """
    with no_init_weights():
        model = CLIPModel(_config(state, source))
    # Every weight is given below; the buffers, which are not saved, stand as they were made.
    weight_files.load_weights(model, rename(state), reward="hpsv2", source=source)
    return model


def _config(state: Mapping[str, Tensor], source: Path) -> CLIPConfig:
    def shape(key: str) -> tuple[int, ...]:
        return weight_files.need(state, key, reward="hpsv2", source=source)

    def tower(prefix: str, kind: str, width: int) -> dict[str, Any]:
        if width % HEAD_WIDTH[kind]:
            raise ValueError(
                f"{source} is no checkpoint of the reward 'hpsv2': its {kind} tower is {width} wide, no multiple of "
                f"{HEAD_WIDTH[kind]}"
            )
        return {
            "hidden_size": width,
            "num_attention_heads": width // HEAD_WIDTH[kind],
            "intermediate_size": shape(f"{prefix}resblocks.0.mlp.c_fc.weight")[0],
            "num_hidden_layers": weight_files.count_layers(state, f"{prefix}resblocks."),
            "hidden_act": "gelu",
        }

    positions, width = shape("positional_embedding")
    rows = shape("token_embedding.weight")[0]
    # An eos_token_id of 2 is transformers' sign for reading at the largest id, as open_clip does.
    text = {"max_position_embeddings": positions, "vocab_size": rows, "bos_token_id": 0, "eos_token_id": 2}
    patch = shape("visual.conv1.weight")[-1]
    patches, image_width = shape("visual.positional_embedding")
    side = weight_files.square_side(patches - 1, reward="hpsv2", source=source)
    vision = {"patch_size": patch, "image_size": side * patch}
    return CLIPConfig(
        text_config=text | tower("transformer.", "text", width),
        vision_config=vision | tower("visual.transformer.", "vision", image_width),
        projection_dim=shape("text_projection")[1],
    )


def rename(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """An open_clip state dict under transformers' names; a key that is not known keeps its own."""
    renamed: dict[str, Tensor] = {}
    for key, value in state.items():
        block = re.fullmatch(r"(visual\.)?transformer\.resblocks\.(\d+)\.(.+?)\.?([a-z]+)", key)
        if key in _IGNORED:
            continue
        if key in _TRANSPOSED:
            renamed[_TRANSPOSED[key]] = value.T
        elif block is None:
            renamed[_RENAMED.get(key, key)] = value
        else:
            tower = f"{'vision' if block[1] else 'text'}_model.encoder.layers.{block[2]}"
            if block[3] == "attn.in_proj_":  # query, key and value in one
                for name, third in zip("qkv", value.chunk(3), strict=True):
                    renamed[f"{tower}.self_attn.{name}_proj.{block[4]}"] = third
            else:
                renamed[f"{tower}.{_IN_BLOCK.get(block[3], block[3])}.{block[4]}"] = value
    return renamed


def pixels(image: Image.Image, side: int, antialias: bool) -> Tensor:
    """The longest side to `side` (bicubic), the rest black, normalised: (3, side, side).

    It is neither open_clip's preprocessing nor transformers': nothing is cropped. Black means 0 before normalising.
    """
    whole = to_tensor(image)
    # A side of less than half a pixel would vanish.
    height, width = (max(1, round(length * side / max(image.size))) for length in (image.height, image.width))
    if (height, width) != (image.height, image.width):
        whole = torch.nn.functional.interpolate(
            whole[None], size=(height, width), mode="bicubic", align_corners=False, antialias=antialias
        )[0]
    left, top = (side - width) // 2, (side - height) // 2
    whole = torch.nn.functional.pad(whole, (left, side - width - left, top, side - height - top))
    return normalize(whole)


def _cleaner() -> Callable[[str], str]:
    try:
        import ftfy
    except ImportError as error:
        raise ImportError("the reward 'hpsv2' needs the package ftfy: pip install \"flow-align[rewards]\"") from error

    def clean(prompt: str) -> str:
        """What open_clip does to a prompt before it is lower-cased, which the tokenizer does."""
        return html.unescape(html.unescape(ftfy.fix_text(prompt))).strip()

    return clean
