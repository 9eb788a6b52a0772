"""Where the time of a GRPO update goes, and the share of it outside the models: on the tiny model and a larger one.

    python tests/bench/overhead.py --updates 3

Its reward is the images' brightness. The larger model has random weights and the tiny model's VAE and text encoder; by
default 105 million parameters. Seconds are those that every run logs; the first update, which checks the ratio and fills
caches, is left out. "Outside" is all that is neither a forward nor a backward of a model nor a wait for a reward: noise,
stochastic steps, host copies, pictures, the loss, the optimizer, the data, logging.
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
PARTS = ("transformer", "backward", "vae", "text_encoder", "reward")


def write_model(folder: Path, layers: int, heads: int) -> int:
    """A model folder like the tiny one's with another transformer, of random weights; how many it has."""
    shutil.copytree(CHECKPOINT, folder, ignore=lambda *_: ["transformer"])
    config = QwenImageTransformer2DModel.load_config(CHECKPOINT / "transformer")
    torch.manual_seed(0)
    larger = config | {"num_layers": layers, "num_attention_heads": heads}
    model = QwenImageTransformer2DModel.from_config(larger)
    model.save_pretrained(folder / "transformer")
    return sum(p.numel() for p in model.parameters())


def measured(model: str, folder: Path, updates: int, overrides: list[str]) -> list[dict[str, float]]:
    """The log of every update but the first of the demo config on a model."""
    command = [sys.executable, str(ROOT / "align/grpo.py"), "--config", str(ROOT / "configs/tiny/grpo.yaml")]
    command += ["--model", model, "--output_dir", str(folder), "--max_steps", str(updates + 1), "--eval_strategy", "no"]
    command += ["--eval_on_start", "false", "--logging_steps", "1", "--disable_tqdm", "true"]
    command += ["--rewards", "brightness"]  # which tells a random model's images apart too
    ended = subprocess.run([*command, *overrides], capture_output=True, text=True)
    if ended.returncode:
        raise SystemExit(f"error: {ended.stderr[-2000:]}")
    log = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [entry for entry in log if "seconds_outside_models" in entry][1:]


def share_outside(entry: dict[str, float]) -> float:
    """Of one update's time, 0 to 1."""
    outside = entry["seconds_outside_models"]
    return outside / (outside + sum(entry.get(f"seconds_{part}", 0.0) for part in PARTS))


def row(name: str, logs: list[dict[str, float]]) -> str:
    """One line of the table: means over the updates, and the range of the share outside."""
    seconds = [statistics.mean(entry.get(f"seconds_{part}", 0.0) for entry in logs) for part in PARTS]
    outside = [100 * share_outside(entry) for entry in logs]
    share = f"{statistics.mean(outside):.1f} ({min(outside):.1f} to {max(outside):.1f})"
    return f"| {name} | " + " | ".join(f"{s:.2f}" for s in seconds) + f" | {share} |"


def main() -> None:
    """Run both and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--updates", type=int, default=3)
    parser.add_argument("--layers", type=int, default=11)
    parser.add_argument("--heads", type=int, default=16)
    known, overrides = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as folder:
        size = write_model(Path(folder) / "model", known.layers, known.heads)
        print("| model | " + " | ".join(f"{part}, s" for part in PARTS) + " | outside, % |")
        print("|---" * (len(PARTS) + 2) + "|")
        for name, model in (("tiny", "tiny"), (f"{size / 1e6:.0f} M", str(Path(folder) / "model"))):
            print(row(name, measured(model, Path(folder) / name.split()[0], known.updates, overrides)), flush=True)


if __name__ == "__main__":
    main()
