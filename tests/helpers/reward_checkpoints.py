"""Small checkpoints of learned rewards, each in its own format, and what those formats mean in plain torch.

`OpenClip` and `Blip` carry the names of the original code (open_clip, and BLIP with timm's vision tower), so that their
state dict is a checkpoint and their forward says what the reward must be. Only `RewardWorld.make` uses rewards/.
"""

import itertools
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F
from transformers import BertTokenizer, CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPTokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

from rewards import load_rewards

MEAN, STD = np.array([0.48145466, 0.4578275, 0.40821073]), np.array([0.26862954, 0.26130258, 0.27577711])
WORDS = ["a", "red", "cat", "on", "the", "table", "photo", "of", "dog", "with", "blue", "hat", "&", "quick"]


def write_clip_tokenizer(folder: Path) -> Path:
    """CLIP's byte-level BPE with merges for a few words; 77 tokens are read of it as of any CLIP's."""
    alphabet = list(bytes_to_unicode().values())
    merges, vocabulary = [], alphabet + [letter + "</w>" for letter in alphabet]
    for word in WORDS:
        parts = [*word[:-1], word[-1] + "</w>"]
        while len(parts) > 1:
            if (parts[0], parts[1]) not in merges:
                merges.append((parts[0], parts[1]))
                vocabulary.append(parts[0] + parts[1])
            parts = [parts[0] + parts[1], *parts[2:]]
    vocabulary = [*dict.fromkeys(vocabulary), "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({token: row for row, token in enumerate(vocabulary)}))
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n")
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "CLIPTokenizer"}))
    return folder


def write_bert_tokenizer(folder: Path) -> Path:
    """BERT's WordPiece, uncased, with the special tokens where bert-base-uncased has them."""
    special = ["[PAD]", *(f"[unused{n}]" for n in range(99)), "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    letters = [chr(n) for n in range(33, 127) if not chr(n).isupper()]
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = dict.fromkeys([*special, *letters, *(f"##{letter}" for letter in letters), *WORDS])
    (folder / "vocab.txt").write_text("\n".join(vocabulary) + "\n")
    return folder


SMALL_TEXT = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
SMALL_VISION = {
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 24,
    "patch_size": 8,
}


def write_clip(
    folder: Path, text: dict = SMALL_TEXT, vision: dict = SMALL_VISION, out: int = 20, seed: int = 0
) -> Path:
    """A CLIP in transformers' format: model, tokenizer and image processor."""
    torch.manual_seed(seed)
    tokenizer = CLIPTokenizer.from_pretrained(write_clip_tokenizer(folder))
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    config = CLIPConfig(
        text_config={"vocab_size": len(tokenizer), **ends, **text},
        vision_config=vision,
        projection_dim=out,
        logit_scale_init_value=3.0,
    )
    model = CLIPModel(config)
    for parameter in model.parameters():  # as they come, all pictures look alike to it
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    model.save_pretrained(folder)
    side = vision["image_size"]
    CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size={"height": side, "width": side}).save_pretrained(
        folder
    )
    return folder


class Block(nn.Module):
    def __init__(self, width: int, heads: int, wider: int) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.mlp = nn.ModuleDict({"c_fc": nn.Linear(width, wider * width), "c_proj": nn.Linear(wider * width, width)})

    def forward(self, x, mask=None):
        y = self.ln_1(x)
        x = x + self.attn(y, y, y, attn_mask=mask, need_weights=False)[0]
        return x + self.mlp["c_proj"](F.gelu(self.mlp["c_fc"](self.ln_2(x))))


class Transformer(nn.Module):
    def __init__(self, width: int, heads: int, layers: int, wider: int) -> None:
        super().__init__()
        self.resblocks = nn.ModuleList([Block(width, heads, wider) for _ in range(layers)])


