"""Qwen-Image (20B) as its configs alone: the published sizes in the layout of its folder, without a weight."""

import json
import shutil
from pathlib import Path

from align.tiny import CHECKPOINT

#: transformer/config.json of Qwen/Qwen-Image.
TRANSFORMER = {
    "patch_size": 2, "in_channels": 64, "out_channels": 16, "num_layers": 60, "attention_head_dim": 128,
    "num_attention_heads": 24, "joint_attention_dim": 3584, "guidance_embeds": False, "axes_dims_rope": [16, 56, 56],
}  # fmt: skip
#: Its text encoder is Qwen2.5-VL-7B-Instruct.
TEXT = {
    "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28,
    "num_key_value_heads": 4, "vocab_size": 152064, "max_position_embeddings": 128000,
}  # fmt: skip
VISION = {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "out_hidden_size": 3584}


def write_configs(folder: Path, **transformer: int) -> Path:
    """The folder of a Qwen-Image of true size, but for what ``transformer`` says; there are no weights in it."""
    for part in ("scheduler", "tokenizer"):
        shutil.copytree(CHECKPOINT / part, folder / part)
    shutil.copy(CHECKPOINT / "model_index.json", folder)
    for part, change in (("transformer", TRANSFORMER | transformer), ("vae", {"base_dim": 96, "num_res_blocks": 2})):
        _write(folder, part, json.loads((CHECKPOINT / part / "config.json").read_text()) | change)
    text = json.loads((CHECKPOINT / "text_encoder/config.json").read_text())
    parts = {"text_config": text["text_config"] | TEXT, "vision_config": text["vision_config"] | VISION}
    parts["text_config"]["rope_parameters"]["mrope_section"] = [16, 24, 24]
    parts["text_config"]["layer_types"] = ["full_attention"] * TEXT["num_hidden_layers"]
    _write(folder, "text_encoder", text | parts | {"tie_word_embeddings": False})
    return folder


def _write(folder: Path, part: str, config: dict) -> None:
    (folder / part).mkdir()
    (folder / part / "config.json").write_text(json.dumps(config))
