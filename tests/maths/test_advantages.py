"""Group advantages, against numbers worked out by hand: A = (R - mean) / (sample std + 1e-4)."""

import math

import pytest
import torch
from PIL import Image

from align.maths.advantages import best_worst, combine_rewards, extremes, group_advantages
from preference_data.images import ImageSource
from preference_data.pairs import build_pairs
from preference_data.schemas import Ranked

torch.set_num_threads(1)  # the tensors are small: threads only cost

NAN = float("nan")
AGGREGATIONS = ["sum_then_normalize", "normalize_then_sum"]
SCALES = ["group", "batch", "none"]


def rand(*shape: int, seed: int) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def advantages(rewards: list, num_generations: int, **kwargs) -> list[float]:
    return group_advantages(torch.tensor(rewards), num_generations, **kwargs).advantages.tolist()


# --- One reward, normalised by the group ---


def test_advantages_divide_by_the_unbiased_standard_deviation():
    # 1, 2, 3, 4: mean 2.5, squares 2.25 + 0.25 + 0.25 + 2.25 = 5, over n - 1 = 3: std = sqrt(5 / 3) =
    # 1.29099445. 1.5 / 1.29109445 = 1.16180485, 0.5 / 1.29109445 = 0.38726828. (The biased std 1.118 would
    # give 1.3415.)
    expected = [-1.16180485, -0.38726828, 0.38726828, 1.16180485]
    assert advantages([1.0, 2.0, 3.0, 4.0], 4) == pytest.approx(expected, abs=1e-6)


def test_advantages_add_1e_4_to_the_standard_deviation():
    # 0, 2e-4: deviation 1e-4, std = sqrt(2) 1e-4, so A = 1 / (sqrt(2) + 1) = sqrt(2) - 1 = 0.41421356.
    assert advantages([0.0, 2e-4], 2) == pytest.approx([-0.41421356, 0.41421356], abs=1e-5)


def test_groups_are_consecutive_rows_and_do_not_see_each_other():
    # 0, 1 -> std sqrt(0.5) = 0.70710678: 0.5 / 0.70720678 = 0.70700679. 5, 9 -> std 2.82842712: 2 /
    # 2.82852712 = 0.70708178. The order inside a group is kept.
    found = advantages([1.0, 0.0, 5.0, 9.0], 2)
    assert found == pytest.approx([0.70700679, -0.70700679, -0.70708178, 0.70708178], abs=1e-6)


def test_a_vector_of_rewards_equals_a_matrix_of_one_column():
    rewards = rand(12, seed=0)
    flat, column = group_advantages(rewards, 4), group_advantages(rewards[:, None], 4)
    assert torch.equal(flat.advantages, column.advantages) and torch.equal(flat.rewards, rewards)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_permuting_the_images_of_a_group_permutes_their_advantages(aggregation):
    for seed in range(20):
        rewards, order = rand(6, 2, seed=seed), rand(6, seed=seed + 100).argsort()
        plain = group_advantages(rewards, 6, aggregation=aggregation).advantages
        shuffled = group_advantages(rewards[order], 6, aggregation=aggregation).advantages
        torch.testing.assert_close(shuffled, plain[order], rtol=0, atol=2e-6)


@pytest.mark.parametrize("scale", SCALES)
def test_advantages_of_every_group_sum_to_0_and_keep_the_order_of_the_rewards(scale):
    for seed in range(20):
        rewards = 3 * rand(8, 5, seed=seed) - 1
        found = group_advantages(rewards.flatten(), 5, scale_rewards=scale).advantages.view(8, 5)
        assert found.sum(1).abs().max() < 1e-5
        assert torch.equal(found.argsort(1), rewards.argsort(1))


# --- Dead groups ---


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("value", [0.1, 0.0, 1 / 3, -7.7, 1e6 + 0.1])
def test_a_group_of_equal_rewards_is_dead_and_exactly_0(aggregation, scale, value):
    # The mean of sixteen 0.1 in float32 need not be 0.1: no rounding may come through as an advantage.
    rewards = torch.cat([torch.full((16,), value), rand(16, seed=1)])
    found = group_advantages(rewards, 16, scale_rewards=scale, aggregation=aggregation)
    assert torch.equal(found.advantages[:16], torch.zeros(16)) and not found.informative[:16].any()
    assert found.informative[16:].all() and (found.advantages[16:] != 0).all() and found.dead_groups == 0.5


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_a_weighted_sum_of_equal_rewards_is_dead_and_exactly_0(aggregation):
    rewards, weights = torch.tensor([[0.1, 0.7, 1 / 3]]).expand(16, 3), torch.tensor([0.3, 1.7, 0.9])
    found = group_advantages(rewards, 16, weights, aggregation=aggregation)
    assert torch.equal(found.advantages, torch.zeros(16)) and found.dead_groups == 1.0


