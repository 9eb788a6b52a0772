"""Every algorithm, with LoRA, under every shipped launcher config on two CPU processes, against one process: a table.

    python tests/bench/scale_matrix.py --algorithms sft dpo grpo --launchers ddp zero1 zero2 zero3 zero3_offload

Three clipped updates by sgd in float32, at equal global batch. Columns: the largest difference of a logged loss and of an
element of the LoRA to the run on one process, the LoRA's largest change in the same run to compare with, whether the run
resumed from its first checkpoint ends bit for bit alike, and whether the LoRA that stock diffusers has loaded is what was
trained. About a minute a row on two cores.
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "helpers"))

import scaled

HEADER = "| algorithm | launcher | runs | loss | LoRA | its change | resumes exactly | loads in stock diffusers |"


def yes(value: bool) -> str:
    """A table's cell."""
    return "yes" if value else "NO"


def row(folder: Path, algorithm: str, launcher: str, one: scaled.Run) -> str:
    """One line of the table; a run that fails has its last line of output in it."""
    two = scaled.train(folder, algorithm, launcher, f"{algorithm}-{launcher}")
    loss = max(abs(a - b) for a, b in zip(one.logged("loss"), two.logged("loss"), strict=True))
    lora = scaled.largest_difference(one.lora, two.lora)
    moved = scaled.largest_difference(one.trained(1), one.trained(scaled.UPDATES))
    rest = scaled.resume(folder, algorithm, launcher, two)
    same = rest.logged("loss", 1) == two.logged("loss", 1) and scaled.largest_difference(rest.lora, two.lora) == 0
    stock = two.loaded_by_stock()
    loads = scaled.largest_difference(stock, two.trained(scaled.UPDATES)) == 0 and all(v.any() for v in stock.values())
    return f"| {algorithm} | {launcher} | yes | {loss:.1e} | {lora:.1e} | {moved:.1e} | {yes(same)} | {yes(loads)} |"


def main() -> None:
    """Run the matrix and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--algorithms", nargs="+", choices=scaled.ALGORITHMS, default=["sft", "dpo", "grpo"])
    parser.add_argument("--launchers", nargs="+", choices=scaled.LAUNCHERS, default=scaled.LAUNCHERS)
    known = parser.parse_args()
    missing = scaled.why_not()
    if missing:
        raise SystemExit(f"error: {missing}")
    print(f"{HEADER}\n|{'---|' * 8}", flush=True)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        for algorithm in known.algorithms:
            if algorithm == "dpo":
                scaled.make_pairs(folder)
            one = scaled.train(folder, algorithm, None, f"{algorithm}-one")
            for launcher in known.launchers:
                try:
                    print(row(folder, algorithm, launcher, one), flush=True)
                except (AssertionError, subprocess.TimeoutExpired) as error:
                    # The launcher's own last line repeats the command; the run's last word stands before it.
                    said = [line for line in str(error).splitlines() if "rror:" in line and "CalledProcess" not in line]
                    last = said[-1] if said else str(error)[-200:]
                    print(f"| {algorithm} | {launcher} | NO: {last} |" + " |" * 5, flush=True)


if __name__ == "__main__":
    main()
