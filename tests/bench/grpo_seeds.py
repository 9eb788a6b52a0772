"""Run GRPO with several seeds of one config, and print every held-out measure before and after training.

    python tests/bench/grpo_seeds.py --config configs/tiny/grpo.yaml --seeds 0 1 2 3 4

Every run is a separate process. Wall time and CPU time are those of the complete process, including its start and the
pictures; memory is its peak. Standard errors are those of the change, over the prompts: both evaluations start from the
same noise.
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
    """Return the CPU time of all child processes that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def run(config: Path, seed: int, folder: Path, overrides: list[str]) -> dict[str, float]:
    """Train once; return held-out measures, wall seconds, CPU minutes and forward-equivalents by name."""
    command = [sys.executable, str(ROOT / "align/grpo.py"), "--config", str(config), "--seed", str(seed)]
    command += ["--output_dir", str(folder), "--disable_tqdm", "true", *overrides]
    started, cpu_before = time.perf_counter(), cpu_seconds()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    result = {"seconds": time.perf_counter() - started, "cpu": (cpu_seconds() - cpu_before) / 60}
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
    args, overrides = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as folder:
        runs = []
        for seed in args.seeds:
            runs.append(run(args.config.resolve(), seed, Path(folder) / str(seed), overrides))
            print(f"seed {seed}: {runs[-1]['seconds']:.0f} s", file=sys.stderr, flush=True)
    measures = [key.removesuffix(" change") for key in runs[0] if key.endswith(" change")]
    heads = " | ".join(f"{measure} | change" for measure in measures)
    print(f"| seed | {heads} | seconds | CPU minutes | forward-equivalents |")
    print("|---" * (2 * len(measures) + 4) + "|")
    for seed, row in zip(args.seeds, runs, strict=True):
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
