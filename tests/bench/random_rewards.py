"""Write checkpoints of the learned rewards in full size with random weights, to time them without a hub.

    python tests/bench/random_rewards.py FOLDER

The checkpoints take 11 GB in FOLDER. FOLDER/rewards.yaml names them, for tests/bench/reward_service.py --config. The
scores mean nothing, and GenEval's detector finds nothing, but the computation is that of the published checkpoints.
"""

import argparse
import sys
from pathlib import Path

import yaml
from transformers import Mask2FormerConfig, SwinConfig

sys.path.insert(0, str(Path(__file__).parents[1] / "helpers"))

from reward_checkpoints import (
    BlipSizes,
    ClipSizes,
    write_bert_tokenizer,
    write_clip,
    write_clip_tokenizer,
    write_head,
    write_hpsv2,
    write_imagereward,
)
from tiny_vision import write_detector

VIT_H = ClipSizes(image=(1280, 32), text=(1024, 24), wider=4, side=224, patch=14, out=1024)
IMAGEREWARD = BlipSizes((1024, 24), (768, 12), wider=4, side=224, patch=16, length=512, head=(1024, 128, 64, 16, 1))


def tower(width: int, layers: int, heads: int, **settings: int) -> dict:
    """Return the config of one tower of a CLIP; `settings` are added to it."""
    sizes = {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads}
    return sizes | {"intermediate_size": 4 * width} | settings


def swin_small() -> Mask2FormerConfig:
    """Return the config of facebook/mask2former-swin-small-coco-instance.

    It has 100 queries, the 80 classes of COCO, and images of 800 x 800 pixels.
    """
    stages = [f"stage{n}" for n in range(1, 5)]
    backbone = SwinConfig(image_size=800, depths=[2, 2, 18, 2], num_heads=[3, 6, 12, 24], out_features=stages)
    labels = {n: "person" if n == 0 else f"class {n}" for n in range(80)}
    return Mask2FormerConfig(backbone_config=backbone, num_queries=100, id2label=labels)


def main() -> None:
    """Write all checkpoints and rewards.yaml, and print its path."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder.resolve()
    clip_tokenizer, bert_tokenizer = write_clip_tokenizer(folder / "words"), write_bert_tokenizer(folder / "bert")
    write_hpsv2(folder / "HPS_v2.1_compressed.pt", 49408, VIT_H)
    write_imagereward(folder / "ImageReward.pt", 30524, IMAGEREWARD)
    image = {"image_size": 224, "patch_size": 14}
    huge = write_clip(folder / "vit-h", tower(1024, 24, 16), tower(1280, 32, 16, **image), 1024)
    large = write_clip(folder / "vit-l", tower(768, 12, 12), tower(1024, 24, 16, **image), 768)
    write_head(folder / "aesthetic.pth", 768, (1024, 128, 64, 16, 1))
    detector = write_detector(folder / "detector", config=swin_small())
    args = {
        "hpsv2": {"checkpoint": folder / "HPS_v2.1_compressed.pt", "tokenizer": clip_tokenizer},
        "imagereward": {"checkpoint": folder / "ImageReward.pt", "tokenizer": bert_tokenizer},
        "pickscore": {"checkpoint": huge},
        "clipscore": {"checkpoint": large},
        "aesthetic": {"checkpoint": large, "head": folder / "aesthetic.pth"},
        "geneval": {"detector": detector, "clip": large},
    }
    entries = [{"use": use, "args": {key: str(path) for key, path in paths.items()}} for use, paths in args.items()]
    config = folder / "rewards.yaml"
    config.write_text(yaml.safe_dump({"rewards": entries}, sort_keys=False))
    print(config)


if __name__ == "__main__":
    main()
