"""Short SFT and DPO runs on the embedded model."""

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


def lora() -> LoraConfig:
    return LoraConfig(r=4, lora_alpha=8, init_lora_weights="gaussian")


def losses(trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def sft(folder, data=None, **overrides) -> SFTTrainer:
    data = data if data is not None else read_captioned(GROUNDED)
    return SFTTrainer(load_model("tiny"), SFTConfig(**settings(folder, **overrides)), data, peft_config=lora())


def some_pairs() -> list[Pair]:
    """Pairs of the style's images: odd ones chosen."""
    rows = list(read_captioned(GROUNDED))[:8]
    return [
        Pair(row.prompt, chosen=row.image, rejected=other.image)
        for row, other in zip(rows[::2], rows[1::2], strict=True)
    ]


def dpo(folder, pairs=None, **overrides) -> DPOTrainer:
    args = DPOConfig(**settings(folder, beta=30.0, **overrides))
    return DPOTrainer(load_model("tiny"), args, pairs or some_pairs(), peft_config=lora())
