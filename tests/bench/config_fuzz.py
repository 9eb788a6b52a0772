"""Change two or three settings of a tiny config at random, start the real command, and see how it ends.

    python tests/bench/config_fuzz.py --cases 200 --seed 0
    python tests/bench/config_fuzz.py --doors grpo nft --minutes 30

Every case has a process and a folder of its own. It may train, to weights that are finite, or end with a sentence that names
one of the changed settings. Anything else is listed with its config: a sentence that names none of them, a traceback, a weight
that is NaN or infinite, a run that is stopped, and one that takes longer than --limit seconds.
"""

import argparse
import contextlib
import json
import multiprocessing
import os
import random
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "CUDA_VISIBLE_DEVICES": ""}
sys.path.insert(0, str(Path(__file__).parents[1] / "helpers"))

import torch
import yaml
from odd_configs import BASES, DOORS, broken_weights, draw, furnish, names_a_key

#: How a case may end.
GOOD = ("trained", "sentence with its key", "sentence with its key, after loading")


def run_case(door: str, changed: dict[str, Any], folder: str, report: Any) -> None:
    """Run one case in its folder and send (how it ended, what it said)."""
    os.chdir(folder)
    furnish(Path())
    Path("config.yaml").write_text(yaml.safe_dump(BASES[door] | changed))
    torch.set_num_threads(1)
    loaded = watch_loading()
    with open("log.txt", "w") as log, contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
        try:
            DOORS[door][1](["--config", "config.yaml"])
            broken = broken_weights(Path())
            report.send(("non-finite weights", ", ".join(broken)) if broken else ("trained", ""))
        except SystemExit as ended:
            said, late = str(ended.code), ", after loading" if loaded else ""
            if said.startswith("stopped"):
                report.send(("stopped", said))
            elif names_a_key(said, changed):
                report.send((f"sentence with its key{late}", said))
            else:
                report.send((f"sentence without a key{late}", said))
        except BaseException:
            report.send((f"traceback {'after' if loaded else 'before'} loading", traceback.format_exc()))


def watch_loading() -> list[str]:
    """Return a list that is empty until a model is loaded."""
    from align.models.qwen_image import QwenImage

    loaded: list[str] = []
    load = QwenImage.load

    def noted(*args: Any, **settings: Any) -> Any:
        loaded.append("model")
        return load(*args, **settings)

    QwenImage.load = noted  # type: ignore[method-assign, assignment]
    return loaded


def end_of(door: str, changed: dict[str, Any], limit: float) -> tuple[str, str]:
    """Run one case in a forked process; return how it ended and what it said."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    with tempfile.TemporaryDirectory() as folder:
        process = context.Process(target=run_case, args=(door, changed, folder, sender))
        process.start()
        sender.close()
        try:
            return receiver.recv() if receiver.poll(limit) else ("over time", f"{limit:.0f} s")
        except EOFError:
            return "died", f"exit code {process.exitcode}"
        finally:
            process.kill()
            process.join()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--doors", nargs="+", default=list(DOORS), choices=list(DOORS))
    parser.add_argument("--limit", type=float, default=60, help="seconds of one case")
    parser.add_argument("--minutes", type=float, default=1e9, help="start no case after so many")
    args = parser.parse_args()
    rng, counts, started = random.Random(args.seed), Counter[str](), time.monotonic()
    for number in range(args.cases):
        door = args.doors[number % len(args.doors)]
        changed = draw(rng, door)
        if time.monotonic() - started > args.minutes * 60:
            break
        how, said = end_of(door, changed, args.limit)
        counts[how] += 1
        if how not in GOOD[:2]:
            print(f"{number} {door} {json.dumps(changed)}\n  {how}: {said[-1500:]}", flush=True)
    print(f"\nseed {args.seed}, {counts.total()} cases in {time.monotonic() - started:.0f} s")
    for how, count in counts.most_common():
        print(f"{count:5d}  {how}")
    raise SystemExit(any(how not in GOOD for how in counts))


if __name__ == "__main__":
    main()
