"""Which way to a held-out reward costs the fewest transformer forwards: recipes of GRPO and NFT, side by side.

    python tests/bench/recipes.py --task preference --seeds 0 1 2 --jobs 2

Every run is evaluated on the same held-out prompts and noise as it goes; its cost is the log's ``forward_equivalents``
(a forward of one image 1, a backward 2) at the first evaluation that reaches the target, the first rollout's check of
the ratio included and the evaluations left out. A run that never gets there costs more than all it spent. Guards are
those of that same evaluation, or of the last one. There is a table for each target. ``dead`` is the share of a run's
groups, in percent, that scored alike and were not trained. Recipes are in tests/bench/recipes.yaml: each is a list of
overrides of a shipped config.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import yaml

ROOT = Path(__file__).parents[2]
RECIPES = Path(__file__).with_name("recipes.yaml")


class Reached(NamedTuple):
    """Where a run first reached the target: forward-equivalents, update, and every held-out measure there.

    ``reached`` is False for a run that did not: then all this is of its last evaluation. ``dead``: of the whole run, %.
    """

    reached: bool
    cost: float
    update: int
    measures: dict[str, float]
    start: dict[str, float]
    dead: float


def run(recipe: dict[str, Any], seed: int, folder: Path) -> list[dict[str, Any]]:
    """The log of one training run, as a process of its own."""
    config = yaml.safe_load((ROOT / recipe["config"]).read_text()) | recipe["settings"]
    config |= {"seed": seed, "output_dir": str(folder / "run"), "disable_tqdm": True}
    folder.mkdir()
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    command = [sys.executable, str(ROOT / recipe["script"]), "--config", str(folder / "config.yaml")]
    ended = subprocess.run(command, capture_output=True, text=True)
    if ended.returncode:
        raise SystemExit(f"error: {' '.join(command)}\n{ended.stderr[-2000:]}")
    return json.loads((folder / "run/trainer_state.json").read_text())["log_history"]


def reached(log: list[dict[str, Any]], measure: str, target: float) -> Reached:
    """The first evaluation of a run whose ``measure`` is at least ``target``."""
    cost, evaluations = 0.0, []
    for entry in log:
        cost = entry.get("forward_equivalents", cost)
        if f"eval_{measure}" in entry:
            measures = {k.removeprefix("eval_"): v for k, v in entry.items() if k.startswith("eval_")}
            evaluations.append((entry["step"], cost, measures))
    start = evaluations[0][2]
    there = next((e for e in evaluations if e[2][measure] >= target), None)
    step, spent, measures = there or evaluations[-1]
    dead = 100 * statistics.mean(entry["dead_groups"] for entry in log if "dead_groups" in entry)
    return Reached(there is not None, spent, step, measures, start, dead)


def spread(values: list[float], form: str) -> str:
    """Mean, and the range in brackets."""
    return f"{format(statistics.mean(values), form)} ({format(min(values), form)} to {format(max(values), form)})"


def ratio(runs: list[Reached], baseline: list[Reached]) -> str:
    """Mean cost over the baseline's: a bound where one of the two did not always get there, a question where both."""
    here, there = (all(r.reached for r in each) for each in (runs, baseline))
    sign = {(True, True): "", (True, False): "< ", (False, True): "> ", (False, False): "? "}[here, there]
    return f"{sign}{statistics.mean(r.cost for r in runs) / statistics.mean(r.cost for r in baseline):.3f}"


def row(name: str, runs: list[Reached], baseline: list[Reached], measure: str, guards: list[str]) -> str:
    """One line of a table."""
    least = "" if all(r.reached for r in runs) else "> "
    changes = [spread([r.measures[guard] - r.start[guard] for r in runs], "+.3f") for guard in guards]
    cells = (
        name,
        f"{sum(r.reached for r in runs)} of {len(runs)}",
        spread([r.measures[measure] for r in runs], ".3f"),
        spread([r.update for r in runs], ".0f"),
        least + spread([r.cost / 1000 for r in runs], ".1f"),
        ratio(runs, baseline),
        spread([r.dead for r in runs], ".0f"),
        *changes,
    )
    return f"| {' | '.join(cells)} |"


def table(logs: dict[str, list[list[dict[str, Any]]]], measure: str, target: float, guards: list[str]) -> str:
    """How every recipe did; its guards as changes since before the run."""
    heads = ["recipe", "reached", measure, "update", "thousand forward-equivalents", "of the first", "dead", *guards]
    lines = [f"held-out {measure} of {target}", "", f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    runs = {name: [reached(log, measure, target) for log in each] for name, each in logs.items()}
    baseline = next(iter(runs.values()))
    return "\n".join([*lines, *(row(name, each, baseline, measure, guards) for name, each in runs.items())])


def main() -> None:
    """Run every recipe with every seed, and print a table for each target."""
    known = yaml.safe_load(RECIPES.read_text())
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=sorted(known), default="preference")
    parser.add_argument("--recipes", nargs="+", help="default: all; the first is what the others are compared with")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time: counts of forwards do not mind company")
    parser.add_argument("--curves", type=Path, help="write every held-out value of every run here, as JSON lines")
    args = parser.parse_args()
    task = known[args.task]
    names = args.recipes or list(task["recipes"])
    for name in names:
        if name not in task["recipes"]:
            parser.error(f"no recipe {name!r} of {args.task}. There are: {', '.join(task['recipes'])}")
    logs: dict[str, list[list[dict[str, Any]]]] = {name: [] for name in names}
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(args.jobs) as pool:

        def one(job: tuple[int, str]) -> list[dict[str, Any]]:
            seed, name = job
            recipe = task["recipes"][name] or {}
            settings = task["settings"] | recipe.get("settings", {})
            whole = {"script": "align/grpo.py", "config": task["config"]} | recipe | {"settings": settings}
            return run(whole, seed, Path(folder) / f"{name}-{seed}")

        jobs = [(seed, name) for seed in args.seeds for name in names]
        for (seed, name), log in zip(jobs, pool.map(one, jobs), strict=True):
            logs[name].append(log)
            last = reached(log, next(iter(task["targets"])), float("inf"))
            print(f"{name}, seed {seed}: {last.cost:.0f} {last.measures}", file=sys.stderr, flush=True)
            if args.curves:
                with args.curves.open("a") as file:
                    file.write(json.dumps({"recipe": name, "seed": seed, "log": log}) + "\n")
    print(f"seeds {args.seeds}")
    for measure, targets in task["targets"].items():
        for target in targets:
            print("\n" + table(logs, measure, target, task["guards"]))


if __name__ == "__main__":
    main()