def test_rewards_that_differ_by_rounding_alone_are_dead():
    # 0.1 + 0.2 against 0.3: one unit in the last place, 3e-8.
    rewards = torch.tensor([0.3, 0.3, torch.nextafter(torch.tensor(0.3), torch.tensor(1.0)).item(), 0.3])
    assert rewards.unique().numel() == 2
    found = group_advantages(rewards, 4)
    assert torch.equal(found.advantages, torch.zeros(4)) and found.dead_groups == 1.0


@pytest.mark.parametrize(("dead", "share"), [(0, 0.0), (1, 0.25), (3, 0.75), (4, 1.0)])
def test_dead_groups_is_the_share_of_groups_without_gradient(dead, share):
    rewards = rand(4, 3, seed=2)
    rewards[:dead] = 0.5
    assert group_advantages(rewards.flatten(), 3).dead_groups == share


# --- Images without a score ---


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("scale", SCALES)
def test_a_missing_score_is_left_out_as_if_the_image_were_not_there(aggregation, scale):
    options = {"scale_rewards": scale, "aggregation": aggregation}
    for missing in range(4):
        rewards = 2 + rand(4, seed=10 + missing)
        without = group_advantages(torch.cat([rewards[:missing], rewards[missing + 1 :]]), 3, **options)
        rewards[missing] = NAN
        found = group_advantages(rewards, 4, **options)
        rest = torch.arange(4) != missing
        torch.testing.assert_close(found.advantages[rest], without.advantages, rtol=0, atol=1e-6)
        assert found.advantages[missing] == 0 and found.rewards[missing].isnan()
        assert torch.equal(found.informative, rest) and found.dead_groups == 0


def test_a_missing_score_by_hand():
    # 1, 3 scored: mean 2, std sqrt(2): A = 1 / 1.41431356 = 0.70705678. As a 0 it would have moved the mean
    # to 4/3.
    assert advantages([1.0, NAN, 3.0], 3) == pytest.approx([-0.70705678, 0.0, 0.70705678], abs=1e-6)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("group", [[NAN, NAN, 0.4], [NAN, NAN, NAN]])
def test_a_group_with_fewer_than_two_scores_is_dead_and_harmless(aggregation, scale, group):
    options = {"scale_rewards": scale, "aggregation": aggregation}
    found = group_advantages(torch.tensor([*group, 0.0, 0.5, 1.0]), 3, **options)
    assert torch.equal(found.advantages[:3], torch.zeros(3)) and not found.informative[:3].any()
    assert found.dead_groups == 0.5 and found.informative[3:].all()
    assert found.advantages[3] < 0 == found.advantages[4] < found.advantages[5]


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("scale", SCALES)
def test_a_batch_without_any_score_is_all_dead(aggregation, scale):
    found = group_advantages(torch.full((6, 2), NAN), 3, scale_rewards=scale, aggregation=aggregation)
    assert torch.equal(found.advantages, torch.zeros(6)) and found.dead_groups == 1.0
    assert not found.informative.any() and found.rewards.isnan().all()


# --- Several rewards ---


def test_weights_multiply_the_raw_rewards_before_the_sum():
    # 2 * [1, 2, 0] + 0.5 * [4, 0, 2] = [4, 4, 1]: mean 3, squares 1 + 1 + 4 = 6 over 2: std sqrt(3) =
    # 1.73205081.
    rewards, weights = torch.tensor([[1.0, 4.0], [2.0, 0.0], [0.0, 2.0]]), torch.tensor([2.0, 0.5])
    found = group_advantages(rewards, 3, weights)
    assert found.rewards.tolist() == [4.0, 4.0, 1.0]
    assert found.advantages.tolist() == pytest.approx([0.57731694, 0.57731694, -1.15463388], abs=1e-6)


def test_a_negative_weight_turns_the_preference_around():
    found = group_advantages(torch.tensor([0.0, 1.0]), 2, torch.tensor([-1.0])).advantages
    assert found[0] > 0 > found[1]


