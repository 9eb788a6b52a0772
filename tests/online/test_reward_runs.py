"""GRPO with its rewards in the process, in a worker's process and behind a service, and through the service's deaths."""

import json
import signal
import sys
import threading
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from services import Service
from transformers import TrainerCallback

from align.grpo import GRPOConfig, GRPOTrainer
from align.models.families import load_model
from align.tiny import PROMPTS
from preference_data.prompts import load_prompts
from rewards import RewardError
from rewards.remote import client

#: What the word prompts ask for stands in no quotes.
OCR = {"use": "ocr", "args": {"pattern": "the word ([A-Z]+)"}}
ENTRIES = [OCR, {"use": "shapes_following", "weight": 0.5}]
WORDS = load_prompts(str(PROMPTS / "words"), "train")


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Pauses of a test's length."""
    monkeypatch.setattr(client, "BACKOFF_SECONDS", 0.2)
    monkeypatch.setattr(client, "LONGEST_SECONDS", 1.0)
    monkeypatch.setattr(client, "LEFT_OUT_SECONDS", 0.2)
    monkeypatch.delenv("FLOW_ALIGN_TOKEN", raising=False)


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("service") / "rewards.yaml"
    file.write_text(json.dumps({"rewards": [{key: e[key] for key in ("use", "args") if key in e} for e in ENTRIES]}))
    return file


def served(url: str, **more) -> list[dict]:
    return [{key: e[key] for key in ("use", "weight") if key in e} | {"endpoints": url} | more for e in ENTRIES]


def trainer(folder: Path, rewards: list, callback: TrainerCallback | None = None) -> GRPOTrainer:
    args = GRPOConfig(
        output_dir=str(folder),
        height=64,
        width=64,
        num_inference_steps=6,
        sde_window_size=2,
        num_generations=4,
        generation_batch_size=8,
        rollout_batch_size=4,  # two parts: one is scored while the other is sampled
        per_device_train_batch_size=16,
        max_steps=3,
        learning_rate=1e-3,
        epsilon=1e-3,
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
        seed=5,
    )
    lora = LoraConfig(r=4, lora_alpha=8, init_lora_weights="gaussian")
    model = load_model("tiny")
    return GRPOTrainer(model, rewards, args, WORDS, peft_config=lora, callbacks=[callback] if callback else None)


def outcome(run: GRPOTrainer) -> tuple[list[dict], dict[str, torch.Tensor]]:
    """What was logged, but for times and the check at each start with the forwards it costs, and the weights."""
    apart = ("seconds", "per_second", "runtime", "memory", "ratio_", "forward_equivalents")
    log = [
        {key: value for key, value in entry.items() if not any(word in key for word in apart)}
        for entry in run.state.log_history
        if "loss" in entry
    ]
    return log, {name: p.detach().clone() for name, p in run.trained_parameters().items()}


def assert_same(one, other) -> None:
    for found, expected in zip(one[0], other[0], strict=True):
        assert {key: (found.get(key), value) for key, value in expected.items() if found.get(key) != value} == {}
    assert all(torch.equal(one[1][name], other[1][name]) for name in one[1])


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    run = trainer(tmp_path_factory.mktemp("here"), ENTRIES)
    run.train()
    log, weights = outcome(run)
    assert len(log) == 3 and all(entry["rewards/ocr/unscored"] == 0 < entry["reward_std"] for entry in log)
    return log, weights


def test_a_worker_in_another_process_gives_the_same_run_to_the_bit(tmp_path, undisturbed):
    run = trainer(tmp_path, [{**entry, "environment": {"python": sys.executable}} for entry in ENTRIES])
    run.train()
    assert_same(outcome(run), undisturbed)
    for reward in run.rewards:
        reward.close()


def test_a_service_gives_the_same_run_to_the_bit(tmp_path, undisturbed, config):
    service = Service("--config", str(config))
    run = trainer(tmp_path, served(service.url))
    run.train()
    service.end()
    assert_same(outcome(run), undisturbed)


class AfterUpdate(TrainerCallback):
    """Does something at the end of one update."""

    def __init__(self, update: int, act) -> None:
        self.update, self.act = update, act

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.update:
            self.act()


def test_a_service_that_is_killed_and_comes_back_costs_nothing_but_time(tmp_path, undisturbed, config):
    first = Service("--config", str(config))
    later: list[Service] = []

    def restart() -> None:
        later.append(Service("--config", str(config), port=first.port, wait=False))

    def kill() -> None:
        first.end(signal.SIGKILL)
        threading.Timer(2.0, restart).start()

    run = trainer(tmp_path, served(first.url, retries=60), AfterUpdate(1, kill))
    run.train()
    later[0].end()
    assert_same(outcome(run), undisturbed)


def test_a_service_that_stays_away_stops_the_run_with_a_checkpoint_that_resumes(tmp_path, undisturbed, config):
    service = Service("--config", str(config))
    run = trainer(tmp_path, served(service.url, retries=1), AfterUpdate(2, lambda: service.end(signal.SIGKILL)))
    with pytest.raises(RewardError, match=r"reward 'ocr' failed for 8 of 8 images: given up after 2 tries: http"):
        run.train()
    assert run.state.global_step == 2
    service = Service("--config", str(config), port=service.port)
    resumed = trainer(tmp_path, served(service.url))
    resumed.train(resume_from_checkpoint=True)
    service.end()
    assert_same(outcome(resumed), undisturbed)


def test_a_service_that_is_not_there_is_said_before_a_model_is_loaded(tmp_path):
    with pytest.raises(ValueError, match=r"no endpoint of reward 'ocr' answers: http://127.0.0.1:9: ConnectError"):
        trainer(tmp_path, served("http://127.0.0.1:9"))
