"""Measure where the time of a GRPO update goes, and its share outside the models, on the tiny model and a larger one.

    python tests/bench/overhead.py --updates 3

The reward is the images' brightness. The larger model has random weights, by default 105 million parameters, and the tiny
model's VAE and text encoder. Seconds are those that every run logs. The first update is left out, because it also checks
the ratio and fills caches. "Outside" is all time that is not a forward or a backward of a model or a wait for a reward:
noise, stochastic steps, copies to the host, pictures, the loss, the optimizer, the data, logging.
"""

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from diffusers import QwenImageTransformer2DModel

from align.tiny import CHECKPOINT

ROOT = Path(__file__).parents[2]
#: The logged times, as `seconds_NAME`, that are not "outside".
PHASES = ("transformer", "backward", "vae", "text_encoder", "reward")


def write_model(folder: Path, layers: int, heads: int) -> int:
    """Write a model folder with a random transformer and the tiny model's other components; return the parameter count."""
    shutil.copytree(CHECKPOINT, folder, ignore=lambda *_: ["transformer"])
    config = QwenImageTransformer2DModel.load_config(CHECKPOINT / "transformer")
    torch.manual_seed(0)
    config = config | {"num_layers": layers, "num_attention_heads": heads}
    model = QwenImageTransformer2DModel.from_config(config)
    model.save_pretrained(folder / "transformer")
    return sum(p.numel() for p in model.parameters())


def run(model: str, folder: Path, updates: int, overrides: list[str]) -> list[dict[str, float]]:
    """Train a model with the demo config; return the log entry of every update except the first."""
    command = [sys.executable, str(ROOT / "align/grpo.py"), "--config", str(ROOT / "configs/tiny/grpo.yaml")]
    command += ["--model", model, "--output_dir", str(folder), "--max_steps", str(updates + 1), "--eval_strategy", "no"]
    command += ["--eval_on_start", "false", "--logging_steps", "1", "--disable_tqdm", "true"]
    command += ["--rewards", "brightness"]  # also differs between the images of a random model
    ended = subprocess.run([*command, *overrides], capture_output=True, text=True)
    if ended.returncode:
        raise SystemExit(f"error: {ended.stderr[-2000:]}")
    log = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [entry for entry in log if "seconds_outside_models" in entry][1:]


def share_outside(entry: dict[str, float]) -> float:
    """Return the share of an update's time outside the models, in [0, 1]."""
    outside = entry["seconds_outside_models"]
    return outside / (outside + sum(entry.get(f"seconds_{phase}", 0.0) for phase in PHASES))


def row(name: str, logs: list[dict[str, float]]) -> str:
    """Format a line of the table: means over the updates, and the range of the share outside."""
    seconds = [statistics.mean(entry.get(f"seconds_{phase}", 0.0) for entry in logs) for phase in PHASES]
    outside = [100 * share_outside(entry) for entry in logs]
    share = f"{statistics.mean(outside):.1f} ({min(outside):.1f} to {max(outside):.1f})"
    return f"| {name} | " + " | ".join(f"{s:.2f}" for s in seconds) + f" | {share} |"


def main() -> None:
    """Train both models and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--updates", type=int, default=3)
    parser.add_argument("--layers", type=int, default=11, help="layers of the larger model")
    parser.add_argument("--heads", type=int, default=16, help="attention heads of the larger model")
    args, overrides = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as folder:
        size = write_model(Path(folder) / "model", args.layers, args.heads)
        print("| model | " + " | ".join(f"{phase}, s" for phase in PHASES) + " | outside, % |")
        print("|---" * (len(PHASES) + 2) + "|")
        for name, model in (("tiny", "tiny"), (f"{size / 1e6:.0f} M", str(Path(folder) / "model"))):
            print(row(name, run(model, Path(folder) / name.split()[0], args.updates, overrides)), flush=True)


if __name__ == "__main__":
    main()