def test_rewards_weigh_1_by_default():
    rewards = rand(6, 3, seed=20)
    found, explicit = group_advantages(rewards, 3), group_advantages(rewards, 3, torch.ones(3))
    assert torch.equal(found.advantages, explicit.advantages)
    torch.testing.assert_close(found.rewards, rewards.sum(1))


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("fill", [NAN, 0.0, 1e9, math.inf])
def test_a_reward_of_weight_0_is_only_measured(aggregation, fill):
    rewards, weights = rand(8, 1, seed=21), torch.tensor([1.5, 0.0])
    measured = torch.full((8, 1), 2.0)
    measured[[1, 4, 5, 6, 7]] = fill
    alone = group_advantages(rewards, 4, weights[:1], aggregation=aggregation)
    found = group_advantages(torch.cat([rewards, measured], 1), 4, weights, aggregation=aggregation)
    assert torch.equal(found.advantages, alone.advantages) and torch.equal(found.rewards, alone.rewards)
    assert found.informative.all()


def test_a_reward_that_scored_no_image_of_a_prompt_is_left_out_for_that_prompt():
    rewards = torch.tensor([[1.0, 5.0], [2.0, 7.0], [1.0, NAN], [2.0, NAN]])
    assert combine_rewards(rewards, torch.ones(2), 2).tolist() == [6.0, 9.0, 1.0, 2.0]
    # Prompt 1: 6, 9: 1.5 / (2.12132034 + 1e-4) = 0.70707345. Prompt 2: 1, 2: 0.70700679.
    expected = [-0.70707345, 0.70707345, -0.70700679, 0.70700679]
    assert group_advantages(rewards, 2).advantages.tolist() == pytest.approx(expected, abs=1e-6)


def test_a_reward_that_scored_some_images_of_a_prompt_leaves_the_others_unscored():
    rewards = torch.tensor([[1.0, 5.0], [9.0, NAN], [2.0, 7.0]])
    total = combine_rewards(rewards, torch.ones(2), 3)
    assert total[[0, 2]].tolist() == [6.0, 9.0] and total[1].isnan()
    found = group_advantages(rewards, 3)
    assert found.advantages.tolist() == pytest.approx([-0.70707345, 0.0, 0.70707345], abs=1e-6)
    assert found.informative.tolist() == [True, False, True]


# --- Each reward normalised first ---


def test_normalize_then_sum_equals_hand_numbers():
    # Column 1: group 1 is 0, 1: -c, c with c = 0.5 / (0.70710678 (1 + 1e-4)) = 0.70703608; group 2 is constant: 0. Column
    # 2: group 1 constant; group 2 is 3, 1: d, -d with d = 1 / (1.41421356 (1 + 1e-4)) = 0.70703608. With weights 2 and 1:
    # -2c, 2c, d, -d, mean 0, batch std sqrt((8 c^2 + 2 d^2) / 3) = 1.29094... (n - 1 = 3).
    c = d = 0.70703608
    rewards = torch.tensor([[0.0, 4.0], [1.0, 4.0], [6.0, 3.0], [6.0, 1.0]])
    found = group_advantages(rewards, 2, torch.tensor([2.0, 1.0]), aggregation="normalize_then_sum")
    std = math.sqrt((8 * c**2 + 2 * d**2) / 3)
    expected = [value / (std + 1e-4) for value in (-2 * c, 2 * c, d, -d)]
    assert found.advantages.tolist() == pytest.approx(expected, abs=1e-6)
    assert found.rewards.tolist() == [4.0, 6.0, 15.0, 13.0]


@pytest.mark.parametrize("column", [0, 1])
def test_normalize_then_sum_does_not_see_the_scale_or_offset_of_a_reward(column):
    rewards = rand(24, 2, seed=22).double()
    for scale, offset in ((1000.0, 50.0), (1e-4, 0.0), (1e-9, 0.0), (1e-4, -0.2)):
        scaled = rewards.clone()
        scaled[:, column] = scale * scaled[:, column] + offset
        change = {}
        for aggregation in AGGREGATIONS:
            plain, found = (group_advantages(r, 6, aggregation=aggregation).advantages for r in (rewards, scaled))
            change[aggregation] = (found - plain).abs().max()
        assert change["normalize_then_sum"] < 1e-6, scale
        assert change["sum_then_normalize"] > 0.3  # drowned by the larger reward


