"""The reward `imagereward` (Xu et al. 2023): BLIP, whose text tower attends to the image, and a linear head."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn
from transformers import BertTokenizer, BlipTextConfig, BlipVisionConfig, BlipVisionModel
from transformers.initialization import no_init_weights
from transformers.models.blip.modeling_blip_text import BlipTextModel

from rewards.learned import weight_files
from rewards.learned.packages import check_native
from rewards.learned.running import LinearStack, Placement, Prompts, check_pairs, crop_long_ends, normalize, to_tensor
from rewards.pictures import to_rgb

CHECKPOINT = "THUDM/ImageReward:ImageReward.pt"
TOKENIZER = "google-bert/bert-base-uncased"
#: Tokens that BLIP adds to BERT's vocabulary, in this order.
ADDED_TOKENS = ("[DEC]", "[ENC]")
#: How many tokens of a prompt the authors' code reads.
LIMIT = 35
#: Of the raw scores on the authors' data, on which the reward thus has mean 0 and standard deviation 1.
MEAN, STD = 0.16717362830052426, 1.0333394966054072
#: The width of an attention head in both towers, which a state dict does not contain.
HEAD_WIDTH = 64

#: Keys of BLIP's other tasks, and of a buffer that is no longer saved.
_IGNORED = ("blip.vision_proj.", "blip.text_proj.", "blip.text_encoder.embeddings.position_ids")
_VISION_PREFIXES = (
    ("cls_token", "embeddings.class_embedding"),
    ("pos_embed", "embeddings.position_embedding"),
    ("patch_embed.proj.", "embeddings.patch_embedding."),
    ("norm.", "post_layernorm."),
)
_BLOCK_PREFIXES = (
    ("norm1.", "layer_norm1."),
    ("norm2.", "layer_norm2."),
    ("attn.qkv.", "self_attn.qkv."),
    ("attn.proj.", "self_attn.projection."),
)


class ImageRewardModel(nn.Module):
    """BLIP's image tower, its text tower with cross-attention, and the head."""

    def __init__(self, vision: BlipVisionConfig, text: BlipTextConfig, head: LinearStack) -> None:
        super().__init__()
        self.vision = BlipVisionModel(vision)
        self.text = BlipTextModel(text, add_pooling_layer=False)
        self.mlp = head

    def forward(self, ids: Tensor, mask: Tensor, pixels: Tensor) -> Tensor:
        """Return scores (N,) in float32 for prompts (N, L) and images (N, 3, side, side)."""
        image_states = self.vision(pixel_values=pixels).last_hidden_state
        text = self.text(input_ids=ids, attention_mask=mask, encoder_hidden_states=image_states, is_decoder=False)
        raw = self.mlp(text.last_hidden_state[:, 0].float())[:, 0]
        return (raw - MEAN) / STD


class ImageReward:
    """The authors' normalised score: about -2 to 2."""

    def __init__(self, model: ImageRewardModel, prompts: Prompts, placement: Placement) -> None:
        self.model = model.eval().requires_grad_(False).to(placement.torch_dtype)
        self.model.mlp.float()  # as in the authors' code
        self.prompts, self.placement = prompts, placement

    @property
    def truncated(self) -> int:
        """How many prompts so far were longer than 35 tokens."""
        return self.prompts.truncated

    def __call__(self, images: list[Image.Image], prompts: list[str]) -> list[float]:
        check_pairs(images, prompts)
        if not images:
            return []
        side: int = self.model.vision.config.image_size
        scores: list[float] = []
        ids, mask = self.prompts(prompts)
        with self.placement.running(self.model) as device:
            for batch in self.placement.batches(len(images)):
                inputs = torch.stack([pixels(to_rgb(image), side) for image in images[batch]])
                inputs = inputs.to(device, self.placement.torch_dtype)
                scores += self.model(ids[batch].to(device), mask[batch].to(device), inputs).tolist()
        return scores


def imagereward(
    backend: str = "native",
    checkpoint: str | Path = CHECKPOINT,
    tokenizer: str | Path = TOKENIZER,
    device: str | None = None,
    dtype: str = "float32",
    batch_size: int = 16,
    offload: bool = False,
    allow_pickle: bool = False,
) -> ImageReward:
    """Load ImageReward from its original checkpoint.

    Args:
        backend: "native", or "package" for the PyPI package in its own environment. checkpoint: the file, its folder,
            or ``owner/name:file`` on the hub. tokenizer: folder or hub name of BERT's uncased tokenizer. allow_pickle:
            see :func:`rewards.learned.weight_files.read_state_dict`. device, dtype, batch_size, offload: see
            :class:`Placement`.

    Raises:
        FileNotFoundError: a file is missing, with how to get it. ValueError: a checkpoint of another model, or an
            argument out of range.
    """
    check_native("imagereward", backend)
    placement = Placement(device, dtype, offload, batch_size)
    path = weight_files.find_file(checkpoint, reward="imagereward", arg="checkpoint", file="ImageReward.pt")
    folder = weight_files.find_folder(tokenizer, weight_files.TOKENIZER_FILES, reward="imagereward", arg="tokenizer")
    bert_tokenizer = BertTokenizer.from_pretrained(folder)
    bert_tokenizer.add_tokens(list(ADDED_TOKENS), special_tokens=True)
    state = weight_files.read_state_dict(path, reward="imagereward", allow_pickle=allow_pickle)
    model = build_model(state, path)
    prompts = Prompts(
        bert_tokenizer,
        reward="imagereward",
        limit=LIMIT,
        pad=bert_tokenizer.pad_token_id,
        vocabulary=model.text.config.vocab_size,
    )
    return ImageReward(model, prompts, placement)


