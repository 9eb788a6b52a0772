"""Flow-matching loss, KL, clipped policy gradient, DPO and DiffusionNFT, against closed forms and numbers worked out by hand."""

import math

import pytest
import torch

from align.maths.flow import Reduction, StochasticSampler
from align.maths.losses import dpo_loss, flow_matching_loss, gaussian_kl, grpo_policy_loss, nft_loss

torch.set_num_threads(1)  # the tensors are small: threads only cost

STEPS = [(1.0, 0.92), (0.92, 0.8), (0.5, 0.3), (0.05, 0.02), (0.1, 0.0)]
SIGMA_MAX = 0.92


def randn(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def noise_scale(noise_level: float, s: float) -> float:
    """g(s) = a sqrt(s / (1 - s)), with the schedule's second sigma inside 1 - s at s = 1."""
    return noise_level * math.sqrt(s / (1 - (SIGMA_MAX if s == 1 else s)))


def kl_of_velocities(
    v: torch.Tensor, v_ref: torch.Tensor, noise_level: float, step: tuple[float, float], reduction: Reduction
) -> torch.Tensor:
    sampler = StochasticSampler(noise_level, sigma_max=SIGMA_MAX)
    x = randn(*v.shape, seed=1)
    mean, std = sampler.moments(x, v, *step)
    with torch.no_grad():
        mean_ref, _ = sampler.moments(x, v_ref, *step)
    return gaussian_kl(mean, mean_ref, std, reduction)


# --- Flow matching ---


def test_flow_matching_loss_is_the_mean_square_of_each_sample():
    # Sample 1: errors 1, -2, 0, 3: 14 / 4 = 3.5. Sample 2: all 2: 4.
    velocity = torch.tensor([[[1.0, -2.0], [0.0, 3.0]], [[2.0, 2.0], [2.0, 2.0]]])
    assert torch.equal(flow_matching_loss(velocity, torch.zeros(2, 2, 2)), torch.tensor([3.5, 4.0]))


def test_flow_matching_loss_is_smallest_at_the_conditional_mean_of_the_target():
    # A constant prediction: its best value is the targets' mean, so the gradient there is 0, and above it
    # positive.
    target = randn(64, 8, seed=2)
    for shift, sign in ((0.0, 0), (0.5, 1), (-0.5, -1)):
        guess = (target.mean() + shift).requires_grad_()
        (grad,) = torch.autograd.grad(flow_matching_loss(guess.expand(64, 8), target).mean(), guess)
        # d/dg mean (g - t)^2 = 2 (g - mean t) = 2 shift
        assert grad.item() == pytest.approx(sign, abs=1e-5)


def test_flow_matching_loss_is_float32_for_bfloat16_predictions():
    velocity, target = randn(2, 8, seed=3).bfloat16(), randn(2, 8, seed=4)
    loss = flow_matching_loss(velocity, target)
    assert loss.dtype == torch.float32 and torch.equal(loss, ((velocity.float() - target) ** 2).mean(1))


# --- KL ---


def test_gaussian_kl_equals_hand_numbers():
    # Mean differences 3 and 1 at std 2: 9 / 8 + 1 / 8 = 1.25 nats, 0.625 per dimension.
    mean, mean_ref, std = torch.tensor([[3.0, 0.0]]), torch.tensor([[0.0, 1.0]]), torch.full((1, 1), 2.0)
    assert gaussian_kl(mean, mean_ref, std, "sum").item() == 1.25
    assert gaussian_kl(mean, mean_ref, std, "mean").item() == 0.625
    assert gaussian_kl(mean, mean_ref, std).item() == 0.625


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_gaussian_kl_equals_torch_distributions(reduction):
    mean, mean_ref = randn(3, 4, 5, seed=5), randn(3, 4, 5, seed=6)
    std = torch.tensor([0.1, 0.5, 2.0]).reshape(3, 1, 1)
    policy, reference = (torch.distributions.Normal(m, std.expand_as(m)) for m in (mean, mean_ref))
    expected = torch.distributions.kl_divergence(policy, reference).flatten(1)
    expected = expected.mean(1) if reduction == "mean" else expected.sum(1)
    torch.testing.assert_close(gaussian_kl(mean, mean_ref, std, reduction), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("noise_level", [0.1, 0.7, 1.2])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_gaussian_kl_of_the_sde_equals_the_closed_form_in_the_velocities(step, noise_level, reduction):
    # mean - mean_ref = -D (1 + g^2 (1 - s) / (2 s)) (v - v_ref) and std^2 = g^2 D, hence
    # KL = D / 2 (g (1 - s) / (2 s) + 1 / g)^2 |v - v_ref|^2.
    v, v_ref = 2 * randn(2, 3, 4, seed=7), 2 * randn(2, 3, 4, seed=8)
    (s, s_next), g = step, noise_scale(noise_level, step[0])
    distance = ((v - v_ref) ** 2).flatten(1)
    distance = distance.mean(1) if reduction == "mean" else distance.sum(1)
    expected = (s - s_next) / 2 * (g * (1 - s) / (2 * s) + 1 / g) ** 2 * distance
    found = kl_of_velocities(v, v_ref, noise_level, step, reduction)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_gaussian_kl_of_one_sde_step_equals_hand_numbers():
    # s = 0.5, s' = 0.3, a = 0.8: g = 0.8, D = 0.2: 0.1 (0.8 * 0.5 / 1 + 1.25)^2 = 0.1 * 1.65^2 = 0.27225,
    # times |v - v_ref|^2 = 4 + 0 = 4 in sum: 1.089, and 0.5445 per dimension.
    v, v_ref = torch.tensor([[1.0, 1.0]]), torch.tensor([[-1.0, 1.0]])
    assert kl_of_velocities(v, v_ref, 0.8, (0.5, 0.3), "sum").item() == pytest.approx(1.089, abs=1e-5)
    assert kl_of_velocities(v, v_ref, 0.8, (0.5, 0.3), "mean").item() == pytest.approx(0.5445, abs=1e-5)


@pytest.mark.parametrize("kind", ["sde", "cps"])
def test_gaussian_kl_is_the_expected_log_ratio_of_the_samples(kind):
    # KL = E_policy[log p - log p_ref]: a check of log_prob, std and KL against each other. Four standard
    # errors.
    n, sampler = 50_000, StochasticSampler(0.6, kind, log_prob_reduction="sum")
    x, noise, v = (randn(n, 2, seed=9 + i) for i in range(3))
    v_ref, sigmas = v + 0.8, (torch.full((n,), 0.6), torch.full((n,), 0.4))
    policy = sampler.transition(x, v, *sigmas, noise=noise)
    reference = sampler.transition(x, v_ref, *sigmas, next_latents=policy.next_latents)
    gap = policy.log_prob - reference.log_prob
    kl = gaussian_kl(policy.mean, reference.mean, policy.std, "sum")
    assert kl.min() > 0.02
    assert gap.mean().item() == pytest.approx(kl.mean().item(), abs=4 * gap.std().item() / math.sqrt(n))


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_gradient_of_the_kl_reaches_the_policy_velocity_and_equals_finite_differences(reduction):
    # The KL is quadratic in v, so a central difference is exact at any width.
    v, v_ref, step, h = randn(1, 4, seed=12), randn(1, 4, seed=13), (0.7, 0.5), 0.5
    leaf = v.clone().requires_grad_()
    kl_of_velocities(leaf, v_ref, 0.7, step, reduction).sum().backward()
    for j in range(4):
        d = torch.zeros(1, 4)
        d[0, j] = h
        up, down = (kl_of_velocities(v + sign * d, v_ref, 0.7, step, reduction) for sign in (1, -1))
        assert leaf.grad[0, j].item() == pytest.approx(((up - down) / (2 * h)).item(), rel=1e-3, abs=1e-5)
    assert leaf.grad.abs().min() > 1e-3


def test_gradient_descent_on_the_kl_moves_the_velocity_to_the_reference():
    v, v_ref = randn(2, 4, seed=14).requires_grad_(), randn(2, 4, seed=15)
    before = kl_of_velocities(v, v_ref, 0.7, (0.7, 0.5), "sum").sum()
    (grad,) = torch.autograd.grad(before, v)
    # grad = c (v - v_ref) with c > 0, so it points straight away from the reference.
    cosine = torch.nn.functional.cosine_similarity(grad.flatten(), (v - v_ref).flatten(), dim=0)
    assert cosine.item() == pytest.approx(1.0, abs=1e-4)


def test_the_kl_has_no_gradient_under_no_grad_and_none_into_a_reference_computed_so():
    v, v_ref = randn(2, 4, seed=16).requires_grad_(), randn(2, 4, seed=17).requires_grad_()
    with torch.no_grad():
        assert not kl_of_velocities(v, v_ref, 0.7, (0.7, 0.5), "mean").requires_grad
    kl_of_velocities(v, v_ref, 0.7, (0.7, 0.5), "mean").sum().backward()
    assert v_ref.grad is None and v.grad.abs().sum() > 0


def test_the_kl_of_a_policy_to_itself_is_exactly_0():
    v = randn(2, 4, seed=18)
    assert torch.equal(kl_of_velocities(v, v.clone(), 0.7, (1.0, 0.92), "sum"), torch.zeros(2))


# --- The clipped policy gradient ---


def loss_at(ratio: float, advantage: float) -> tuple[float, float, bool]:
    """Loss, its gradient by log_prob, and the clipped flag, with epsilon_low 0.1 and epsilon_high 0.3."""
    log_prob = torch.tensor([math.log(ratio)], requires_grad=True)
    result = grpo_policy_loss(log_prob, torch.zeros(1), torch.tensor([advantage]), 0.1, 0.3)
    (grad,) = torch.autograd.grad(result.loss.sum(), log_prob)
    assert result.ratio.item() == pytest.approx(ratio, rel=1e-6)
    return result.loss.item(), grad.item(), bool(result.clipped)


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "gradient", "clipped"),
    [
        # -min(r A, clip(r, 0.9, 1.3) A); the gradient by log r is -r A where r A is the smaller, else 0.
        (1.5, 2.0, -2.6, 0.0, True),  # min(3, 2.6): clipped at 1 + epsilon_high
        (1.5, -2.0, 3.0, 3.0, False),  # min(-3, -2.6): the pessimistic branch keeps the gradient
        (0.5, 2.0, -1.0, -1.0, False),  # min(1, 1.8): likewise
        (0.5, -2.0, 1.8, 0.0, True),  # min(-1, -1.8): clipped at 1 - epsilon_low
        (1.2, 2.0, -2.4, -2.4, False),  # inside the upper bound, outside were it epsilon_low's
        (0.85, -2.0, 1.8, 0.0, True),  # outside the lower bound, inside were it epsilon_high's
        (0.95, -2.0, 1.9, 1.9, False),  # inside on both sides
        (1.05, 2.0, -2.1, -2.1, False),
        (1.5, 0.0, 0.0, 0.0, False),  # no advantage, nothing to clip
        (0.5, 0.0, 0.0, 0.0, False),
    ],
)
def test_policy_loss_clips_asymmetrically_by_hand_numbers(ratio, advantage, loss, gradient, clipped):
    found = loss_at(ratio, advantage)
    assert found[:2] == pytest.approx((loss, gradient), abs=1e-5)
    assert found[2] is clipped


