"""Flow matching: noise levels against their analytic distribution, errors against one image at a time."""

import pytest
import torch
from asking import ask
from matching_runs import settings, shifted

from align.engine.matching import MatchingBatch, matching_errors
from align.models.families import load_model
from align.sampling.noise import seeded_generator
from align.sft import SFTConfig
from preference_data.buckets import Bucket


@pytest.mark.parametrize(("given", "mean", "std"), [({}, 0.0, 1.0), ({"logit_mean": 0.4, "logit_std": 0.7}, 0.4, 0.7)])
def test_training_noise_levels_are_logit_normal_and_shifted_as_in_sampling(tiny, tmp_path, given, mean, std):
    """Unshifted, a large image is trained at levels at which it is hardly noised, and not at those it is sampled at."""
    args = SFTConfig(**settings(tmp_path, **given))
    sigma = args.draw_sigma([seeded_generator((0, place)) for place in range(4000)], tiny, Bucket(64, 64))
    share = torch.tensor([0.1, 0.5, 0.9])
    expected = shifted(torch.sigmoid(mean + std * torch.distributions.Normal(0.0, 1.0).icdf(share)))
    assert (sigma.quantile(share) - expected).abs().max() < 0.025  # unshifted the median is 0.2 less


@torch.no_grad()
def test_errors_are_those_of_each_image_on_its_own(tiny):
    """With the images of two examples, or their noise, mixed up, DPO would prefer one prompt's image to another's."""
    generator = torch.Generator().manual_seed(0)
    latents, noise = torch.randn(2, 2, 16, 64, generator=generator), torch.randn(2, 16, 64, generator=generator)
    sigma, requests = torch.tensor([0.3, 0.8]), ask(["a circle", "three red squares"])
    errors = matching_errors(tiny, MatchingBatch(latents, noise, sigma, requests, Bucket(64, 64)), tiny.transformer)
    assert errors.shape == (2, 2)
    for row, request in enumerate(requests):
        for image in range(2):
            clean, s = latents[row, image], sigma[row]
            noisy = (1 - s) * clean + s * noise[row]
            v = tiny.velocity(noisy[None], s[None], tiny.encode([request]), height=64, width=64)
            expected = ((v[0] - (noise[row] - clean)) ** 2).mean()
            torch.testing.assert_close(errors[row, image], expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_the_errors_are_of_the_transformer_that_is_given(tiny):
    """A launcher's wrapper would be passed by, and GPUs would drift apart; a frozen reference would be the policy itself."""
    other = load_model("tiny").transformer
    for parameter in other.parameters():
        parameter.mul_(1.1)
    latents, noise = torch.randn(2, 16, 64, generator=torch.Generator().manual_seed(0))
    batch = MatchingBatch(latents[None, None], noise[None], torch.tensor([0.5]), ask(["a circle"]), Bucket(64, 64))
    errors = matching_errors(tiny, batch, other)
    assert (errors - matching_errors(tiny, batch, tiny.transformer)).abs() > 1e-3
    tiny.transformer.load_state_dict(other.state_dict())
    assert torch.equal(errors, matching_errors(tiny, batch, tiny.transformer))
