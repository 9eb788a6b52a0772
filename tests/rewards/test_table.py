"""The table of built-ins agrees with what this distribution says that it brings."""

import importlib.util
import inspect
import re
import tomllib
import typing
from pathlib import Path

import pytest

from rewards import BUILTINS, load_rewards
from rewards.geneval.reward import GenEval
from rewards.registry import resolve
from rewards.table import require_packages

EXTRAS = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]["optional-dependencies"]


@pytest.mark.parametrize("name", sorted(BUILTINS))
def test_the_extra_of_a_built_in_brings_its_packages(name):
    builtin = BUILTINS[name]
    brought = {re.match(r"[\w-]+", line)[0] for line in EXTRAS[builtin.extra]} if builtin.extra else set()
    assert set(builtin.packages) <= brought
    assert importlib.util.find_spec(builtin.target.partition(":")[0]) is not None
    require_packages(name)  # the tests have everything


def test_an_extra_is_named_where_a_package_is_missing(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"'ocr' needs the package rapidocr, onnxruntime.*align\[ocr\]"):
        require_packages("ocr")
    require_packages("brightness")


def test_the_columns_of_the_table_are_those_that_the_rewards_take():
    args = {"shapes_preference": {"attribute": "background", "values": ["red"]}}
    args["vlm_judge"] = {"model": "m", "base_url": "http://localhost/v1"}
    checkpointed = {name for name, builtin in BUILTINS.items() if builtin.checkpoints}
    rewards = load_rewards([{"use": name, "args": args.get(name)} for name in BUILTINS if name not in checkpointed])
    taken = {reward.name: (reward.columns or (), reward.required) for reward in rewards}
    taken["geneval"] = (("tag", "include", "exclude"), ("tag", "include"))
    assert set(inspect.signature(GenEval.__call__).parameters) == {"self", "images", "prompts", *taken["geneval"][0]}
    for name, builtin in BUILTINS.items():
        required = tuple(column for column in builtin.columns if not column.endswith("?"))
        optional = {column[:-1] for column in builtin.columns if column.endswith("?")}
        columns, needed = taken.get(name, ((), ()))
        assert (needed, optional - set(columns)) == (required, set()), name


@pytest.mark.parametrize("name", ["hpsv2", "imagereward", "pickscore", "clipscore", "aesthetic"])
def test_a_learned_reward_takes_images_and_prompts_alone(name):
    made = resolve(BUILTINS[name].target)
    made = made if inspect.isclass(made) else typing.get_type_hints(made)["return"]
    assert list(inspect.signature(made.__call__).parameters) == ["self", "images", "prompts"]
    assert BUILTINS[name].columns == ()
