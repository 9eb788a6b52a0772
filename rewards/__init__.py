"""Rewards: callables ``reward(images, prompts, **columns) -> list of float or None``.

``images`` is a list of PIL images, ``prompts`` a list of str. ``columns`` are the other data columns that the callable
asks for by name, each a list of the same length. None (or NaN) means *not scored*, which is not the same as 0. The
callable may be ``async``. This package never imports ``align``.
"""

from rewards.calling import score
from rewards.contract import Reward, RewardError, RewardFailed, RewardUnavailable
from rewards.registry import load_rewards
from rewards.table import BUILTINS

__all__ = ["BUILTINS", "Reward", "RewardError", "RewardFailed", "RewardUnavailable", "load_rewards", "score"]
