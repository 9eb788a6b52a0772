"""Floating point operations of a Qwen-Image transformer, by formula: two for each multiplication that is added."""

from typing import Any


def forward_flops(config: Any, image_tokens: int, text_tokens: int) -> tuple[float, float]:
    """(of linear layers, of attention) for one row. Each token goes through its own stream's layers alone.

    With D channels a block multiplies 12 D^2 weights for every token (4 D^2 of attention, 8 D^2 of the MLP) and as many
    once a row for the modulation of both streams; attention is 4 N^2 D for N tokens in all.
    """
    width, depth = config.num_attention_heads * config.attention_head_dim, config.num_layers
    tokens = image_tokens + text_tokens
    linear = depth * 24 * width**2 * (tokens + 1)
    ends = config.in_channels + config.patch_size**2 * config.out_channels
    linear += 2 * width * (image_tokens * ends + text_tokens * config.joint_attention_dim)
    linear += 2 * width * (256 + width + 2 * width)  # the time's embedding, the last norm's modulation
    return float(linear), float(depth * 4 * tokens**2 * width)


def backward_flops(forward: tuple[float, float], adapter: bool) -> float:
    """Twice the forward; with an adapter linear layers give gradients to their inputs alone, which is once."""
    linear, attention = forward
    return (1 if adapter else 2) * linear + 2 * attention