class Visual(nn.Module):
    def __init__(self, width: int, layers: int, side: int, patch: int, out: int, wider: int) -> None:
        super().__init__()
        self.class_embedding = nn.Parameter(torch.randn(width))
        self.positional_embedding = nn.Parameter(torch.randn((side // patch) ** 2 + 1, width))
        self.proj = nn.Parameter(torch.randn(width, out))
        self.conv1 = nn.Conv2d(3, width, patch, stride=patch, bias=False)
        self.ln_pre, self.ln_post = nn.LayerNorm(width), nn.LayerNorm(width)
        self.transformer = Transformer(width, width // 80, layers, wider)

    def forward(self, pixels):
        x = self.conv1(pixels).flatten(2).transpose(1, 2)
        x = torch.cat([self.class_embedding.expand(len(x), 1, -1), x], dim=1) + self.positional_embedding
        x = self.ln_pre(x)
        for block in self.transformer.resblocks:
            x = block(x)
        return self.ln_post(x[:, 0]) @ self.proj


@dataclass(frozen=True)
class ClipSizes:
    """Widths and layers of the image and of the text tower; the feed-forward layers are `wider` times as wide."""

    image: tuple[int, int] = (160, 2)
    text: tuple[int, int] = (128, 2)
    wider: int = 2
    side: int = 28
    patch: int = 7
    length: int = 77
    out: int = 20


SMALL_CLIP = ClipSizes()


class OpenClip(nn.Module):
    """open_clip's CLIP with heads as wide as those of ViT-H/14: 80 in the image tower, 64 in the text tower."""

    def __init__(self, vocabulary: int, sizes: ClipSizes) -> None:
        super().__init__()
        (width, layers), out, length = sizes.text, sizes.out, sizes.length
        self.visual = Visual(*sizes.image, sizes.side, sizes.patch, out, sizes.wider)
        self.positional_embedding = nn.Parameter(torch.randn(length, width))
        self.text_projection = nn.Parameter(torch.randn(width, out))
        self.logit_scale = nn.Parameter(torch.tensor(4.6))
        self.token_embedding = nn.Embedding(vocabulary, width)
        self.transformer = Transformer(width, width // 64, layers, sizes.wider)
        self.ln_final = nn.LayerNorm(width)

    def forward(self, pixels, ids):
        """Cosines (N,) of pixels (N, 3, side, side) and ids (N, length)."""
        x = self.token_embedding(ids) + self.positional_embedding
        mask = torch.full((x.shape[1], x.shape[1]), -math.inf).triu(1)
        for block in self.transformer.resblocks:
            x = block(x, mask)
        text = self.ln_final(x)[torch.arange(len(ids)), ids.argmax(-1)] @ self.text_projection
        return F.cosine_similarity(self.visual(pixels), text)


def write_hpsv2(file: Path, vocabulary: int, sizes: ClipSizes = SMALL_CLIP, seed: int = 0) -> OpenClip:
    torch.manual_seed(seed)
    model = OpenClip(vocabulary, sizes)
    torch.save({"state_dict": model.state_dict(), "epoch": 1}, file)
    return model.eval()


def bert_attention(module, queries, keys, heads, mask=None):
    q, k, v = module["query"](queries), module["key"](keys), module["value"](keys)
    q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)


def bert_part(width: int, keys: int) -> nn.ModuleDict:
    layers = {"query": nn.Linear(width, width), "key": nn.Linear(keys, width), "value": nn.Linear(keys, width)}
    out = {"dense": nn.Linear(width, width), "LayerNorm": nn.LayerNorm(width, eps=1e-12)}
    return nn.ModuleDict({"self": nn.ModuleDict(layers), "output": nn.ModuleDict(out)})


@dataclass(frozen=True)
class BlipSizes:
    """Widths and layers of the image and of the text tower; the head's layers after the text tower's width."""

    image: tuple[int, int] = (128, 2)
    text: tuple[int, int] = (64, 2)
    wider: int = 2
    side: int = 32
    patch: int = 8
    length: int = 64
    head: tuple[int, ...] = (24, 16, 12, 8, 1)


SMALL_BLIP = BlipSizes()


class Blip(nn.Module):
    """ImageReward: timm's vision tower, BERT with cross-attention, the head; heads are 64 wide."""

    def __init__(self, vocabulary: int, sizes: BlipSizes) -> None:
        super().__init__()
        (wide, layers), (width, text_layers), patch, wider = sizes.image, sizes.text, sizes.patch, sizes.wider
        self.heads = {"vision": wide // 64, "text": width // 64}
        vision = nn.Module()
        vision.cls_token = nn.Parameter(torch.randn(1, 1, wide))
        vision.pos_embed = nn.Parameter(torch.randn(1, (sizes.side // patch) ** 2 + 1, wide))
        vision.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, wide, patch, stride=patch)})
        vision.blocks = nn.ModuleList([self.vision_block(wide, wider) for _ in range(layers)])
        vision.norm = nn.LayerNorm(wide, eps=1e-6)
        text = nn.Module()
        text.embeddings = nn.ModuleDict(
            {
                "word_embeddings": nn.Embedding(vocabulary, width),
                "position_embeddings": nn.Embedding(sizes.length, width),
                "LayerNorm": nn.LayerNorm(width, eps=1e-12),
            }
        )
        text.embeddings.register_buffer("position_ids", torch.arange(sizes.length)[None])
        blocks = [self.text_block(width, wide, wider) for _ in range(text_layers)]
        text.encoder = nn.ModuleDict({"layer": nn.ModuleList(blocks)})
        unused = {"vision_proj": nn.Linear(wide, 8), "text_proj": nn.Linear(width, 8)}
        self.blip = nn.ModuleDict({"visual_encoder": vision, "text_encoder": text, **unused})
        linear = [nn.Linear(a, b) for a, b in itertools.pairwise((width, *sizes.head))]
        idle = nn.Dropout(0.2)
        layers = nn.Sequential(linear[0], idle, linear[1], idle, linear[2], idle, linear[3], linear[4])
        self.mlp = nn.ModuleDict({"layers": layers})

    @staticmethod
    def vision_block(width: int, wider: int) -> nn.ModuleDict:
        attention = {"qkv": nn.Linear(width, 3 * width), "proj": nn.Linear(width, width)}
        mlp = {"fc1": nn.Linear(width, wider * width), "fc2": nn.Linear(wider * width, width)}
        norms = {f"norm{n}": nn.LayerNorm(width, eps=1e-6) for n in (1, 2)}
        return nn.ModuleDict({**norms, "attn": nn.ModuleDict(attention), "mlp": nn.ModuleDict(mlp)})

    @staticmethod
    def text_block(width: int, keys: int, wider: int) -> nn.ModuleDict:
        out = {"dense": nn.Linear(wider * width, width), "LayerNorm": nn.LayerNorm(width, eps=1e-12)}
        return nn.ModuleDict(
            {
                "attention": bert_part(width, width),
                "crossattention": bert_part(width, keys),
                "intermediate": nn.ModuleDict({"dense": nn.Linear(width, wider * width)}),
                "output": nn.ModuleDict(out),
            }
        )

    def see(self, pixels):
        vision, heads = self.blip["visual_encoder"], self.heads["vision"]
        x = vision.patch_embed["proj"](pixels).flatten(2).transpose(1, 2)
        x = torch.cat([vision.cls_token.expand(len(x), -1, -1), x], dim=1) + vision.pos_embed
        for block in vision.blocks:
            qkv = block["attn"]["qkv"](block["norm1"](x)).chunk(3, dim=-1)
            q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in qkv)
            x = x + block["attn"]["proj"](F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
            x = x + block["mlp"]["fc2"](F.gelu(block["mlp"]["fc1"](block["norm2"](x))))
        return vision.norm(x)

    def forward(self, pixels, ids, mask):
        """Normalised scores (N,) of pixels (N, 3, side, side), ids and mask (N, 35)."""
        seen, text, heads = self.see(pixels), self.blip["text_encoder"], self.heads["text"]
        mask = mask[:, None, None, :].bool()
        e = text.embeddings
        x = e["LayerNorm"](e["word_embeddings"](ids) + e["position_embeddings"].weight[: ids.shape[1]])
        for layer in text.encoder["layer"]:
            for part, keys, visible in (("attention", None, mask), ("crossattention", seen, None)):
                inner, out = layer[part]["self"], layer[part]["output"]
                read = bert_attention(inner, x, x if keys is None else keys, heads, visible)
                x = out["LayerNorm"](out["dense"](read) + x)
            wide = F.gelu(layer["intermediate"]["dense"](x))
            x = layer["output"]["LayerNorm"](layer["output"]["dense"](wide) + x)
        return (self.mlp["layers"](x[:, 0])[:, 0] - 0.16717362830052426) / 1.0333394966054072


def write_imagereward(file: Path, vocabulary: int, sizes: BlipSizes = SMALL_BLIP, seed: int = 0) -> Blip:
    torch.manual_seed(seed)
    model = Blip(vocabulary, sizes).eval()
    for parameter in model.parameters():
        if parameter.ndim == 2:
            nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    torch.save(model.state_dict(), file)
    return model


def write_head(file: Path, width: int, sizes: Sequence[int] = (16, 12, 8, 4, 1), seed: int = 0) -> nn.Sequential:
    """LAION's head: five linear layers, dropout between them, in the authors' .pth."""
    torch.manual_seed(seed)
    linear = [nn.Linear(a, b) for a, b in itertools.pairwise((width, *sizes))]
    idle = nn.Dropout(0.2)
    layers = nn.Sequential(linear[0], idle, linear[1], idle, linear[2], idle, linear[3], linear[4]).eval()
    torch.save({f"layers.{name}": value for name, value in layers.state_dict().items()}, file)
    return layers


def normalized(image: Image.Image) -> torch.Tensor:
    """An RGB image, already of the model's size, as the towers take it."""
    pixels = (np.asarray(image, dtype=np.float64) / 255 - MEAN) / STD
    return torch.from_numpy(pixels).float().permute(2, 0, 1)


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)


PICTURES = [picture(64, 48, 1), picture(40, 90, 2), picture(28, 28, 3), picture(200, 10, 4)]


PROMPTS = ["a red cat on the table", "Photo of a DOG with blue hat", "a", "“quick” &amp;amp; caf\u00c3\u00a9 3.14!!"]


class RewardWorld:
    """All of these checkpoints in a folder, and the models they were written from."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.words, self.bert = write_clip_tokenizer(folder / "words"), write_bert_tokenizer(folder / "bert")
        self.clip_rows = len(CLIPTokenizer.from_pretrained(self.words))
        self.bert_rows = len(BertTokenizer.from_pretrained(self.bert)) + 2
        self.hps = write_hpsv2(folder / "HPS_v2.1_compressed.pt", self.clip_rows)
        self.blip = write_imagereward(folder / "ImageReward.pt", self.bert_rows)
        self.clip = write_clip(folder / "clip")
        self.head = write_head(folder / "aesthetic.pth", 20)
        self.args = {
            "hpsv2": {"checkpoint": str(folder), "tokenizer": str(self.words)},
            "imagereward": {"checkpoint": str(folder / "ImageReward.pt"), "tokenizer": str(self.bert)},
            "pickscore": {"checkpoint": str(self.clip)},
            "clipscore": {"checkpoint": str(self.clip)},
            "aesthetic": {"checkpoint": str(self.clip), "head": str(folder / "aesthetic.pth")},
        }

    def make(self, name: str, **args):
        return load_rewards([{"use": name, "args": {**self.args[name], **args}}])[0].function