def test_policy_loss_at_ratio_1_is_the_plain_policy_gradient_exactly():
    log_prob, advantages = randn(16, seed=20).requires_grad_(), randn(16, seed=21)
    result = grpo_policy_loss(log_prob, log_prob.detach().clone(), advantages, 1e-5, 1e-5)
    (grad,) = torch.autograd.grad(result.loss.sum(), log_prob)
    assert torch.equal(grad, -advantages) and torch.equal(result.loss, -advantages)
    assert torch.equal(result.ratio, torch.ones(16)) and not result.clipped.any()


@pytest.mark.parametrize("kind", ["sde", "cps"])
def test_first_update_on_replayed_samples_is_the_plain_policy_gradient_in_the_velocity(kind):
    sampler, sigmas = StochasticSampler(0.7, kind), (torch.full((4,), 0.7), torch.full((4,), 0.5))
    x, v, noise = (randn(4, 6, seed=22 + i) for i in range(3))
    advantages = randn(4, seed=25)
    old = sampler.transition(x, v, *sigmas, noise=noise)
    v.requires_grad_()
    log_prob = sampler.transition(x, v, *sigmas, next_latents=old.next_latents).log_prob
    (plain,) = torch.autograd.grad((-advantages * log_prob).sum(), v, retain_graph=True)
    loss = grpo_policy_loss(log_prob, old.log_prob, advantages, 1e-4, 1e-4).loss
    (grad,) = torch.autograd.grad(loss.sum(), v)
    assert torch.equal(grad, plain) and grad.abs().min() > 0


