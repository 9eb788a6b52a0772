"""Checkpoints of real model classes with small configurations and random weights, written to a folder."""

import json
from pathlib import Path

import torch
from transformers import (
    AutoImageProcessor,
    CLIPConfig,
    CLIPModel,
    CLIPTokenizer,
    Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation,
    SwinConfig,
)

LABELS = ("person", "bicycle", "sofa")


def small_detector() -> Mask2FormerConfig:
    """A Mask2Former of three classes and six queries."""
    swin = SwinConfig(
        image_size=64,
        embed_dim=8,
        depths=[1, 1, 1, 1],
        num_heads=[1, 1, 2, 2],
        window_size=4,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )
    return Mask2FormerConfig(
        backbone_config=swin,
        feature_size=32,
        mask_feature_size=32,
        hidden_dim=32,
        encoder_feedforward_dim=32,
        dim_feedforward=32,
        encoder_layers=1,
        decoder_layers=3,
        num_attention_heads=2,
        num_queries=6,
        id2label=dict(enumerate(LABELS)),
    )


def write_detector(folder: Path, sure_of: str | None = None, config: Mask2FormerConfig | None = None) -> Path:
    """A Mask2Former, small where no config is given; `sure_of`: its every query says this class with certainty."""
    torch.manual_seed(0)
    model = Mask2FormerForUniversalSegmentation(config or small_detector())
    if sure_of is not None:
        with torch.no_grad():
            model.class_predictor.bias[LABELS.index(sure_of)] += 20
    model.save_pretrained(folder)
    side = model.config.backbone_config.image_size
    settings = {"image_processor_type": "Mask2FormerImageProcessor", "size": {"height": side, "width": side}}
    settings |= {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225], "ignore_index": 255}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    AutoImageProcessor.from_pretrained(folder)  # it can be read back
    return folder


def write_clip(folder: Path) -> Path:
    """A CLIP with its image processor and a tokenizer of single letters."""
    torch.manual_seed(1)
    folder.mkdir(parents=True, exist_ok=True)
    letters = [chr(code) for code in range(33, 127)]
    words = ["<|startoftext|>", "<|endoftext|>", *letters, *(letter + "</w>" for letter in letters)]
    (folder / "vocab.json").write_text(json.dumps({word: index for index, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = CLIPTokenizer.from_pretrained(folder, model_max_length=77)
    tokenizer.save_pretrained(folder)
    tower = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    ends = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    text = tower | ends | {"vocab_size": len(words), "max_position_embeddings": 77}
    vision = tower | {"image_size": 32, "patch_size": 8}
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=12)).save_pretrained(folder)
    settings = {"image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": 32}}
    settings |= {"crop_size": {"height": 32, "width": 32}, "do_center_crop": True, "do_convert_rgb": True}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    return folder
