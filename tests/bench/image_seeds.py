"""SFT, DPO with the making of its pairs, online DPO or DiffusionNFT, over several seeds: what is held out, before and after.

    python tests/bench/image_seeds.py sft --seeds 0 1 2
    python tests/bench/image_seeds.py dpo --seeds 0 1 2
    python tests/bench/image_seeds.py dpo_online --seeds 0 1 2
    python tests/bench/image_seeds.py nft --seeds 0 1 2

Every run is a process of its own with an empty cache; CPU minutes are those of all processes of a seed, start, pair
making and pictures included.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from grpo_seeds import ROOT, cpu_seconds

from align.engine.reports import series

SHOWN = {
    "sft": ("grounded", "shapes_following", "loss"),
    "dpo": ("warm_background", "accuracy", "shapes_following", "full_shapes_following"),
    "dpo_online": ("warm_background", "shapes_following", "full_shapes_following"),
    "nft": ("warm_background", "shapes_following", "full_shapes_following"),
}


def call(script: str, config: str, *arguments: str) -> None:
    """Run one of the library's scripts with a config of the tiny model."""
    command = [
        sys.executable,
        str(ROOT / "align" / script),
        "--config",
        str(ROOT / "configs/tiny" / config),
        *arguments,
    ]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def run(kind: str, seed: str, folder: Path, overrides: list[str]) -> list[dict]:
    """The log of one seed's training run."""
    common = ["--seed", seed, "--output_dir", str(folder / "run"), "--disable_tqdm", "true", *overrides]
    cache = ["--cache_dir", str(folder / "cache")]
    if kind in ("dpo_online", "nft"):
        call(f"{kind}.py", f"{kind}.yaml", *common)
    elif kind == "sft":
        call("sft.py", "sft_style.yaml", *common, *cache)
    else:
        pairs = str(folder / "pairs")
        for split in ("train", "test"):
            call("generate.py", "generate.yaml", "--seed", seed, "--output_dir", pairs, "--dataset_split", split)
        call("dpo.py", "dpo.yaml", "--dataset_name", pairs, "--eval_dataset_name", pairs, *common, *cache)
    return json.loads((folder / "run/trainer_state.json").read_text())["log_history"]


def main() -> None:
    """Run the seeds and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=SHOWN)
    parser.add_argument("--seeds", nargs="+", default=["0", "1", "2"])
    known, overrides = parser.parse_known_args()
    print("| seed | " + " | ".join(SHOWN[known.kind]) + " | CPU minutes |")
    print("|---" * (len(SHOWN[known.kind]) + 2) + "|")
    for seed in known.seeds:
        started = cpu_seconds()
        with tempfile.TemporaryDirectory() as folder:
            log = run(known.kind, seed, Path(folder), overrides)
        values = [series(log, f"eval_{name}")[1] for name in SHOWN[known.kind]]
        cells = [f"{v[0]:.3f} -> {v[-1]:.3f}" for v in values]
        print(f"| {seed} | " + " | ".join(cells) + f" | {(cpu_seconds() - started) / 60:.1f} |", flush=True)


if __name__ == "__main__":
    main()
