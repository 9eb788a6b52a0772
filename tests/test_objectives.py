"""The objectives of DPO, GRPO and DiffusionNFT without a trainer, by numbers worked out by hand."""

import math
from types import SimpleNamespace

import pytest
import torch

from align.dpo import DPOSettings, dpo_objective
from align.grpo import GRPOConfig, grpo_objective
from align.maths.flow import StochasticSampler, Transition
from align.nft import NFTConfig, nft_objective
from align.online.buffers import MicroBatch, PointBatch


def test_dpo_of_two_pairs():
    errors = torch.tensor([[0.5, 1.0], [0.8, 0.6]], requires_grad=True)
    reference, sigma = torch.tensor([[0.6, 0.9], [0.7, 0.7]]), torch.tensor([0.1, 0.9])
    settings = DPOSettings(beta=4.0, sft_weight=0.5)
    result = dpo_objective(errors, reference, sigma, settings)
    # rewards 4/2 (ref - policy): chosen 0.2 and -0.2, rejected -0.2 and 0.2; h = 0.4 and -0.4
    losses = [math.log(1 + math.exp(-0.4)) + 0.25, math.log(1 + math.exp(0.4)) + 0.4]
    assert result.loss.item() == pytest.approx(sum(losses) / 2)
    assert result.metrics["rewards/margins"] == pytest.approx(0.0, abs=1e-7)
    assert result.metrics["rewards/accuracies"] == 0.5
    assert result.metrics["accuracy_sigma_0.00-0.25"] == [1.0] and result.metrics["accuracy_sigma_0.75-1.00"] == [0.0]
    assert result.metrics["chosen_error_to_reference"] == pytest.approx((0.5 / 0.6 + 0.8 / 0.7) / 2)
    assert dpo_objective(errors, reference, sigma, settings, count=4).loss.item() == pytest.approx(sum(losses) / 4)
    result.loss.backward()
    assert errors.grad[0, 0] > 0 > errors.grad[0, 1]  # down with the chosen image's error, up with the rejected one's


def transition(mean: float, log_prob: float) -> Transition:
    one = torch.ones(1, 2, 2)
    return Transition(
        latents=one, next_latents=one, sigma=torch.ones(1), sigma_next=torch.ones(1) / 2,
        mean=mean * one, std=0.5 * torch.ones(1, 1, 1), log_prob=torch.tensor([log_prob]),
    )  # fmt: skip


def test_grpo_of_one_transition(tmp_path):
    batch = MicroBatch(
        transition=transition(0.0, -1.0), images=[0], advantages=torch.tensor([2.0]), weights=torch.ones(1),
        step_positions=torch.zeros(1), nominal_size=4.0, sampler=StochasticSampler(0.7), distinct=[0], conditions=[None],
        velocity_of=[0],
    )  # fmt: skip
    settings = GRPOConfig(output_dir=str(tmp_path), use_cpu=True, epsilon=0.1, beta=0.5)
    result = grpo_objective(batch, transition(0.2, -1.0 + math.log(1.05)), 0.5 * torch.ones(1, 2, 2), settings)
    # ratio 1.05, inside the clip range; KL to the reference (0.2 - 0.5)^2 / (2 0.25) = 0.18, to the rollout 0.08
    assert result.loss.item() == pytest.approx((-1.05 * 2 + 0.5 * 0.18) / 4, rel=1e-5)
    assert result.metrics["ratio_max"] == pytest.approx(1.05) and result.metrics["clip_share"] == 0
    assert result.metrics["kl_per_dim"] == pytest.approx(0.18, rel=1e-5)
    assert result.metrics["kl_total"] == pytest.approx(0.72, rel=1e-5)
    assert result.metrics["kl_rollout_per_dim"] == pytest.approx(0.08, rel=1e-5)
    clipped = grpo_objective(batch, transition(0.0, -1.0 + math.log(1.5)), None, settings)
    assert clipped.loss.item() == pytest.approx(-1.1 * 2 / 4) and clipped.metrics["clip_share"] == 1
    assert "kl_per_dim" not in clipped.metrics


def test_nft_of_one_point(tmp_path):
    zero = torch.zeros(1, 2, 2)
    batch = PointBatch(
        latents=zero, noise=zero + 1.0, sigma=torch.tensor([0.5]), optimality=torch.tensor([0.75]), old_velocity=zero,
        rows=torch.zeros(1), images=[0], conditions=[None], weights=torch.ones(1), nominal_size=2.0,
    )  # fmt: skip
    settings = NFTConfig(
        output_dir=str(tmp_path), use_cpu=True, nft_beta=0.5, advantage_clip=4.0, adaptive_weighting=False, beta=0.25
    )
    result = nft_objective(batch, zero + 0.4, zero + 0.2, settings)
    # v = 1; v+ = 0.5 x 0.4 = 0.2, v- = -0.2: errors 0.64 and 1.44; distance to the reference 0.04
    expected = 4.0 / 0.5 * (0.75 * 0.64 + 0.25 * 1.44) + 0.25 * 0.04
    assert result.loss.item() == pytest.approx(expected / 2, rel=1e-5)
    assert result.metrics == pytest.approx(
        {"reference_distance": 0.04, "error_positive": 0.64, "error_negative": 1.44, "old_distance": 0.16}, rel=1e-5
    )


def test_settings_of_dpo_are_all_that_its_objective_reads():
    settings = SimpleNamespace(beta=2.0, loss_type="hinge", label_smoothing=0.0, sft_weight=0.0)
    errors = torch.tensor([[0.5, 0.5]])
    assert dpo_objective(errors, errors, torch.tensor([0.5]), settings).loss.item() == 1.0
