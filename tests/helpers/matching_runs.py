"""Short SFT and DPO runs on the embedded model."""

import math

import torch
from peft import LoraConfig

from align.dpo import DPOConfig, DPOTrainer
from align.models.families import load_model
from align.sft import SFTConfig, SFTTrainer
from align.tiny import IMAGES
from preference_data.readers import read_captioned
from preference_data.schemas import Pair

GROUNDED = str(IMAGES / "grounded")


def settings(folder, **overrides):
    return {
        "output_dir": str(folder),
        "height": 64,
        "width": 64,
        "num_inference_steps": 3,
        "per_device_train_batch_size": 4,
        "max_steps": 3,
        "learning_rate": 1e-3,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "save_strategy": "no",
        "cache_dir": str(folder / "cache"),
    } | overrides


def shifted(sigma: torch.Tensor) -> torch.Tensor:
    """Noise levels as the tiny model's schedule shifts them at every size: by mu = 1.1, arXiv 2403.03206 eq. 23."""
    return math.exp(1.1) * sigma / (1 + (math.exp(1.1) - 1) * sigma)


def lora() -> LoraConfig:
    return LoraConfig(r=4, lora_alpha=8, init_lora_weights="gaussian")


def losses(trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def sft(folder, data=None, peft_config=None, eval_dataset=None, **overrides) -> SFTTrainer:
    """``eval_dataset``: True for the first of the training data."""
    data = data if data is not None else read_captioned(GROUNDED)
    held_out = list(data)[:4] if eval_dataset is True else eval_dataset
    args = SFTConfig(**settings(folder, **overrides))
    return SFTTrainer(load_model("tiny"), args, data, held_out, peft_config=peft_config or lora())


def some_pairs() -> list[Pair]:
    """Pairs of the style's images: odd ones chosen."""
    rows = list(read_captioned(GROUNDED))[:8]
    return [
        Pair(row.prompt, chosen=row.image, rejected=other.image)
        for row, other in zip(rows[::2], rows[1::2], strict=True)
    ]


def dpo(folder, pairs=None, peft_config=None, eval_dataset=None, **overrides) -> DPOTrainer:
    args = DPOConfig(**settings(folder, beta=60.0, **overrides))
    pairs = pairs or some_pairs()
    held_out = pairs[:2] if eval_dataset is True else eval_dataset
    return DPOTrainer(load_model("tiny"), args, pairs, held_out, peft_config=peft_config or lora())
