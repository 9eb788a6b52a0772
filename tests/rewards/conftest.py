"""Checkpoints of the learned rewards, written once."""

import pytest
from reward_checkpoints import RewardWorld


@pytest.fixture(scope="session")
def world(tmp_path_factory) -> RewardWorld:
    return RewardWorld(tmp_path_factory.mktemp("rewards"))
