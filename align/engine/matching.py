"""Flow matching: how noise levels are drawn, a batch of noised images, and the error of a model on it."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from align.engine.settings import setting
from align.maths.flow import add_noise, logit_normal_sigma, velocity_target
from align.maths.losses import flow_matching_loss
from align.models.contract import FlowModel, Request
from preference_data.buckets import Bucket


@dataclass
class NoiseLevels:
    """How noise levels are drawn: settings of every algorithm that trains on the flow-matching error."""

    logit_mean: float = setting(
        0.0, "Noise levels are sigmoid(N(mean, std^2)), then shifted by the schedule.", fixed_on_resume=True
    )
    logit_std: float = setting(1.0, "See logit_mean.", fixed_on_resume=True, above=0)

    def draw_sigma(self, streams: Sequence[torch.Generator], model: FlowModel, bucket: Bucket) -> Tensor:
        """Draw (B,) noise levels, each from a random stream of its own, shifted as the model's schedule is at this size."""
        drawn = [logit_normal_sigma(1, self.logit_mean, self.logit_std, stream) for stream in streams]
        return model.shift_sigma(torch.cat(drawn), *bucket)


@dataclass
class MatchingBatch:
    """B examples of one size, noised.

    latents: (B, images of an example, tokens, channels). noise: (B, tokens, channels), the same for all images of an
    example. sigma: (B,) noise levels. requests: B. bucket: the size in pixels.
    """

    latents: Tensor
    noise: Tensor
    sigma: Tensor
    requests: list[Request]
    bucket: Bucket


def matching_errors(model: FlowModel, batch: MatchingBatch, transformer: nn.Module) -> Tensor:
    """Return the (B, images of an example) flow-matching loss of every image, from one forward. Report eq. 2."""
    images = batch.latents.shape[1]
    clean = batch.latents.flatten(0, 1)  # an example's images next to each other
    noise, sigma = batch.noise.repeat_interleave(images, 0), batch.sigma.repeat_interleave(images, 0)
    requests = [request for request in batch.requests for _ in range(images)]
    velocity = model.velocity(
        add_noise(clean, noise, sigma),
        sigma,
        model.encode(requests),
        height=batch.bucket.height,
        width=batch.bucket.width,
        transformer=transformer,
    )
    return flow_matching_loss(velocity, velocity_target(clean, noise)).view(-1, images)
