"""The shipped launcher configs on two CPU processes, with real DeepSpeed: against one process, resumed, and exported."""

import json
from pathlib import Path

import pytest
import scaled
import torch
from accelerate.utils import DeepSpeedPlugin
from launched import ROOT, finish, on_cpu, start
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from align.dpo import DPOConfig
from align.grpo_config import GRPOConfig
from align.sft import SFTConfig
from align.sharding import SHARDING, check_sharding, check_zero

pytestmark = pytest.mark.skipif(scaled.why_not() is not None, reason=str(scaled.why_not()))
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("scaled")


@pytest.fixture(scope="module")
def alone(folder):
    """``alone(algorithm)``: its run on one process."""
    runs: dict[str, scaled.Run] = {}

    def once(algorithm: str) -> scaled.Run:
        if algorithm not in runs:
            if algorithm == "dpo":
                scaled.make_pairs(folder)
            runs[algorithm] = scaled.train(folder, algorithm, None, f"{algorithm}-one")
        return runs[algorithm]

    return once


def check_equal(one: scaled.Run, two: scaled.Run) -> None:
    for key in ("loss", "learning_rate"):
        assert two.logged(key) == pytest.approx(one.logged(key), abs=TOLERANCE), key
    assert two.logged("grad_norm") == pytest.approx(one.logged("grad_norm"), rel=1e-2)
    assert min(one.logged("grad_norm")) > 0.001  # so that they were clipped
    assert scaled.largest_difference(one.trained(1), one.trained(scaled.UPDATES)) > 100 * TOLERANCE
    for update in range(1, scaled.UPDATES + 1):
        assert scaled.largest_difference(one.trained(update), two.trained(update)) < TOLERANCE
    assert scaled.largest_difference(one.lora, two.lora) < TOLERANCE


def check_export(run: scaled.Run) -> None:
    loaded = run.loaded_by_stock()
    assert scaled.largest_difference(loaded, run.trained(scaled.UPDATES)) == 0
    assert all(value.any() for value in loaded.values())  # B too, which begins at 0


def check_resumed(whole: scaled.Run, rest: scaled.Run) -> None:
    for key in ("loss", "grad_norm", "learning_rate"):
        assert rest.logged(key, 1) == whole.logged(key, 1), key
    assert scaled.largest_difference(whole.lora, rest.lora) == 0


@pytest.mark.parametrize("launcher", ["zero2", "zero3"])
def test_grpo_on_two_processes_is_the_run_of_one_and_resumes_and_exports(folder, alone, launcher):
    one = alone("grpo")
    two = scaled.train(folder, "grpo", launcher, f"grpo-{launcher}")
    check_equal(one, two)
    first = two.log[0]
    assert first["ratio_deviation_at_start"] == 0 and first["ratio_min"] == first["ratio_max"] == 1
    assert first["kl_total"] == 0 < two.log[1]["kl_total"]  # the reference is the model without its adapter
    check_export(two)
    checkpoint = two.folder / "checkpoint-1"
    base = (ROOT / "align/tiny/checkpoint/transformer/diffusion_pytorch_model.safetensors").stat().st_size
    assert sum(f.stat().st_size for f in checkpoint.glob("global_step1/*model_states.pt")) < base / 4
    check_resumed(two, scaled.resume(folder, "grpo", launcher, two))


@pytest.mark.slow
@pytest.mark.parametrize("launcher", scaled.LAUNCHERS)
@pytest.mark.parametrize("algorithm", scaled.ALGORITHMS)
def test_every_algorithm_under_every_launcher(folder, alone, algorithm, launcher):
    if algorithm == "grpo" and launcher in ("zero2", "zero3"):
        pytest.skip("not slow: the test above")
    one = alone(algorithm)
    two = scaled.train(folder, algorithm, launcher, f"{algorithm}-{launcher}")
    check_equal(one, two)
    check_export(two)
    check_resumed(two, scaled.resume(folder, algorithm, launcher, two))
