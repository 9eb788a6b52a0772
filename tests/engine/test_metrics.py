"""Where the time of a run went: parts of the model, waiting for rewards, and the rest."""

import time

import pytest
from torch import nn

from align.engine.metrics import ModelClock, RunMetrics


class Slow(nn.Module):
    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.seconds = seconds

    def forward(self, x):
        time.sleep(self.seconds)
        return x


class Fails(nn.Module):
    def forward(self, x):
        raise RuntimeError("no")


def test_forwards_of_attached_modules_are_counted_to_their_part():
    clock, slow, other = ModelClock(), Slow(0.02), Slow(0.01)
    with clock.attached({"transformer": [slow], "vae": [other]}):
        slow(1), slow(1), other(1)
    slow(1)  # no longer attached
    seconds = clock.read()
    assert seconds["transformer"] >= 0.04 and seconds["vae"] >= 0.01
    assert seconds["transformer"] > seconds["vae"]
    assert clock.read() == {}
    assert not slow._forward_hooks and not slow._forward_pre_hooks


def test_a_forward_that_fails_leaves_the_clock_in_order():
    clock, slow, broken = ModelClock(), Slow(0.01), Fails()
    with clock.attached({"a": [broken], "b": [slow]}):
        with pytest.raises(RuntimeError):
            broken(1)
        slow(1)
    assert set(clock.read()) == {"a", "b"}


def test_what_is_neither_model_nor_reward_nor_paused_is_outside():
    metrics, slow, unseen = RunMetrics(("rollout", "reward", "update")), Slow(0.03), Slow(0.03)
    with metrics.models.attached({"transformer": [slow], "vae": [unseen]}):
        with metrics.timed("rollout"):
            slow(1)
        with metrics.timed("reward"):
            time.sleep(0.03)
        with metrics.paused():
            unseen(1)
        logs = metrics.drain()
        assert logs["seconds_outside_models"] >= 0 and "seconds_vae" not in logs
        assert logs["seconds_rollout"] >= logs["seconds_transformer"] >= 0.03
        with metrics.timed("update"):
            time.sleep(0.03)
        logs = metrics.drain()
    assert logs["seconds_outside_models"] >= 0.03 and "seconds_transformer" not in logs


def test_a_run_logs_where_its_time_went(tmp_path):
    from datasets import Dataset
    from peft import LoraConfig

    from align.grpo import GRPOConfig, GRPOTrainer

    args = GRPOConfig(
        output_dir=str(tmp_path),
        height=64,
        width=64,
        num_inference_steps=2,
        num_generations=2,
        generation_batch_size=4,
        per_device_train_batch_size=8,
        epsilon=1e-3,
        max_steps=2,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
    )
    data = Dataset.from_dict({"prompt": ["a circle", "two squares"]})
    run = GRPOTrainer(
        "tiny", [lambda images, prompts: list(range(len(images)))], args, data, peft_config=LoraConfig(r=2)
    )
    run.train()
    logs = [entry for entry in run.state.log_history if "seconds_outside_models" in entry]
    assert len(logs) == 2
    for entry in logs:
        assert all(entry[f"seconds_{part}"] > 0 for part in ("transformer", "vae", "backward"))
        assert entry["seconds_outside_models"] > 0
    assert "seconds_text_encoder" in logs[0]


def test_whole_numbers_are_averaged_too():
    metrics = RunMetrics(("update",))
    metrics.record(decay=0, size=[1, 2])
    logs = metrics.drain()
    assert (logs["decay"], logs["size"]) == (0.0, 1.5)
