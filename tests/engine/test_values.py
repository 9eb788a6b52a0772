"""What a setting's value may be, by its annotation and its bounds."""

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pytest
from transformers import TrainingArguments
from transformers.trainer_utils import SchedulerType

from align.engine.settings import check_settings, setting
from align.engine.values import Bounds, takes_texts, wrong_kind

NAN, INFINITE = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        (int, 3), (int, -3), (int, np.int64(3)), (int | None, None), (float, 3), (float, 0.5), (float, np.float32(2)),
        (bool, False), (bool | None, None), (str, ""), (str | None, None), (list[int], []), (list[int] | None, (1, 2)),
        (list[str], ["a"]), (Literal["a", "b"], "b"), (SchedulerType | str, "cosine"), (dict | str | None, {"a": 1}),
        (dict[str, Any] | str | None, "{}"), (Any, None), (int, object()), (SchedulerType | str, SchedulerType.COSINE),
    ],
)  # fmt: skip
def test_a_value_of_its_kind_passes(kind, value):
    assert wrong_kind(kind, value) is None


@pytest.mark.parametrize(
    ("kind", "value", "wanted"),
    [
        (int, 2.5, "a whole number"),
        (int, 1.0, "a whole number"),
        (int, True, "a whole number"),
        (int | None, [8], "a whole number"),
        (int, NAN, "a whole number"),
        (int, None, "a whole number"),
        (float, "1", "a number"),
        (float, False, "a number"),
        (float | None, [0.9], "a number"),
        (float, NAN, "a finite number"),
        (float | None, -INFINITE, "a finite number"),
        (bool, [False], "true or false"),
        (bool | None, 1, "true or false"),
        (str, 3, "text"),
        (list[int] | None, ["a", "b"], "a list of whole numbers"),
        (list[int], [0.5, 2], "a list of whole numbers"),
        (list[int], [None], "a list of whole numbers"),
        (list[float], [NAN], "a list of numbers"),
        (list[str] | None, "a", "a list of texts"),
        (Literal["a", "b"], "c", "one of a, b"),
        (dict | None, [1], "a mapping"),
        (str | list[str] | None, 3, "text or a list of texts"),
    ],
)
def test_a_value_of_another_kind_says_what_it_should_be(kind, value, wanted):
    assert wrong_kind(kind, value) == wanted


def test_an_unknown_word_for_an_enum_names_those_there_are():
    assert str(wrong_kind(SchedulerType | str, "cosin")).startswith("one of linear, cosine, ")


def test_entries_that_may_be_mappings_are_left_to_who_reads_them():
    for value in ("a", {"use": "a"}, ["a", {"use": "b"}, None]):
        assert wrong_kind(list[str], value, mappings=True) is None
    assert wrong_kind(list[str], 3, mappings=True) == "a list of texts"


def test_a_list_of_texts_is_told_from_a_text():
    assert takes_texts(list[str]) and takes_texts(list[str] | None)
    assert not any(map(takes_texts, (str, list[int], str | list[str] | None, None)))


@pytest.mark.parametrize(
    ("bounds", "said", "inside", "outside"),
    [
        (Bounds(least=1), "must be at least 1", [1, 9], [0.9, -1]),
        (Bounds(most=1), "must be at most 1", [1, -9], [1.1]),
        (Bounds(above=0), "must be positive", [1e-9], [0, -1]),
        (Bounds(above=2), "must be above 2", [3], [2]),
        (Bounds(least=0, most=1), "must lie in [0, 1]", [0, 1], [-0.1, 1.1]),
        (Bounds(least=0, below=1), "must lie in [0, 1)", [0, 0.9], [1, -0.1]),
        (Bounds(above=0, below=1), "must lie inside (0, 1)", [0.5], [0, 1]),
        (Bounds(above=0, most=1), "must lie in (0, 1]", [1], [0]),
        (Bounds(), "must be anything", [-1e9, 1e9], []),
    ],
)
def test_bounds(bounds, said, inside, outside):
    assert all(map(bounds.hold, inside)) and not any(map(bounds.hold, outside))
    assert said == "must be anything" or str(bounds) == said


def test_a_setting_is_checked_by_what_its_field_says():
    @dataclass
    class Settings:
        rate: float = setting(0.5, "A rate.", above=0, below=1)
        sizes: list[int] | None = setting(None, "Sizes.")

    check_settings(Settings())
    for given, message in (
        ({"rate": 1.0}, r"rate must lie inside \(0, 1\), found 1.0"),
        ({"rate": NAN}, "rate must be a finite number, found nan"),
        ({"rate": None}, "rate must be a number, found None"),
        ({"sizes": [2.5]}, r"sizes must be a list of whole numbers, found \[2.5\]"),
    ):
        with pytest.raises(ValueError, match=message):
            check_settings(Settings(**given))


def test_transformers_own_defaults_pass(tmp_path):
    check_settings(TrainingArguments(output_dir=str(tmp_path), use_cpu=True))
