"""Every algorithm, with LoRA and full, under every shipped launcher config on two CPU processes, against one: a table.

    python tests/bench/scale_matrix.py --algorithms sft dpo grpo --launchers ddp zero1 zero2 zero3 zero3_offload

Three clipped updates by sgd in float32, at equal global batch. Columns: the largest difference of a logged loss and of an
element of the exported weights to the run on one process, their largest change in the same run to compare with, whether
the run resumed from its first checkpoint ends bit for bit alike, how far it ends from that when it is resumed on one
process without the launcher, and whether what stock diffusers has loaded is what was trained. One launch of processes
makes all runs of a launcher, another all resumed ones.
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
#: The run itself, resumed as it was, and resumed on one process.
WAYS = ("whole", "resumed", "alone")


def yes(value: bool) -> str:
    """A table's cell."""
    return "yes" if value else "NO"


def name(case: tuple[str, str], launcher: str | None, way: str) -> str:
    """The output_dir of a run."""
    return "-".join((*case, launcher or "one", way))


def launch(folder: Path, cases: list[tuple[str, str]], launcher: str | None, way: str) -> dict[str, str]:
    """The runs of all cases in one launch: what went wrong, by output_dir."""
    under, processes = (None, 1) if way == "alone" else (launcher, 1 if launcher is None else 2)
    runs = []
    for case in cases:
        words = scaled.words(folder, case[0], under, name(case, launcher, way), processes, TUNINGS[case[1]])
        if way != "whole":
            checkpoint = f"{name(case, launcher, 'whole')}/checkpoint-1"
            words += ["--save_strategy", "no", "--resume_from_checkpoint", checkpoint]
        runs.append(words)
    return scaled.chain(folder, under, runs, processes)


def row(folder: Path, case: tuple[str, str], launcher: str) -> tuple[str, ...]:
    """The cells behind the first three, of runs that have ended well."""
    one, two, rest, alone = (
        scaled.Run(folder / name(case, *which))
        for which in ((None, "whole"), *((launcher, way) for way in WAYS))
    )  # fmt: skip
    loss = max(abs(a - b) for a, b in zip(one.logged("loss"), two.logged("loss"), strict=True))
    same = (
        rest.logged("loss", 1) == two.logged("loss", 1) and scaled.largest_difference(rest.exported, two.exported) == 0
    )
    stock, trained = two.loaded_by_stock(), two.trained(scaled.UPDATES)
    loads = all((stock[n] - value).abs().max() == 0 and value.any() for n, value in trained.items())
    figures = (
        loss,
        scaled.largest_difference(one.exported, two.exported),
        scaled.largest_difference(one.trained(1), one.trained(scaled.UPDATES)),
    )
    moved = scaled.largest_difference(alone.exported, two.exported)
    return ("yes", *(f"{figure:.1e}" for figure in figures), yes(same), f"{moved:.1e}", yes(loads))


def main() -> None:
    """Run the matrix and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--algorithms", nargs="+", choices=scaled.ALGORITHMS, default=["sft", "dpo", "grpo"])
    parser.add_argument("--tunings", nargs="+", choices=TUNINGS, default=[*TUNINGS])
    parser.add_argument("--launchers", nargs="+", choices=scaled.LAUNCHERS, default=scaled.LAUNCHERS)
    known = parser.parse_args()
    missing = scaled.why_not()
    if missing:
        raise SystemExit(f"error: {missing}")
    cases = [(algorithm, tuning) for algorithm in known.algorithms for tuning in known.tunings]
    print("| " + " | ".join(COLUMNS) + f" |\n|{'---|' * len(COLUMNS)}", flush=True)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        if "dpo" in known.algorithms:
            scaled.make_pairs(folder)
        wrong = launch(folder, cases, None, "whole")
        for launcher in known.launchers:
            for way in WAYS:
                wrong |= launch(folder, cases, launcher, way)
            for case in cases:
                said = [wrong[n] for n in (name(case, launcher, way) for way in WAYS) if n in wrong]
                cells = (f"NO: {said[0]}", *[""] * 6) if said else row(folder, case, launcher)
                print("| " + " | ".join((*case, launcher, *cells)) + " |", flush=True)


if __name__ == "__main__":
    main()
