"""What the rest of the library may ask of a reward, wherever it runs."""

import ast
from datetime import datetime
from pathlib import Path

import pytest

from rewards import Reward, contract, load_rewards
from rewards.contract import RunsElsewhere


class Elsewhere(RunsElsewhere):
    columns, required = ("level",), ()

    async def __call__(self, images, prompts, **columns):
        return [1.0 for _ in images]

    def check_values(self, row):
        if not all(isinstance(value, int) for value in row.values()):
            raise ValueError(f"cannot send {row}")

    def problem(self):
        return None

    def revive(self):
        pass

    def close(self):
        self.closed = True


def test_the_contract_imports_nothing_from_where_rewards_run():
    tree = ast.parse(Path(contract.__file__).read_text())
    modules = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert {module for module in modules if module.startswith("rewards.")} == {
        "rewards.hints",
        "rewards.redaction",
        "rewards.threads",
        "rewards.weights",
    }


def test_a_reward_that_runs_elsewhere_checks_the_values_of_the_columns_that_it_takes():
    reward = Reward("there", Elsewhere(), 1.0, ("level",), ())
    reward.check_row({"prompt": "p", "level": 3, "other": datetime(2026, 1, 1)})
    with pytest.raises(ValueError, match=r"cannot send \{'level': 'x'\}"):
        reward.check_row({"prompt": "p", "level": "x"})
    everything = Reward("there", Elsewhere(), 1.0, None, ())
    with pytest.raises(ValueError, match=r"cannot send \{'other': None\}"):
        everything.check_row({"prompt": "p", "other": None})
    reward.close()
    assert reward.function.closed


def test_a_callable_of_the_users_own_takes_any_value_whatever_its_attributes_are_called():
    class Mine:
        endpoints, environment, truncated = "http://mine", "mine", 5

        def __call__(self, images, prompts, level):
            return [1.0 for _ in images]

    (mine,) = load_rewards([Mine()])
    mine.check_row({"prompt": "p", "level": datetime(2026, 1, 1)})
    assert mine.truncated == 5
    mine.close()


@pytest.mark.parametrize("timeout", [{}, {"timeout": 5}])
@pytest.mark.parametrize("kind", ["def", "async def"])
def test_a_reward_that_cannot_be_closed_costs_nothing(tmp_path, caplog, kind, timeout):
    """What it raised took the place of the scores, or of what had ended the run, and left later rewards running."""
    file = tmp_path / "unclosable.py"
    call, close = f"{kind} __call__(self, images, prompts): return [1.0]", f"{kind} close(self): raise OSError('gone')"
    file.write_text(f"class Mine:\n    {call}\n    {close}\n\nmine = Mine()\n")
    (mine,) = load_rewards([{"use": f"{file}:mine"} | timeout])
    mine.close()
    assert "reward 'mine' could not be closed: OSError: gone" in caplog.text


def test_cut_prompts_are_counted_under_a_time_limit_too(tmp_path):
    file = tmp_path / "counting.py"
    file.write_text(
        "class Counting:\n    truncated = 7\n\n    def __call__(self, images, prompts):\n        return [1.0 for _ in images]\n\n"
        "counting = Counting()\n\ndef plain(images, prompts):\n    return [1.0 for _ in images]\n"
    )
    rewards = load_rewards([{"use": f"{file}:{name}", "timeout": 5} for name in ("counting", "plain")])
    assert [reward.truncated for reward in rewards] == [7, None]