def test_a_small_step_down_the_policy_loss_raises_the_log_prob_of_good_samples_only():
    log_prob = torch.zeros(2, requires_grad=True)
    loss = grpo_policy_loss(log_prob, torch.zeros(2), torch.tensor([1.0, -1.0]), 0.2, 0.2).loss
    (grad,) = torch.autograd.grad(loss.sum(), log_prob)
    assert (-grad)[0] > 0 > (-grad)[1]


def test_policy_loss_sends_no_gradient_to_the_old_log_prob_or_through_ratio_and_flags():
    new, old = randn(4, seed=26).requires_grad_(), randn(4, seed=27).requires_grad_()
    result = grpo_policy_loss(new, old, randn(4, seed=28), 0.2, 0.2)
    result.loss.sum().backward()
    assert old.grad is None and new.grad is not None
    assert not result.ratio.requires_grad and not result.clipped.requires_grad


def test_clipped_flags_mark_exactly_the_samples_without_gradient():
    for seed in range(10):
        log_prob, old = (0.3 * randn(200, seed=10 * seed + 30)).requires_grad_(), torch.zeros(200)
        result = grpo_policy_loss(log_prob, old, randn(200, seed=10 * seed + 31), 0.1, 0.25)
        (grad,) = torch.autograd.grad(result.loss.sum(), log_prob)
        assert torch.equal(result.clipped, grad == 0) and 0 < result.clipped.sum() < 200


