"""Hold a tiny but real Qwen-Image and the recipe that made it, so that everything runs offline on a laptop.

`world` makes the prompts and pictures; `text`, `vae` and `denoiser` make the components of the model; `build`
trains them and writes the checkpoint.
"""

from pathlib import Path

CHECKPOINT = Path(__file__).parent / "checkpoint"  # a folder for `QwenImagePipeline.from_pretrained`
# Files NAME/train.jsonl and NAME/test.jsonl, rows {"prompt": ..., "spec": {...}}
PROMPTS = Path(__file__).parent / "prompts"
# Folders NAME/train and NAME/test, image folders with metadata.jsonl
IMAGES = Path(__file__).parent / "images"
