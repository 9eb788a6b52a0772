"""The reward `hpsv2` (HPSv2 and HPSv2.1, Wu et al. 2023): open_clip's ViT-H/14 trained on human preferences."""

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

from rewards.hints import nearest
from rewards.learned import weight_files
from rewards.learned.clip import Clip
from rewards.learned.packages import check_native
from rewards.learned.running import Placement, Prompts, normalize, to_tensor

FILES = {"v2.0": "HPS_v2_compressed.pt", "v2.1": "HPS_v2.1_compressed.pt"}
REPOSITORY = "xswu/HPSv2"
TOKENIZER = "openai/clip-vit-large-patch14"
#: The width of an attention head in each tower, which a state dict does not contain.
HEAD_WIDTH = {"vision": 80, "text": 64}

_NAMES = {
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
#: open_clip stores these as (input, output), a linear layer as (output, input).
_TRANSPOSED = {"text_projection": "text_projection.weight", "visual.proj": "visual_projection.weight"}
_BLOCK_NAMES = {
    "attn.out_proj": "self_attn.out_proj",
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
#: Buffers that some versions of open_clip saved.
_IGNORED = ("attn_mask",)


class HPSv2:
    """The cosine of the image's and the prompt's embedding, as ``hpsv2.score`` gives it: about 0.2 to 0.4."""

    def __init__(self, clip: Clip) -> None:
        self.clip = clip

    @property
    def truncated(self) -> int:
        """How many prompts so far were longer than the model's 77 tokens."""
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
    """Load HPSv2 from its original checkpoint.

    Args:
        version: "v2.0" or "v2.1". backend: "native", or "package" for the PyPI package in its own environment.
        checkpoint: the file, its folder, or ``owner/name:file`` on the hub; None for the version's own.
        tokenizer: folder or hub name of CLIP's tokenizer. antialias: whether an image is smoothed when it is shrunk, as
            torchvision does from 0.17 on; the package scores like the torchvision that is installed beside it.
        allow_pickle: see :func:`rewards.learned.weight_files.read_state_dict`. device, dtype, batch_size, offload: see
            :class:`Placement`.

    Raises:
        FileNotFoundError: a file is missing, with how to get it. ValueError: a checkpoint of another model, or an
            argument out of range. ImportError: ftfy is missing.
    """
    if version not in FILES:
        raise ValueError(f"unknown version {version!r} of hpsv2.{nearest(version, FILES)}")
    check_native("hpsv2", backend)
    clean = _cleaner()
    placement = Placement(device, dtype, offload, batch_size)
    path = weight_files.find_file(
        checkpoint or f"{REPOSITORY}:{FILES[version]}", reward="hpsv2", arg="checkpoint", file=FILES[version]
    )
    folder = weight_files.find_folder(tokenizer, weight_files.TOKENIZER_FILES, reward="hpsv2", arg="tokenizer")
    clip_tokenizer = CLIPTokenizer.from_pretrained(folder)
    state = weight_files.read_state_dict(path, reward="hpsv2", allow_pickle=allow_pickle)
    model = build_clip(state, path)
    text = model.config.text_config
    prompts = Prompts(
        clip_tokenizer,
        reward="hpsv2",
        limit=text.max_position_embeddings,
        pad=0,  # as open_clip pads
        vocabulary=text.vocab_size,
        clean=clean,
    )
    side = model.config.vision_config.image_size
    return HPSv2(Clip(model, prompts, lambda image: pixels(image, side, antialias), placement))


def build_clip(state: Mapping[str, Tensor], source: Path) -> CLIPModel:
    """Build a CLIPModel with the sizes and weights of an open_clip state dict.

    Raises:
        ValueError: naming the first keys that do not fit.
    """
    with no_init_weights():
        model = CLIPModel(_config(state, source))
    # Every weight is loaded below; the buffers, which are not saved, keep their initial values.
    weight_files.load_weights(model, rename(state), reward="hpsv2", source=source)
    return model


def _config(state: Mapping[str, Tensor], source: Path) -> CLIPConfig:
    def shape(key: str) -> tuple[int, ...]:
        return weight_files.shape_of(state, key, reward="hpsv2", source=source)

    def tower(prefix: str, kind: str, width: int) -> dict[str, Any]:
        if width % HEAD_WIDTH[kind]:
            raise ValueError(
                f"{source} is not a checkpoint of the reward 'hpsv2': its {kind} tower is {width} wide, not a multiple of "
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
    # With an eos_token_id of 2 transformers reads the position with the largest id, as open_clip does.
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
    """Rename the keys of an open_clip state dict to transformers' names; an unknown key is kept."""
    renamed: dict[str, Tensor] = {}
    for key, value in state.items():
        block = re.fullmatch(r"(visual\.)?transformer\.resblocks\.(\d+)\.(.+?)\.?([a-z]+)", key)
        if key in _IGNORED:
            continue
        if key in _TRANSPOSED:
            renamed[_TRANSPOSED[key]] = value.T
        elif block is None:
            renamed[_NAMES.get(key, key)] = value
        else:
            tower = f"{'vision' if block[1] else 'text'}_model.encoder.layers.{block[2]}"
            if block[3] == "attn.in_proj_":  # query, key and value in one tensor
                for name, third in zip("qkv", value.chunk(3), strict=True):
                    renamed[f"{tower}.self_attn.{name}_proj.{block[4]}"] = third
            else:
                renamed[f"{tower}.{_BLOCK_NAMES.get(block[3], block[3])}.{block[4]}"] = value
    return renamed


def pixels(image: Image.Image, side: int, antialias: bool) -> Tensor:
    """Resize an image so that its longest side is `side` (bicubic), pad it with black, and normalise: (3, side, side).

    Unlike the preprocessing of open_clip and of transformers it crops nothing. Black is 0 before normalising.
    """
    resized = to_tensor(image)
    # At least one pixel: a side of less than half a pixel would be rounded to 0.
    height, width = (max(1, round(length * side / max(image.size))) for length in (image.height, image.width))
    if (height, width) != (image.height, image.width):
        resized = torch.nn.functional.interpolate(
            resized[None], size=(height, width), mode="bicubic", align_corners=False, antialias=antialias
        )[0]
    left, top = (side - width) // 2, (side - height) // 2
    resized = torch.nn.functional.pad(resized, (left, side - width - left, top, side - height - top))
    return normalize(resized)


def _cleaner() -> Callable[[str], str]:
    """Return the function that cleans prompts; raise ImportError without ftfy."""
    try:
        import ftfy
    except ImportError as error:
        raise ImportError("the reward 'hpsv2' needs the package ftfy: pip install \"flow-align[rewards]\"") from error

    def clean(prompt: str) -> str:
        """Clean a prompt as open_clip does, except for lower-casing, which the tokenizer does."""
        return html.unescape(html.unescape(ftfy.fix_text(prompt))).strip()

    return clean
