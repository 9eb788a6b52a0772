"""What tests of the trainers on groups look at, and rewards with gaps."""

from typing import Any

import torch
from brightness import score as brightness

from align.engine.trainer import FlowTrainer


def weights(run: FlowTrainer) -> dict[str, torch.Tensor]:
    """A copy of all that is trained."""
    return {name: p.detach().clone() for name, p in run.trained_parameters().items()}


def prompts_of(buffer: Any) -> list[str]:
    """What the images of a buffer were drawn from."""
    return [request.prompt for request in buffer.requests]


def history(run: FlowTrainer, key: str) -> list[float]:
    """What a run logged under ``key``, in order."""
    return [entry[key] for entry in run.state.log_history if key in entry]


def some_scored(images: list[Any], prompts: list[str]) -> list[float | None]:
    """Crosses have no score, squares the same one, all others their brightness."""
    scores: list[float | None] = brightness(images, prompts)
    for number, prompt in enumerate(prompts):
        scores[number] = None if "cross" in prompt else 0.5 if "squares" in prompt else scores[number]
    return scores
