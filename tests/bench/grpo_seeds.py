"""GRPO over several seeds of one config: a table of every held-out measure before and after.

    python tests/bench/grpo_seeds.py --config configs/tiny/grpo.yaml --seeds 0 1 2 3 4

Every run is a process of its own; wall and CPU time are the whole process, start and pictures included, and memory its
peak. Standard errors are of the change itself, over the prompts: both evaluations start from the same noise.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from align.engine.reports import held_out_changes, paired_errors, series

ROOT = Path(__file__).parents[2]


def cpu_seconds() -> float:
    """Of all child processes that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def run(config: Path, seed: int, folder: Path, overrides: list[str]) -> dict[str, float]:
    """One training run; its held-out changes, wall seconds, CPU minutes and forward-equivalents."""
    command = [sys.executable, str(ROOT / "align/grpo.py"), "--config", str(config), "--seed", str(seed)]
    command += ["--output_dir", str(folder), "--disable_tqdm", "true", *overrides]
    started, cpu = time.perf_counter(), cpu_seconds()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    result = {"seconds": time.perf_counter() - started, "cpu": (cpu_seconds() - cpu) / 60}
    log = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    errors = paired_errors(folder)
    for name, before, _, after, _ in held_out_changes(log):
        result |= {f"{name} before": before, f"{name} after": after, f"{name} change": after - before}
        result |= {f"{name} se": errors[name]}
    result["forward-equivalents"] = series(log, "forward_equivalents")[1][-1]
    result["ratio deviation at start"] = series(log, "ratio_deviation_at_start")[1][0]
    return result


def main() -> None:
    """Run the seeds and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=ROOT / "configs/tiny/grpo.yaml")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    known, overrides = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as folder:
        runs = []
        for seed in known.seeds:
            runs.append(run(known.config.resolve(), seed, Path(folder) / str(seed), overrides))
            print(f"seed {seed}: {runs[-1]['seconds']:.0f} s", file=sys.stderr, flush=True)
    measures = [key.removesuffix(" change") for key in runs[0] if key.endswith(" change")]
    print(
        "| seed | " + " | ".join(f"{m} | change" for m in measures) + " | seconds | CPU minutes | forward-equivalents |"
    )
    print("|---" * (2 * len(measures) + 4) + "|")
    for seed, row in zip(known.seeds, runs, strict=True):
        cells = [
            f"{row[f'{m} before']:.3f} -> {row[f'{m} after']:.3f} | {row[f'{m} change']:+.3f} ± {row[f'{m} se']:.3f}"
            for m in measures
        ]
        cost = f"{row['seconds']:.0f} | {row['cpu']:.1f} | {row['forward-equivalents']:.0f}"
        print(f"| {seed} | " + " | ".join(cells) + f" | {cost} |")
    for measure in measures:
        changes = [row[f"{measure} change"] for row in runs]
        clear = sum(row[f"{measure} change"] > row[f"{measure} se"] for row in runs)
        print(
            f"{measure}: change {min(changes):+.3f} to {max(changes):+.3f}, mean {statistics.mean(changes):+.3f}; "
            f"up on {sum(c > 0 for c in changes)} of {len(changes)}, by more than its standard error on {clear}"
        )
    print(f"largest |ratio - 1| before the first update: {max(row['ratio deviation at start'] for row in runs):.1e}")
    print(f"peak memory of a run: {resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20:.2f} GiB")


if __name__ == "__main__":
    main()