def test_policy_loss_never_rewards_more_than_the_unclipped_objective():
    # min(r A, ...) <= r A, so the loss is a bound from above, with equality where nothing is clipped.
    log_prob, advantages = 0.5 * randn(500, seed=200), randn(500, seed=201)
    result = grpo_policy_loss(log_prob, torch.zeros(500), advantages, 0.1, 0.2)
    plain = -torch.exp(log_prob) * advantages
    assert (result.loss >= plain).all() and torch.equal(result.loss > plain, result.clipped)


# --- DPO ---


def errors(*values: float) -> list[torch.Tensor]:
    return [torch.tensor([value], dtype=torch.float64) for value in values]


@pytest.mark.parametrize(
    ("loss_type", "expected"),
    # Rewards 8/2 (0.50 - 0.25) = 1 and 8/2 (0.50 - 0.75) = -1: h = 2.
    [("sigmoid", math.log(1 + math.exp(-2))), ("hinge", 0.0), ("ipo", (0.25 - 0.0625) ** 2)],
)
def test_dpo_losses_by_hand(loss_type, expected):
    result = dpo_loss(*errors(0.25, 0.75, 0.5, 0.5), beta=8.0, loss_type=loss_type)
    assert result.loss.item() == pytest.approx(expected, abs=1e-12)
    assert (result.chosen_reward.item(), result.rejected_reward.item(), result.accuracy.item()) == (1.0, -1.0, 1.0)


def test_a_published_beta_means_what_it_means_in_the_code_of_diffusion_dpo():
    """Its train.py: -logsigmoid(-0.5 beta (model_diff - ref_diff)), on the 2000 it trained Stable Diffusion 1.5 with."""
    generator = torch.Generator().manual_seed(0)
    chosen, rejected, chosen_ref, rejected_ref = torch.rand(4, 50, generator=generator, dtype=torch.float64) / 500
    theirs = -torch.nn.functional.logsigmoid(-0.5 * 2000 * ((chosen - rejected) - (chosen_ref - rejected_ref)))
    assert torch.allclose(dpo_loss(chosen, rejected, chosen_ref, rejected_ref, 2000).loss, theirs, rtol=1e-12)
    assert theirs.std() > 0.3


def test_dpo_label_smoothing_by_hand():
    # h = -2: 0.9 log(1 + e^2) + 0.1 log(1 + e^-2) = 0.9 x 2.126928 + 0.1 x 0.126928
    result = dpo_loss(*errors(0.75, 0.25, 0.5, 0.5), beta=8.0, label_smoothing=0.1)
    assert result.loss.item() == pytest.approx(1.926928, abs=1e-6) and result.accuracy.item() == 0.0


@pytest.mark.parametrize(("loss_type", "start"), [("sigmoid", math.log(2)), ("hinge", 1.0), ("ipo", 0.0625)])
def test_dpo_starts_where_policy_and_reference_agree(loss_type, start):
    result = dpo_loss(*errors(0.3, 0.9, 0.3, 0.9), beta=2.0, loss_type=loss_type)
    assert result.loss.item() == pytest.approx(start) and result.accuracy.item() == 0.5


