"""Checkpoints of the learned rewards, written once."""

import pytest
from reward_checkpoints import RewardWorld

from rewards import redaction


@pytest.fixture(autouse=True)
def no_known_secrets(monkeypatch):
    """What one test gives as a key is not hidden in the texts of another."""
    monkeypatch.setattr(redaction, "_known", set())


@pytest.fixture(scope="session")
def world(tmp_path_factory) -> RewardWorld:
    return RewardWorld(tmp_path_factory.mktemp("rewards"))
