"""Compare recipes of GRPO and NFT by the transformer forwards they need to reach a held-out reward.

    python tests/bench/recipes.py --task preference --seeds 0 1 2 --jobs 2

Every run is evaluated during training, on the same held-out prompts and noise. Its cost is the log's
``forward_equivalents`` (1 for a forward of one image, 2 for a backward) at the first evaluation that reaches the target;
this includes the check of the ratio in the first rollout, but no evaluation. A run that never reaches the target has a
cost of more than all it spent. Guards are those of the same evaluation, or of the last one. There is a table for each
target. ``dead`` is the percentage of a run's groups whose images scored alike, so that they were not trained. Recipes are
in tests/bench/recipes.yaml; each has overrides of a shipped config.
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


class Result(NamedTuple):
    """Describe the first evaluation of a run that reached the target, or else its last evaluation."""

    reached: bool
    cost: float  # forward-equivalents up to this evaluation
    update: int
    measures: dict[str, float]  # every held-out measure at this evaluation
    first_measures: dict[str, float]  # every held-out measure before training
    dead_groups: float  # percentage in the complete run


def run(recipe: dict[str, Any], seed: int, folder: Path) -> list[dict[str, Any]]:
    """Train in a separate process and return the log."""
    config = yaml.safe_load((ROOT / recipe["config"]).read_text()) | recipe["settings"]
    config |= {"seed": seed, "output_dir": str(folder / "run"), "disable_tqdm": True}
    folder.mkdir()
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    command = [sys.executable, str(ROOT / recipe["script"]), "--config", str(folder / "config.yaml")]
    ended = subprocess.run(command, capture_output=True, text=True)
    if ended.returncode:
        raise SystemExit(f"error: {' '.join(command)}\n{ended.stderr[-2000:]}")
    return json.loads((folder / "run/trainer_state.json").read_text())["log_history"]


def result_of(log: list[dict[str, Any]], measure: str, target: float) -> Result:
    """Find the first evaluation of a run with a ``measure`` of at least ``target``."""
    cost, evaluations = 0.0, []
    for entry in log:
        cost = entry.get("forward_equivalents", cost)
        if f"eval_{measure}" in entry:
            measures = {k.removeprefix("eval_"): v for k, v in entry.items() if k.startswith("eval_")}
            evaluations.append((entry["step"], cost, measures))
    first_measures = evaluations[0][2]
    at_target = next((evaluation for evaluation in evaluations if evaluation[2][measure] >= target), None)
    update, cost, measures = at_target or evaluations[-1]
    dead_groups = 100 * statistics.mean(entry["dead_groups"] for entry in log if "dead_groups" in entry)
    return Result(at_target is not None, cost, update, measures, first_measures, dead_groups)


def spread(values: list[float], form: str) -> str:
    """Format the mean, and the range in brackets."""
    return f"{format(statistics.mean(values), form)} ({format(min(values), form)} to {format(max(values), form)})"


def ratio(runs: list[Result], baseline: list[Result]) -> str:
    """Format the mean cost relative to the baseline's.

    It is a bound ("<", ">") if only one of the two always reached the target, and unknown ("?") if neither did.
    """
    runs_reached = all(run.reached for run in runs)
    baseline_reached = all(run.reached for run in baseline)
    signs = {(True, True): "", (True, False): "< ", (False, True): "> ", (False, False): "? "}
    relative_cost = statistics.mean(run.cost for run in runs) / statistics.mean(run.cost for run in baseline)
    return f"{signs[runs_reached, baseline_reached]}{relative_cost:.3f}"


def row(name: str, runs: list[Result], baseline: list[Result], measure: str, guards: list[str]) -> str:
    """Format a line of a table."""
    least = "" if all(run.reached for run in runs) else "> "
    changes = [spread([run.measures[guard] - run.first_measures[guard] for run in runs], "+.3f") for guard in guards]
    cells = (
        name,
        f"{sum(run.reached for run in runs)} of {len(runs)}",
        spread([run.measures[measure] for run in runs], ".3f"),
        spread([run.update for run in runs], ".0f"),
        least + spread([run.cost / 1000 for run in runs], ".1f"),
        ratio(runs, baseline),
        spread([run.dead_groups for run in runs], ".0f"),
        *changes,
    )
    return f"| {' | '.join(cells)} |"


def table(logs: dict[str, list[list[dict[str, Any]]]], measure: str, target: float, guards: list[str]) -> str:
    """Format the table of a target, with a line for each recipe; guards are changes since the start of the run."""
    heads = ["recipe", "reached", measure, "update", "thousand forward-equivalents", "of the first", "dead", *guards]
    lines = [f"held-out {measure} of {target}", "", f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    results = {name: [result_of(log, measure, target) for log in recipe_logs] for name, recipe_logs in logs.items()}
    baseline = next(iter(results.values()))
    rows = [row(name, recipe_results, baseline, measure, guards) for name, recipe_results in results.items()]
    return "\n".join([*lines, *rows])


def main() -> None:
    """Run every recipe with every seed, and print a table for each target."""
    tasks = yaml.safe_load(RECIPES.read_text())
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=sorted(tasks), default="preference")
    parser.add_argument("--recipes", nargs="+", help="default: all; the first is the baseline")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time; this changes no result")
    parser.add_argument(
        "--curves", type=Path, help="JSON lines of the log of every run; one that is there is not run again"
    )
    args = parser.parse_args()
    task = tasks[args.task]
    names = args.recipes or list(task["recipes"])
    for name in names:
        if name not in task["recipes"]:
            parser.error(f"unknown recipe {name!r} of {args.task}; known: {', '.join(task['recipes'])}")
    logs: dict[str, list[list[dict[str, Any]]]] = {name: [] for name in names}
    lines = args.curves.read_text().splitlines() if args.curves and args.curves.exists() else []
    known = {(r["task"], r["recipe"], r["seed"]): r["log"] for r in map(json.loads, lines)}
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(args.jobs) as pool:

        def run_job(job: tuple[int, str]) -> list[dict[str, Any]]:
            seed, name = job
            if (args.task, name, seed) in known:
                return known[args.task, name, seed]
            overrides = task["recipes"][name] or {}
            settings = task["settings"] | overrides.get("settings", {})
            recipe = {"script": "align/grpo.py", "config": task["config"]} | overrides | {"settings": settings}
            return run(recipe, seed, Path(folder) / f"{name}-{seed}")

        jobs = [(seed, name) for seed in args.seeds for name in names]
        for (seed, name), log in zip(jobs, pool.map(run_job, jobs), strict=True):
            logs[name].append(log)
            last = result_of(log, next(iter(task["targets"])), float("inf"))
            print(f"{name}, seed {seed}: {last.cost:.0f} {last.measures}", file=sys.stderr, flush=True)
            if args.curves and (args.task, name, seed) not in known:
                with args.curves.open("a") as file:
                    file.write(json.dumps({"task": args.task, "recipe": name, "seed": seed, "log": log}) + "\n")
    print(f"seeds {args.seeds}")
    for measure, targets in task["targets"].items():
        for target in targets:
            print("\n" + table(logs, measure, target, task["guards"]))


if __name__ == "__main__":
    main()