def build_model(state: Mapping[str, Tensor], source: Path) -> ImageRewardModel:
    """Build the model with the sizes and weights of the authors' state dict.

    Raises:
        ValueError: naming the first keys that do not fit.
    """
    vision, text = _configs(state, source)
    head = LinearStack({key.removeprefix("mlp."): value for key, value in state.items()})
    with no_init_weights():
        model = ImageRewardModel(vision, text, head)
    weight_files.load_weights(model, rename(state), reward="imagereward", source=source)
    return model


def _configs(state: Mapping[str, Tensor], source: Path) -> tuple[BlipVisionConfig, BlipTextConfig]:
    def shape(key: str) -> tuple[int, ...]:
        return weight_files.shape_of(state, key, reward="imagereward", source=source)

    image_prefix, text_prefix = "blip.visual_encoder.", "blip.text_encoder."
    width, _, _, patch = shape(f"{image_prefix}patch_embed.proj.weight")
    rows, text_width = shape(f"{text_prefix}embeddings.word_embeddings.weight")
    for tower, found in (("image", width), ("text", text_width)):
        if found % HEAD_WIDTH:
            raise ValueError(
                f"{source} is not a checkpoint of the reward 'imagereward': its {tower} tower is {found} wide, not a "
                f"multiple of {HEAD_WIDTH}"
            )
    patches = shape(f"{image_prefix}pos_embed")[1] - 1
    vision = BlipVisionConfig(
        hidden_size=width,
        num_attention_heads=width // HEAD_WIDTH,
        intermediate_size=shape(f"{image_prefix}blocks.0.mlp.fc1.weight")[0],
        num_hidden_layers=weight_files.count_layers(state, f"{image_prefix}blocks."),
        patch_size=patch,
        image_size=patch * weight_files.square_side(patches, reward="imagereward", source=source),
        layer_norm_eps=1e-6,
        hidden_act="gelu",
    )
    text = BlipTextConfig(
        vocab_size=rows,
        hidden_size=text_width,
        num_attention_heads=text_width // HEAD_WIDTH,
        encoder_hidden_size=width,
        intermediate_size=shape(f"{text_prefix}encoder.layer.0.intermediate.dense.weight")[0],
        num_hidden_layers=weight_files.count_layers(state, f"{text_prefix}encoder.layer."),
        max_position_embeddings=shape(f"{text_prefix}embeddings.position_embeddings.weight")[0],
        layer_norm_eps=1e-12,
        hidden_act="gelu",
        is_decoder=True,  # needed for cross-attention; it is called as an encoder
        pad_token_id=0,
        bos_token_id=None,  # it generates nothing, and transformers' defaults need the full vocabulary of BERT
        eos_token_id=None,
        sep_token_id=None,
    )
    return vision, text


def rename(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the keys of the authors' state dict to those of :class:`ImageRewardModel`; an unknown key is kept."""
    renamed = {}
    for key, value in state.items():
        if key.startswith(_IGNORED):
            continue
        name = key
        if key.startswith("blip.text_encoder."):
            name = "text." + key.removeprefix("blip.text_encoder.")
        elif key.startswith("blip.visual_encoder."):
            inner = key.removeprefix("blip.visual_encoder.")
            block = re.match(r"blocks\.(\d+)\.", inner)
            start = f"vision.encoder.layers.{block[1]}." if block else "vision."
            name = start + _replace_prefix(
                inner[block.end() :] if block else inner, _BLOCK_PREFIXES if block else _VISION_PREFIXES
            )
        renamed[name] = value
    return renamed


def _replace_prefix(name: str, prefixes: tuple[tuple[str, str], ...]) -> str:
    for old, new in prefixes:
        if name.startswith(old):
            return new + name.removeprefix(old)
    return name


def pixels(image: Image.Image, side: int) -> Tensor:
    """Resize an image so that its shortest side is `side` (bicubic), crop its centre, and normalise: (3, side, side).

    Sizes are rounded as in torchvision, which the authors use; transformers' image processor differs by a pixel.
    """
    image = crop_long_ends(image)
    shortest = min(image.size)
    width, height = (side if length == shortest else int(side * length / shortest) for length in image.size)
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = round((width - side) / 2), round((height - side) / 2)
    return normalize(to_tensor(image.crop((left, top, left + side, top + side))))