def test_normalize_then_sum_has_unit_std_over_the_scored_images():
    for seed in range(20):
        rewards = rand(40, 3, seed=seed)
        rewards[seed, 1], rewards[(seed + 11) % 40, 0] = NAN, NAN
        rewards[24:32, 2] = NAN  # does not apply to the fourth prompt
        found = group_advantages(rewards, 8, torch.tensor([1.0, 0.5, 2.0]), aggregation="normalize_then_sum")
        scored = ~found.rewards.isnan()
        # 1e-4 beside a std of about 2, and rounding.
        assert abs(found.advantages[scored].std() - 1) < 2e-4 and abs(found.advantages[scored].mean()) < 1e-5


def test_normalize_then_sum_compares_each_column_over_the_fully_scored_images():
    # The third image lacks reward 2, so its reward 1 (100) must not move the mean or the std of column 1.
    rewards = torch.tensor([[0.0, 1.0], [1.0, 5.0], [100.0, NAN], [3.0, 3.0]])
    found = group_advantages(rewards, 4, aggregation="normalize_then_sum")
    without = group_advantages(rewards[[0, 1, 3]], 3, aggregation="normalize_then_sum")
    torch.testing.assert_close(found.advantages[[0, 1, 3]], without.advantages, rtol=0, atol=1e-6)
    assert found.advantages[2] == 0 and found.informative.tolist() == [True, True, False, True]


def test_normalize_then_sum_ignores_a_reward_that_does_not_apply_to_a_prompt():
    # The second prompt has reward 1 alone: its advantages are those of reward 1 normalised, over the batch
    # std.
    rewards = torch.tensor([[0.0, 1.0], [1.0, 2.0], [1.0, NAN], [3.0, NAN]])
    # Column 1 has stds 0.70710678 and 1.41421356, 1.06066017 in the mean, of which 1e-4 is added: c and d. Column 2: e.
    c, d, e = 0.5 / 0.70721285, 1 / 1.41431963, 0.70703608
    std = math.sqrt((2 * (c + e) ** 2 + 2 * d**2) / 3) + 1e-4
    found = group_advantages(rewards, 2, aggregation="normalize_then_sum").advantages
    assert found.tolist() == pytest.approx([-(c + e) / std, (c + e) / std, -d / std, d / std], abs=1e-6)


def test_rewards_that_cancel_within_a_group_are_dead_when_normalised():
    rewards = torch.tensor([[0.0, 1.0], [1.0, 0.0], [0.0, 0.0], [1.0, 1.0]])
    found = group_advantages(rewards, 2, aggregation="normalize_then_sum")
    assert found.informative.tolist() == [False, False, True, True] and found.advantages[:2].tolist() == [0.0, 0.0]


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("offset", [0.0, 1e4, 1e8])
def test_small_differences_of_large_scores_are_not_lost(aggregation, offset):
    """A size in bytes, a time: in float32 the images of a group would all score the same."""
    small = torch.tensor([0.1, 0.4, 0.2, 0.9, 0.3, 0.3], dtype=torch.float64)
    expected = group_advantages(small, 3, aggregation=aggregation)
    found = group_advantages(small + offset, 3, aggregation=aggregation)
    assert found.informative.all() and torch.allclose(found.advantages, expected.advantages, atol=1e-5)
    assert best_worst((small + offset)[:, None], 3).best.tolist() == [1, 3]


@pytest.mark.parametrize("weight", [1.0, 0.37, 100.0])
def test_the_rounding_of_a_network_is_no_preference(weight):
    """The same image in another batch scores one unit of float32 more; the weight makes no float32 number of it."""
    score = torch.tensor(21.3)
    scores = torch.stack([score, torch.nextafter(score, torch.tensor(99.0)), score, score]).double()
    rewards = torch.stack([scores, torch.full((4,), 0.1, dtype=torch.float64)], 1)
    for aggregation in AGGREGATIONS:
        found = group_advantages(rewards, 4, torch.tensor([weight, 1.0]), aggregation=aggregation)
        assert not found.informative.any() and found.dead_groups == 1.0


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("infinite", [math.inf, -math.inf])
def test_an_infinite_score_is_none(aggregation, infinite):
    """A logarithm of 0 in a reward would otherwise make every weight of the model NaN in the next update."""
    found = group_advantages(torch.tensor([0.2, infinite, 0.9, 0.4]), 4, aggregation=aggregation)
    expected = group_advantages(torch.tensor([0.2, NAN, 0.9, 0.4]), 4, aggregation=aggregation)
    assert torch.equal(found.advantages, expected.advantages) and found.advantages.isfinite().all()
    assert found.informative.tolist() == [True, False, True, True]


