"""Compare training on two CPU processes, under every shipped launcher config, with training on one process.

    python tests/bench/scale_matrix.py --algorithms sft dpo grpo --launchers ddp zero1 zero2 zero3 zero3_offload

The table has a line for each algorithm, LoRA or full, and launcher. A run is three clipped updates by sgd in float32, with
the same global batch as on one process. The columns are: the largest difference of a logged loss, and of an element of the
exported weights, from the run on one process; for comparison, the largest change of the weights in that run; whether the
run resumed from its first checkpoint ends bit for bit the same; the largest difference when it is resumed on one process
without the launcher; and whether stock diffusers loads exactly what was trained. The processes of a launcher are launched
once for all its runs, and once more for all resumed runs.
"""

import argparse
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "helpers"))

import scaled

COLUMNS = (
    *("algorithm", "tuning", "launcher", "runs", "loss", "weights", "their change", "resumes exactly"),
    *("resumed on one process", "loads in stock diffusers"),
)
TUNINGS = {"lora": (), "full": scaled.FULL}
#: A run without an interruption, resumed under the same launcher, and resumed on one process without it.
WAYS = ("uninterrupted", "resumed", "resumed_alone")


def yes(value: bool) -> str:
    """Format a cell of the table."""
    return "yes" if value else "NO"


def name(case: tuple[str, str], launcher: str | None, way: str) -> str:
    """Return the output_dir of a run."""
    return "-".join((*case, launcher or "one", way))


def launch(folder: Path, cases: list[tuple[str, str]], launcher: str | None, way: str) -> dict[str, str]:
    """Train all cases (algorithm, tuning) in one launch of processes; return the errors by output_dir."""
    run_launcher = None if way == "resumed_alone" else launcher
    processes = 1 if run_launcher is None else 2
    runs = []
    for case in cases:
        algorithm, tuning = case
        output_dir = name(case, launcher, way)
        command = scaled.words(folder, algorithm, run_launcher, output_dir, processes, TUNINGS[tuning])
        if way != "uninterrupted":
            checkpoint = f"{name(case, launcher, 'uninterrupted')}/checkpoint-1"
            command += ["--save_strategy", "no", "--resume_from_checkpoint", checkpoint]
        runs.append(command)
    return scaled.chain(folder, run_launcher, runs, processes)


def row(folder: Path, case: tuple[str, str], launcher: str) -> tuple[str, ...]:
    """Compare runs that have succeeded; return the cells after the first three."""
    one = scaled.Run(folder / name(case, None, "uninterrupted"))
    two, resumed, resumed_alone = (scaled.Run(folder / name(case, launcher, way)) for way in WAYS)
    loss = max(abs(a - b) for a, b in zip(one.logged("loss"), two.logged("loss"), strict=True))
    same_losses = resumed.logged("loss", 1) == two.logged("loss", 1)
    resumes_exactly = same_losses and scaled.largest_difference(resumed.exported, two.exported) == 0
    stock, trained = two.loaded_by_stock(), two.trained(scaled.UPDATES)
    loads = all((stock[key] - value).abs().max() == 0 and value.any() for key, value in trained.items())
    figures = (
        loss,
        scaled.largest_difference(one.exported, two.exported),
        scaled.largest_difference(one.trained(1), one.trained(scaled.UPDATES)),
    )
    alone = scaled.largest_difference(resumed_alone.exported, two.exported)
    return ("yes", *(f"{figure:.1e}" for figure in figures), yes(resumes_exactly), f"{alone:.1e}", yes(loads))


def main() -> None:
    """Run the matrix and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--algorithms", nargs="+", choices=scaled.ALGORITHMS, default=["sft", "dpo", "grpo"])
    parser.add_argument("--tunings", nargs="+", choices=TUNINGS, default=[*TUNINGS])
    parser.add_argument("--launchers", nargs="+", choices=scaled.LAUNCHERS, default=scaled.LAUNCHERS)
    args = parser.parse_args()
    missing = scaled.why_not()
    if missing:
        raise SystemExit(f"error: {missing}")
    cases = [(algorithm, tuning) for algorithm in args.algorithms for tuning in args.tunings]
    print("| " + " | ".join(COLUMNS) + f" |\n|{'---|' * len(COLUMNS)}", flush=True)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        if "dpo" in args.algorithms:
            scaled.make_pairs(folder)
        errors = launch(folder, cases, None, "uninterrupted")
        for launcher in args.launchers:
            for way in WAYS:
                errors |= launch(folder, cases, launcher, way)
            for case in cases:
                output_dirs = [name(case, launcher, way) for way in WAYS]
                case_errors = [errors[output_dir] for output_dir in output_dirs if output_dir in errors]
                cells = (f"NO: {case_errors[0]}", *[""] * 6) if case_errors else row(folder, case, launcher)
                print("| " + " | ".join((*case, launcher, *cells)) + " |", flush=True)


if __name__ == "__main__":
    main()
