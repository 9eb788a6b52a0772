"""Which way to a held-out reward costs the fewest transformer forwards: recipes of GRPO and NFT, side by side.

    python tests/bench/recipes.py --recipes flow_grpo one_step nft --seeds 0 1 2

Every run is evaluated on the same held-out prompts and noise as it goes; its cost is the log's ``forward_equivalents``
(a forward of one image 1, a backward 2) at the first evaluation that reaches the target, the first rollout's check of
the ratio included and the evaluations left out. A run that never gets there costs more than all it spent. Guards are
those of that same evaluation. Recipes are in tests/bench/recipes.yaml: each is a list of overrides of a shipped config.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import yaml

ROOT = Path(__file__).parents[2]
RECIPES = Path(__file__).with_name("recipes.yaml")


class Reached(NamedTuple):
    """Where a run first reached the target: forward-equivalents, update, and every held-out measure there.

    ``reached`` is False for a run that did not: then all this is of its last evaluation.
    """

    reached: bool
    cost: float
    update: int
    measures: dict[str, float]
    start: dict[str, float]


def run(recipe: dict[str, Any], seed: int, folder: Path) -> list[dict[str, Any]]:
    """The log of one training run, as a process of its own."""
    command = [sys.executable, str(ROOT / recipe["script"]), "--config", str(ROOT / recipe["config"])]
    for key, value in {**recipe["settings"], "seed": seed, "output_dir": folder, "disable_tqdm": True}.items():
        values = value if isinstance(value, list) else [value]
        command += [f"--{key}", *(str(v).lower() if isinstance(v, bool) else str(v) for v in values)]
    ended = subprocess.run(command, capture_output=True, text=True)
    if ended.returncode:
        raise SystemExit(f"error: {' '.join(command)}\n{ended.stderr[-2000:]}")
    return json.loads((folder / "trainer_state.json").read_text())["log_history"]


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
    return Reached(there is not None, spent, step, measures, start)


def spread(values: list[float], form: str) -> str:
    """Mean, and the range in brackets."""
    return f"{format(statistics.mean(values), form)} ({format(min(values), form)} to {format(max(values), form)})"


def row(name: str, runs: list[Reached], baseline: float | None, guards: list[str]) -> str:
    """One line of the table."""
    cost, least = spread([r.cost / 1000 for r in runs], ".1f"), "" if all(r.reached for r in runs) else "> "
    ratio = "" if baseline is None else f"{least}{statistics.mean(r.cost for r in runs) / baseline:.3f}"
    there = f"{sum(r.reached for r in runs)} of {len(runs)}"
    changes = [spread([r.measures[guard] - r.start[guard] for r in runs], "+.3f") for guard in guards]
    return f"| {name} | {there} | {spread([r.update for r in runs], '.0f')} | {least}{cost} | {ratio} | " + (
        " | ".join(changes) + " |"
    )


def main() -> None:
    """Run the recipes seed by seed, and print the table."""
    known = yaml.safe_load(RECIPES.read_text())
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=sorted(known), default="preference")
    parser.add_argument("--recipes", nargs="+", help="default: all; the first is what the others are compared with")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--target", type=float)
    parser.add_argument("--curves", type=Path, help="write every held-out value of every run here, as JSON lines")
    args = parser.parse_args()
    task = known[args.task]
    names = args.recipes or list(task["recipes"])
    for name in names:
        if name not in task["recipes"]:
            parser.error(f"no recipe {name!r} of {args.task}. There are: {', '.join(task['recipes'])}")
    target, measure, guards = args.target or task["target"], task["measure"], task["guards"]
    results: dict[str, list[Reached]] = {name: [] for name in names}
    with tempfile.TemporaryDirectory() as folder:
        for seed in args.seeds:
            for name in names:
                recipe = task["recipes"][name]
                settings = task["settings"] | recipe.get("settings", {})
                whole = {"script": recipe.get("script", "align/grpo.py"), "config": task["config"]} | recipe
                log = run(whole | {"settings": settings}, seed, Path(folder) / f"{name}-{seed}")
                results[name].append(reached(log, measure, target))
                print(f"{name}, seed {seed}: {results[name][-1]}", file=sys.stderr, flush=True)
                if args.curves:
                    with args.curves.open("a") as file:
                        file.write(json.dumps({"recipe": name, "seed": seed, "log": log}) + "\n")
    print(f"held-out {measure} of {target}, seeds {args.seeds}\n")
    print("| recipe | reached | update | thousand forward-equivalents | of the first | " + " | ".join(guards) + " |")
    print("|---" * (5 + len(guards)) + "|")
    baseline = statistics.mean(r.cost for r in results[names[0]])
    for name in names:
        print(row(name, results[name], baseline, guards))


if __name__ == "__main__":
    main()
