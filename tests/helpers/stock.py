"""Flow-matching errors by nothing but diffusers' own parts and the textbook formula."""

import torch


def stock_errors(pipeline, clean: torch.Tensor, prompt: str, noise: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """(B,) errors of packed latents (B, 16, channels) of 64 x 64 images of one prompt, all at one noise and noise level."""
    embeds, _ = pipeline.encode_prompt(prompt, max_sequence_length=512)
    velocity = pipeline.transformer(
        hidden_states=(1 - sigma) * clean + sigma * noise,
        timestep=sigma.expand(len(clean)),
        encoder_hidden_states=embeds.expand(len(clean), -1, -1),
        img_shapes=[[(1, 4, 4)]] * len(clean),
        return_dict=False,
    )[0]
    return ((velocity - (noise - clean)) ** 2).mean((1, 2))
