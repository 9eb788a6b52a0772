"""Shared parts of the tests: the embedded model, its prompts, and short training runs on it."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may reach for a hub

import pytest
import torch
from datasets import Dataset
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry

from align.models.families import load_model
from align.models.qwen_image import QwenImage
from align.tiny import PROMPTS
from preference_data.prompts import load_prompts

# Of two cores: both, or one for each of two processes of tests.
torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else 2)


@pytest.fixture(autouse=True)
def stock_attention():
    """diffusers keeps the attention backend for the process: a run in it that sets another would change later tests."""
    yield
    _AttentionBackendRegistry.set_active_backend(AttentionBackendName.NATIVE)


@pytest.fixture
def tiny() -> QwenImage:
    """A fresh embedded model in float32."""
    model = load_model("tiny")
    model.pipeline.set_progress_bar_config(disable=True)
    return model


@pytest.fixture
def offline_wandb(monkeypatch):
    """The module, with no run open: all trainers of a process would share it. ``finish()`` it before its files are read."""
    import wandb

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    yield wandb
    wandb.teardown()  # else the next run goes to this one's folder


@pytest.fixture(scope="session")
def background_prompts() -> Dataset:
    return load_prompts(str(PROMPTS / "background"), "train")
