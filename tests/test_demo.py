"""The demo, whole: what `make demo` runs, and its LoRA in a fresh process of stock diffusers."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
STOCK = """
import json, sys, torch
from diffusers import QwenImagePipeline
from align.sampling.noise import seeded_noise
from align.sampling.noise import ImageKey
from align.tiny import CHECKPOINT, PROMPTS
from rewards.shapes import warm_background

folder, samples = sys.argv[1], int(sys.argv[2])
pipeline = QwenImagePipeline.from_pretrained(CHECKPOINT)
pipeline.load_lora_weights(folder)
pipeline.set_progress_bar_config(disable=True)
rows = [json.loads(line) for line in (PROMPTS / "background/test.jsonl").read_text().splitlines()]
rewards = []
for sample in range(samples):
    start = torch.stack([seeded_noise(ImageKey(1234, "eval", i, sample).initial(), (16, 64)) for i in range(len(rows))])
    prompts = [row["prompt"] for row in rows]
    images = pipeline(prompts, latents=start, height=64, width=64, num_inference_steps=6, true_cfg_scale=1.0).images
    rewards += warm_background(images, prompts, spec=[row["spec"] for row in rows])
print("REWARD", sum(rewards) / len(rewards))
"""


@pytest.mark.slow
def test_the_demo_aligns_the_model_and_stock_diffusers_gives_the_improved_reward(tmp_path):
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    command = [
        sys.executable,
        ROOT / "align/grpo.py",
        "--config",
        ROOT / "configs/tiny/grpo.yaml",
        "--output_dir",
        "run",
    ]
    subprocess.run([*command, "--disable_tqdm", "true"], cwd=tmp_path, env=environment, check=True)
    log = json.loads((tmp_path / "run/trainer_state.json").read_text())["log_history"]
    first, last = (next(e for e in entries if "eval_reward" in e) for entries in (log, reversed(log)))
    assert last["eval_warm_background"] - first["eval_warm_background"] >= 0.40
    assert last["eval_warm_if_followed"] >= 0.8
    for guard in ("eval_shapes_following", "eval_full_shapes_following"):
        assert last[guard] - first[guard] >= -0.05
    assert next(e["ratio_deviation_at_start"] for e in log if "ratio_deviation_at_start" in e) < 1e-5
    samples = json.loads((tmp_path / "run/README.md").read_text().split("```json\n")[1].split("```")[0])
    output = subprocess.run(
        [sys.executable, "-c", STOCK, "run", str(samples["num_generations_eval"])],
        cwd=tmp_path, env=environment, check=True, text=True, capture_output=True,
    ).stdout  # fmt: skip
    assert float(output.split("REWARD")[1]) == pytest.approx(last["eval_warm_background"], abs=0.02)
