"""The benchmark for a GPU: that it runs, here at toy size, and that its operations are counted as torch counts them."""

import re
import sys

import pytest
import torch
from diffusers import QwenImageTransformer2DModel
from flops import backward_flops, forward_flops
from launched import ROOT, run, start
from peft import LoraConfig
from torch.utils.flop_counter import FlopCounterMode

TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"]


@pytest.mark.parametrize("adapter", [False, True])
def test_operations_are_those_that_torch_counts(adapter):
    """Of a transformer of true proportions on `meta`, where nothing is computed."""
    with torch.device("meta"):
        model = QwenImageTransformer2DModel(num_layers=6)
        if adapter:
            model.requires_grad_(False)
            model.add_adapter(LoraConfig(r=8, target_modules=TARGETS))
        inputs = {
            "hidden_states": torch.randn(1, 1024, 64),
            "timestep": torch.full((1,), 0.5),
            "encoder_hidden_states": torch.randn(1, 128, 3584),
        }
        with FlopCounterMode(display=False) as forward:
            output = model(**inputs, img_shapes=[[(1, 32, 32)]], return_dict=False)[0]
        with FlopCounterMode(display=False) as backward:
            output.sum().backward()
    ours = forward_flops(model.config, 1024, 128)
    assert forward.get_total_flops() == pytest.approx(sum(ours), rel=0.01)
    # The last block's text stream is computed and then discarded: it has no backward.
    assert backward.get_total_flops() == pytest.approx(backward_flops(ours, adapter), rel=0.1)


SMALL = ["--width", "small", "--depth", "1", "--size", "64", "--images", "2", "--repeats", "1"]


def table(output: str) -> list[list[str]]:
    return [line.strip("|").split("|") for line in output.splitlines() if re.match(r"\| (lora|full) ", line)]


def test_the_benchmark_runs_on_a_cpu_at_toy_size(tmp_path):
    rows = table(run(tmp_path, sys.executable, ROOT / "tests/bench/gpu.py", "--device", "cpu", *SMALL, "--peak", "1"))
    assert [(row[0].strip(), row[1].strip()) for row in rows] == [
        (tuning, phase) for tuning in ("lora", "full") for phase in ("rollout step", "update")
    ]
    for row in rows:
        seconds, peak, estimate, _, rate = map(float, row[2:7])
        assert seconds > 0 and peak > estimate >= 0 and rate >= 0 and row[7].strip().endswith("%")
    output, _ = start(tmp_path, sys.executable, ROOT / "tests/bench/gpu.py", "--device", "cuda:99").communicate()
    assert torch.cuda.is_available() or "error: no GPU is available" in output


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_the_benchmark_runs_at_true_width_on_a_gpu(tmp_path):
    rows = table(run(tmp_path, sys.executable, ROOT / "tests/bench/gpu.py", "--depth", "2", "--repeats", "2"))
    assert len(rows) == 4
    for row in rows:
        peak, estimate = float(row[3]), float(row[4])
        assert estimate * 0.8 < peak < estimate * 2 + 4
