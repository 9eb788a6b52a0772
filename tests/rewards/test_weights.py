"""A reward's share in the sum, by a data column."""

import pytest

from rewards import load_rewards
from rewards.weights import CategoryWeights

BY = {"by": "category", "text": 1, "photo": "2e-1"}


def load(weight):
    return load_rewards([{"use": "grounded", "weight": weight}])[0]


def test_a_weight_goes_by_the_value_of_a_column():
    reward = load(BY | {"default": 0})
    rows = [{"category": value} for value in ("text", "photo", "else", None)]
    assert [reward.weight_of(row) for row in rows] == [1.0, 0.2, 0.0, 0.0]
    assert str(reward.weight) == "by category: text: 1, photo: 0.2, others: 0"
    assert reward.weight and load(0.5).weight_of({}) == 0.5


def test_a_reward_whose_weights_are_all_zero_is_only_measured():
    assert not load({"by": "category", "text": 0}).weight


def test_a_reward_that_weighs_only_by_its_default_is_trained_on():
    """Taken for a measured one, it would be refused as nothing to train on, or left out of the images' sum."""
    assert load({"by": "category", "text": 0, "default": 1}).weight
    assert load({"by": "category", "text": 0, "photo": 1}).weight
    assert not load({"by": "category", "text": 0, "default": 0}).weight


def test_numbers_and_booleans_are_categories_by_their_text():
    assert CategoryWeights("level", {"1": 0.5, "True": 2.0}).of(1) == 0.5
    assert load({"by": "level", 1: 0.5}).weight_of({"level": 1}) == 0.5


@pytest.mark.parametrize(
    ("weight", "said"),
    [
        ({"text": 1.0}, "without `by`: the name of the data column"),
        ({"by": 3, "text": 1.0}, "without `by`"),
        ({"by": "category"}, "has no value of 'category'"),
        ({"by": "category", "default": 1}, "has no value of 'category'"),
        (
            {"by": "category", "text": "much"},
            "weight of reward 'grounded' for 'text' must be a finite number, found 'much'",
        ),
        ({"by": "category", "text": True}, "must be a finite number, found True"),
        ([1.0], r"must be a finite number, found \[1.0\]"),
    ],
)
def test_what_is_no_weight_is_answered_with_a_sentence(weight, said):
    with pytest.raises(ValueError, match=said):
        load(weight)


def test_a_column_or_a_value_that_is_missing_is_named():
    reward = load(BY)
    with pytest.raises(
        ValueError, match=r"weight of reward 'grounded' depends on the data column 'category'.*'categories'"
    ):
        reward.check_columns(["prompt", "categories"])
    reward.check_columns(["prompt", "category"])
    reward.check_weights({"category": ["text", "photo"]})
    with pytest.raises(
        ValueError, match=r"reward 'grounded', row 1 of the data: category 'foto' has no weight.*'photo'"
    ):
        reward.check_weights({"category": ["text", "foto"]})
