"""Run SFT, DPO, online DPO or DiffusionNFT with several seeds, and print held-out measures before and after training.

    python tests/bench/image_seeds.py sft --seeds 0 1 2
    python tests/bench/image_seeds.py dpo --seeds 0 1 2
    python tests/bench/image_seeds.py dpo_online --seeds 0 1 2
    python tests/bench/image_seeds.py nft --seeds 0 1 2

Every run is a separate process with an empty cache. CPU minutes are those of all processes of a seed, including their
start, the pictures and, for DPO, the making of the preference pairs.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from grpo_seeds import ROOT, cpu_seconds

from align.engine.reports import series

#: The held-out measures in the table of each algorithm.
MEASURES = {
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


def run(algorithm: str, seed: str, folder: Path, overrides: list[str]) -> list[dict]:
    """Train with one seed and return the log."""
    common = ["--seed", seed, "--output_dir", str(folder / "run"), "--disable_tqdm", "true", *overrides]
    cache = ["--cache_dir", str(folder / "cache")]
    if algorithm in ("dpo_online", "nft"):
        call(f"{algorithm}.py", f"{algorithm}.yaml", *common)
    elif algorithm == "sft":
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
    parser.add_argument("algorithm", choices=MEASURES)
    parser.add_argument("--seeds", nargs="+", default=["0", "1", "2"])
    args, overrides = parser.parse_known_args()
    measures = MEASURES[args.algorithm]
    print("| seed | " + " | ".join(measures) + " | CPU minutes |")
    print("|---" * (len(measures) + 2) + "|")
    for seed in args.seeds:
        cpu_before = cpu_seconds()
        with tempfile.TemporaryDirectory() as folder:
            log = run(args.algorithm, seed, Path(folder), overrides)
        values = [series(log, f"eval_{measure}")[1] for measure in measures]
        cells = [f"{evaluated[0]:.3f} -> {evaluated[-1]:.3f}" for evaluated in values]
        print(f"| {seed} | " + " | ".join(cells) + f" | {(cpu_seconds() - cpu_before) / 60:.1f} |", flush=True)


if __name__ == "__main__":
    main()
