"""Which layers a LoRA adapts: patterns of names against the layers that a transformer has."""

import re

from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists

from align.models.loading import nearest

#: Linear layers of the joint attention, image and text streams: what Qwen-Image LoRAs usually adapt.
ATTENTION_TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"]


def match_targets(config: LoraConfig, linear: list[str]) -> list[str]:
    """Full names of the ``linear`` layers that ``config.target_modules`` matches.

    Where it says none, it is set to those of the attention.

    Raises:
        ValueError: where a target, or all of them together, match no layer; it names the nearest.
    """
    if config.target_modules is None:
        config.target_modules = set(ATTENTION_TARGETS)
    if isinstance(config.target_modules, (list, set)):
        for target in config.target_modules:
            if not any(n == target or n.endswith("." + target) for n in linear):
                suffixes = {re.sub(r"^transformer_blocks\.\d+\.(attn\.)?", "", n) for n in linear}
                raise ValueError(
                    f"LoRA target {target!r} matches no linear layer of the transformer.{nearest(target, suffixes)}"
                )
    matched = [n for n in linear if config.target_modules == "all-linear" or check_target_module_exists(config, n)]
    if not matched:
        raise ValueError(f"LoRA targets {config.target_modules!r} match no linear layer of the transformer")
    return matched