@pytest.mark.parametrize("loss_type", ["sigmoid", "hinge", "ipo"])
def test_dpo_gradient_is_that_of_finite_differences_and_reaches_the_policy_alone(loss_type):
    four = [torch.tensor([value], dtype=torch.float64, requires_grad=True) for value in (0.31, 0.42, 0.35, 0.40)]
    loss = dpo_loss(*four, beta=5.0, loss_type=loss_type, label_smoothing=0.0).loss.sum()
    grads = torch.autograd.grad(loss, four, allow_unused=True)
    assert grads[2] is None and grads[3] is None
    assert grads[0].item() > 0 > grads[1].item()  # lower the error of the chosen, raise that of the rejected
    for n, step in ((0, 1e-6), (1, 1e-6)):
        ends = []
        for sign in (1, -1):
            moved = [value.detach().clone() for value in four]
            moved[n] += sign * step
            ends.append(dpo_loss(*moved, beta=5.0, loss_type=loss_type).loss.item())
        assert grads[n].item() == pytest.approx((ends[0] - ends[1]) / (2 * step), rel=1e-6)


def test_an_unknown_dpo_loss_is_named():
    with pytest.raises(ValueError, match="'sigmoid', 'hinge' or 'ipo', not 'dpo'"):
        dpo_loss(*errors(1, 1, 1, 1), beta=1.0, loss_type="dpo")


# --- DiffusionNFT ---


def test_nft_loss_equals_hand_numbers():
    # v_old = (0, 0), v_theta = (2, 0), mixing 1/2: v+ = (1, 0), v- = (-1, 0). v = (1, 2): squares (0, 4) and (4, 4),
    # means 2 and 4. r = 3/4: 0.75 x 2 + 0.25 x 4 = 2.5.
    velocity, old, target = torch.tensor([[2.0, 0.0]]), torch.zeros(1, 2), torch.tensor([[1.0, 2.0]])
    sigma, r = torch.tensor([0.5]), torch.tensor([0.75])
    plain = nft_loss(velocity, old, target, sigma, r, 0.5, adaptive=False)
    assert (plain.loss.item(), plain.positive.item(), plain.negative.item()) == (2.5, 2.0, 4.0)
    # Clean latents at sigma 1/2: errors (0, 1) and (1, 1), mean squares 1/2 and 1, mean sizes 1/2 and 1: 1 and 1.
    adaptive = nft_loss(velocity, old, target, sigma, r, 0.5)
    assert (adaptive.loss.item(), adaptive.positive.item(), adaptive.negative.item()) == (1.0, 1.0, 1.0)


def test_the_adaptive_error_is_that_of_the_clean_latents_divided_by_its_mean_size():
    clean, noise, old, velocity = (randn(3, 4, 5, seed=50 + n) for n in range(4))
    sigma, r = torch.tensor([0.2, 0.7, 1.0]), torch.tensor([0.0, 0.4, 1.0])
    s, expected = sigma.view(3, 1, 1), 0.0
    noisy = (1 - s) * clean + s * noise
    for weight, mixed in ((r, 0.7 * old + 0.3 * velocity), (1 - r, 1.3 * old - 0.3 * velocity)):
        error = noisy - s * mixed - clean
        expected = expected + weight * (error**2).mean((1, 2)) / error.abs().mean((1, 2))
    torch.testing.assert_close(nft_loss(velocity, old, noise - clean, sigma, r, 0.3).loss, expected)


def test_an_image_that_is_fitted_exactly_gives_a_loss_of_0_and_not_nan():
    """Its error is divided by its mean size, 0: one such image would make every weight NaN."""
    velocity, target = torch.ones(1, 4, requires_grad=True), torch.ones(1, 4)
    loss = nft_loss(velocity, target, target, torch.tensor([0.5]), torch.tensor([0.5]), 1.0).loss
    loss.sum().backward()
    assert loss.item() == 0 and velocity.grad.tolist() == [[0.0] * 4]
    # Below 1e-5 the size is 1e-5, as in the authors' code: both errors are 0.5 x 4e-6, 4e-12 / 1e-5 each.
    near = nft_loss(target + 4e-6, target + 4e-6, target, torch.tensor([0.5]), torch.tensor([0.5]), 1.0).loss
    assert near.item() == pytest.approx(4e-7, rel=0.1)  # 1 + 4e-6 in float32