@pytest.mark.parametrize(("difference", "informative"), [(3e-7, False), (3e-6, True)])
def test_scores_that_differ_by_a_millionth_are_equal_and_by_three_are_not(difference, informative):
    """Rounding would be trained on as a preference, or a reward that counts in small units would train nothing."""
    scores = torch.tensor([0.0, difference], dtype=torch.float64)
    assert group_advantages(scores, 2).informative.tolist() == [informative] * 2
    assert best_worst(scores[:, None], 2).informative.tolist() == [informative]


def test_normalised_rewards_that_contradict_each_other_make_a_dead_group_and_a_small_difference_does_not():
    """What is left of two opposed rewards is the 1e-4 beside their std: it would be trained on as a preference."""
    # The stds of column 1 are 0.7071 and 6.3640, of column 2 both 0.7071: they leave 0.7071 x 4e-4 = 2.8e-4.
    opposed = torch.tensor([[0.0, 1.0], [1.0, 0.0], [0.0, 0.0], [9.0, 1.0]])
    assert (
        group_advantages(opposed, 2, aggregation="normalize_then_sum").informative.tolist() == [False] * 2 + [True] * 2
    )
    # Here the second reward likes the middle image 0.003 better than the first dislikes it: its sum is 0.004.
    nearly = torch.tensor([[0.0, 1.0], [0.5, 0.503], [1.0, 0.0]])
    found = group_advantages(nearly, 3, aggregation="normalize_then_sum")
    assert found.informative.all() and found.advantages.argmax() == 1


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("scale", SCALES)
def test_a_batch_with_a_single_score_is_dead_and_no_nan(aggregation, scale):
    """A reward service that fails on all images but one would make every weight NaN: one value has no std."""
    found = group_advantages(torch.tensor([NAN, 0.7, NAN, NAN]), 2, scale_rewards=scale, aggregation=aggregation)
    assert found.advantages.tolist() == [0.0] * 4 and found.dead_groups == 1.0


def test_two_rewards_that_cancel_but_for_the_rounding_of_the_larger_are_dead():
    """1000000.0625 is the next float32 number after a million: a network says it of the same image."""
    rewards = torch.tensor([[1000000.0625, 0.0], [0.0, 1e6]], dtype=torch.float64)
    assert not group_advantages(rewards, 2).informative.any() and not best_worst(rewards, 2).informative.any()


# --- Scaling and clipping ---


def test_batch_scaling_divides_by_the_std_of_the_whole_batch():
    # 0, 1 | 0, 3: batch mean 1, squares 1 + 0 + 1 + 4 = 6 over 3: std sqrt(2) = 1.41421356, + 1e-4. Centred
    # by group: -0.5, 0.5, -1.5, 1.5.
    expected = [value / 1.41431356 for value in (-0.5, 0.5, -1.5, 1.5)]
    assert advantages([0.0, 1.0, 0.0, 3.0], 2, scale_rewards="batch") == pytest.approx(expected, abs=1e-6)


def test_batch_scaling_leaves_missing_scores_out_of_the_std():
    # Scored: 0, 1, 0, 3, as above, in groups of three with one missing each.
    expected = [value / 1.41431356 for value in (-0.5, 0.5, 0, 0, -1.5, 1.5)]
    found = advantages([0.0, 1.0, NAN, NAN, 0.0, 3.0], 3, scale_rewards="batch")
    assert found == pytest.approx(expected, abs=1e-6)


def test_dead_groups_count_in_the_std_of_the_batch():
    """As prompts are solved and their groups die, updates become smaller instead of going by the last few alone."""
    # 0, 1 | 5, 5: mean 2.75, squares 7.5625 + 3.0625 + 2 x 5.0625 = 20.75 over 3: std 2.62995564.
    rewards = [0.0, 1.0, 5.0, 5.0]
    found = advantages(rewards, 2, scale_rewards="batch")
    assert found == pytest.approx([-0.5 / 2.63005564, 0.5 / 2.63005564, 0, 0], abs=1e-6)
    # Normalised in their group: -a, a, 0, 0, with squares 2 a^2 over 3: a / std = sqrt(3 / 2) = 1.22474487.
    found = advantages(rewards, 2, aggregation="normalize_then_sum")
    assert found == pytest.approx([-1.22474487, 1.22474487, 0, 0], abs=3e-4)


