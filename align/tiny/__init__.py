"""The embedded default: a tiny real Qwen-Image with the recipe that made it, so that everything runs on a
laptop, offline.

`world` draws the prompts and pictures it knows, `text`, `vae` and `denoiser` make its parts, `build` makes
the whole.
"""

from pathlib import Path

CHECKPOINT = Path(__file__).parent / "checkpoint"  # what `QwenImagePipeline.from_pretrained` loads
# NAME/train.jsonl and NAME/test.jsonl, rows {"prompt": ..., "spec": {...}}
PROMPTS = Path(__file__).parent / "prompts"
# NAME/train and NAME/test, image folders with metadata.jsonl
IMAGES = Path(__file__).parent / "images"