@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("mixing", [0.1, 1.0])
def test_nft_gradient_of_the_first_update_is_the_advantage_times_that_of_the_matching_error(adaptive, mixing):
    """At v_theta = v_old, scaled as in the trainer: A d/dv |v - target|^2, its size not differentiated, for any mixing."""
    old, target, clip = randn(5, 6, seed=60), randn(5, 6, seed=61), 4.0
    sigma, advantage = torch.rand(5, generator=torch.Generator().manual_seed(62)), torch.tensor([-4.0, -1, 0, 2, 4])
    velocity = old.clone().requires_grad_()
    loss = clip / mixing * nft_loss(velocity, old, target, sigma, 0.5 + advantage / (2 * clip), mixing, adaptive).loss
    (found,) = torch.autograd.grad(loss.sum(), velocity)
    expected = advantage[:, None] * 2 * (old - target) / 6
    if adaptive:
        expected = expected * sigma[:, None] / (old - target).abs().mean(1, keepdim=True)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    assert torch.equal(found[2], torch.zeros(6))


def test_nft_gradient_away_from_the_old_policy_draws_back_to_it():
    # r = 1/2: what is left is mixing^2 |v_theta - v_old|^2 and a constant.
    old, velocity, target = randn(1, 6, seed=63), randn(1, 6, seed=64).requires_grad_(), randn(1, 6, seed=65)
    half = torch.tensor([0.5])
    (found,) = torch.autograd.grad(
        nft_loss(velocity, old, target, half, half, 0.3, adaptive=False).loss.sum(), velocity
    )
    torch.testing.assert_close(found, 2 * 0.3**2 * (velocity - old).detach() / 6)


@pytest.mark.parametrize("adaptive", [False, True])
def test_nft_gradient_is_that_of_finite_differences_and_reaches_the_policy_alone(adaptive):
    velocity, old, target = (randn(1, 5, seed=66 + n).requires_grad_() for n in range(3))
    sigma, r = torch.tensor([0.6]), torch.tensor([0.8])
    loss = nft_loss(velocity, old, target, sigma, r, 0.7, adaptive).loss.sum()
    found, of_old = torch.autograd.grad(loss, (velocity, old), allow_unused=True)
    assert of_old is None

    def sized(side: torch.Tensor) -> float:  # with the sizes held where they are at `velocity`
        step, here = 0.7 * (side - old), 0.7 * (velocity - old)
        total = 0.0
        for weight, sign in ((r, 1), (1 - r, -1)):
            error, size = 0.6 * (old + sign * step - target), 0.6 * (old + sign * here - target).abs().mean()
            total += (weight * (error**2).mean() / size if adaptive else weight * (error**2).mean() / 0.36).item()
        return total

    with torch.no_grad():
        for place in range(5):
            step = torch.zeros(1, 5)
            step[0, place] = 1e-2
            slope = (sized(velocity + step) - sized(velocity - step)) / 2e-2
            assert found[0, place].item() == pytest.approx(slope, abs=1e-4)


@pytest.mark.parametrize("mixing", [0.5, 1.0, 2.0])
def test_nft_minimum_is_the_one_of_the_papers_theorem(mixing):
    """Three clean points, each with its optimality: where descent ends is v_old + (2 / mixing) alpha (v+ - v_old).

    At one noisy point the posterior of the clean point decides all: v_old = E[v], alpha = E[r], v+ = E[r v] / alpha.
    """
    clean, prior = torch.tensor([-1.0, 0.5, 2.0]), torch.tensor([0.5, 0.3, 0.2])
    r, sigma, noisy = torch.tensor([0.1, 0.9, 0.6]), 0.6, 0.7
    posterior = prior * torch.exp(-((noisy - (1 - sigma) * clean) ** 2) / (2 * sigma**2))
    posterior = posterior / posterior.sum()
    target = (noisy - clean) / sigma  # noise - clean, of the noise that leads from clean to noisy
    old = (posterior * target).sum()
    alpha = (posterior * r).sum()
    positive = (posterior * r * target).sum() / alpha  # of the clean points drawn again in proportion to r
    velocity = old.clone().requires_grad_()
    for _ in range(200):
        per_point = nft_loss(
            velocity.expand(3, 1), old.expand(3, 1), target[:, None], torch.full((3,), sigma), r, mixing, adaptive=False
        )
        (slope,) = torch.autograd.grad((posterior * per_point.loss).sum(), velocity)
        velocity = (velocity - 0.2 / mixing**2 * slope).detach().requires_grad_()
    expected = old + 2 / mixing * alpha * (positive - old)
    assert velocity.item() == pytest.approx(expected.item(), abs=1e-5) and abs((expected - old).item()) > 0.1