def test_no_scaling_only_subtracts_the_mean_of_the_group():
    assert advantages([0.0, 1.0, 0.0, 3.0], 2, scale_rewards="none") == [-0.5, 0.5, -1.5, 1.5]


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_clip_bounds_both_signs_and_leaves_the_rest(aggregation):
    rewards = torch.tensor([0.0, 1.0, 2.0, 3.0, 20.0, -18.0])
    plain = group_advantages(rewards, 6, aggregation=aggregation).advantages
    found = group_advantages(rewards, 6, aggregation=aggregation, clip=0.5).advantages
    inside = plain.abs() <= 0.5
    assert inside.tolist() == [True, True, True, True, False, False]
    assert torch.equal(found[inside], plain[inside]) and found[~inside].tolist() == [0.5, -0.5]


# --- Precision ---


@pytest.mark.parametrize("step", [1.0, 0.0625])
@pytest.mark.parametrize("size", [4, 16])
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_a_huge_common_offset_does_not_change_the_advantages(step, size, aggregation):
    # 1e6 + k / 16 is exact in float32, so nothing is lost in the rewards themselves.
    small = step * rand(size, seed=30).argsort()
    shifted = 1e6 + small
    assert torch.equal(shifted - 1e6, small)
    plain, found = (group_advantages(r, size, aggregation=aggregation).advantages for r in (small, shifted))
    torch.testing.assert_close(found, plain, rtol=0, atol=1e-5)


def test_integer_and_double_rewards_give_float32_advantages():
    rewards = torch.tensor([1, 2, 3, 4])
    expected = group_advantages(rewards.float(), 4).advantages
    for dtype in (torch.int64, torch.float64):
        found = group_advantages(rewards.to(dtype), 4).advantages
        assert found.dtype == torch.float32 and torch.equal(found, expected)


# --- Errors ---


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_generations": 1}, "at least 2 .* found 1"),
        ({"num_generations": 4}, "6 images do not make whole groups of num_generations=4"),
        ({"num_generations": 3, "scale_rewards": "std"}, "scale_rewards must be .* not 'std'"),
        ({"num_generations": 3, "aggregation": "sum"}, "aggregation must be .* not 'sum'"),
    ],
)
def test_a_bad_argument_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        group_advantages(torch.arange(6.0), **arguments)


# --- Pairs ---


def test_best_and_worst_are_those_of_hand_numbers():
    nan = math.nan
    rewards = torch.tensor([[0.2, 0.9, 0.1, 0.9], [nan, 0.3, nan, 0.4], [0.5, 0.5, 0.5, nan], [nan, nan, 1.0, nan]])
    pairs = best_worst(rewards.view(-1, 1), 4)
    assert pairs.informative.tolist() == [True, True, False, False]
    assert pairs.best[pairs.informative].tolist() == [1, 7] and pairs.worst[pairs.informative].tolist() == [2, 5]
    assert best_worst(rewards.view(-1, 1), 4, min_margin=0.5).informative.tolist() == [True, False, False, False]
    turned = best_worst(rewards.view(-1, 1), 4, torch.tensor([-2.0]))
    assert turned.best[:2].tolist() == [2, 5] and turned.rewards[0].item() == pytest.approx(-0.4)


def test_a_pair_whose_margin_is_the_least_one_is_made():
    """Scores in steps, of votes or of stars, would lose every pair that is exactly the step apart."""
    scores = torch.tensor([0.25, 0.75, 0.25, 0.625])[:, None]
    assert best_worst(scores, 2, min_margin=0.5).informative.tolist() == [True, False]


def test_best_and_worst_go_by_the_weighted_sum_and_rounding_makes_no_pair():
    rewards = torch.tensor([[1.0, 0.0, 7.0], [0.0, 1.0, 8.0], [0.1 + 0.2, 0.3, 9.0], [0.3, 0.3, 1.0]])
    pairs = best_worst(rewards, 2, torch.tensor([1.0, 2.0, 0.0]))
    assert pairs.best.tolist()[0] == 1 and pairs.worst.tolist()[0] == 0
    assert pairs.informative.tolist() == [True, False]


def test_pairs_made_online_are_those_that_are_made_of_a_ranked_data_set():
    """``preference_data.pairs`` decides the same from scores on disk, ties and missing scores included."""
    scores = torch.randint(0, 3, (200, 4), generator=torch.Generator().manual_seed(0)).double()
    scores[torch.rand(scores.shape, generator=torch.Generator().manual_seed(1)) < 0.3] = math.nan
    pairs = best_worst(scores.view(-1, 1), 4)
    for group, row in enumerate(scores.tolist()):
        images = [ImageSource.of(Image.new("RGB", (8, 8), (n, 0, 0)), str(n)) for n in range(4)]
        ranked = Ranked("a circle", images, [None if math.isnan(s) else s for s in row])
        made = [(images.index(p.chosen), images.index(p.rejected)) for p in build_pairs([ranked])]
        ours = [(pairs.best[group].item() - 4 * group, pairs.worst[group].item() - 4 * group)]
        assert made == (ours if pairs.informative[group] else [])
    assert 0.3 < pairs.informative.float().mean() < 0.9


# --- Weights that differ between prompts ---


def test_weights_of_each_image_are_the_groups_on_their_own():
    rewards = torch.rand(12, 2, generator=torch.Generator().manual_seed(0))
    rewards[5, 0] = torch.nan
    per_group = torch.tensor([[1.0, 0.5], [0.0, 2.0], [3.0, 0.0]])
    together = group_advantages(rewards, 4, per_group.repeat_interleave(4, 0))
    alone = [group_advantages(part, 4, w) for part, w in zip(rewards.split(4), per_group, strict=True)]
    assert torch.equal(together.advantages, torch.cat([a.advantages for a in alone]))
    assert torch.equal(
        together.rewards, torch.cat([a.rewards for a in alone])
    )  # row 5 counts: its reward weighs 0 there
    assert together.informative.all()


def test_a_reward_that_weighs_nothing_in_a_group_is_not_compared_there():
    rewards = torch.tensor([[1.0, 9.0], [0.0, -9.0], [1.0, 5.0], [1.0, 6.0]])
    weights = torch.tensor([[1.0, 0.0]] * 2 + [[0.0, 1.0]] * 2)
    for aggregation in ("sum_then_normalize", "normalize_then_sum"):
        result = group_advantages(rewards, 2, weights, aggregation=aggregation)
        assert [a > 0 for a in result.advantages.tolist()] == [True, False, False, True]
    assert combine_rewards(rewards, weights, 2).tolist() == [1.0, 0.0, 5.0, 6.0]


@pytest.mark.parametrize("shape", [(3,), (4, 3), (2, 2)])
def test_weights_of_another_shape_are_refused(shape):
    with pytest.raises(ValueError, match=r"weights of shape .* for 2 rewards of 4 images"):
        group_advantages(torch.rand(4, 2), 2, torch.ones(shape))


# --- The best and the worst of a group ---


def test_extremes_keep_half_best_and_half_worst_of_the_live():
    scores = torch.tensor([3.0, 1.0, 2.0, 5.0, 4.0, torch.nan] + [7.0] * 6 + [0.0, 0.0, 1.0, 1.0, 2.0, 2.0])
    group = group_advantages(scores, 6)
    kept = extremes(group, 6, 3)
    assert kept.informative.view(3, 6).tolist() == [
        [False, True, False, True, True, False],  # 5 and 4, and 1; what has no score is neither
        [False] * 6,
        [True, False, False, False, True, True],  # of equal ones the first
    ]
    assert torch.equal(kept.advantages[kept.informative], group.advantages[kept.informative])
    assert not kept.advantages[~kept.informative].any()
    assert kept.dead_groups == group.dead_groups and kept.rewards.nan_to_num().equal(group.rewards.nan_to_num())


@pytest.mark.parametrize("keep", [5, 6])
def test_extremes_of_fewer_images_than_are_kept_are_all_of_them(keep):
    group = group_advantages(torch.tensor([3.0, 1.0, torch.nan, 5.0, 4.0, 2.0]), 6)
    kept = extremes(group, 6, keep)
    assert torch.equal(kept.informative, group.informative) and torch.equal(kept.advantages, group.advantages)
