"""Images a second of rewards in this process, in a worker of their own and through the service; and what the way costs.

    python tests/bench/reward_service.py --use shapes_following --column 'spec={"n": 1, ...}' --repeats 5
    python tests/bench/reward_service.py --config rewards.yaml --images 4 --repeats 3

The three ways take turns within each repeat, so that what else the machine does falls on all of them alike. The second
table is the cost of the way itself, for rewards that take 50 ms an image by sleeping (as one on a GPU does) and by
computing (which shares the CPU with the sending); median and range over the repeats, of the time on that way less the
time in this process in the same repeat.
"""

import argparse
import hashlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from PIL import Image

from rewards import Reward, load_rewards, score
from rewards.registry import read_rewards

ROOT = Path(__file__).parents[2]
WAYS = ("in process", "worker", "service")
#: Rewards of a known cost, written to a file of their own: the worker and the service load them by path.
KNOWN = '''
import hashlib
import time


def sleeping(images, prompts):
    """50 ms an image, without the CPU."""
    time.sleep(0.05 * len(images))
    return [image.getpixel((1, 1))[0] / 255 for image in images]


class Computing:
    """`rounds` hashes of an image's pixels."""

    def __init__(self, rounds):
        self.rounds = rounds

    def __call__(self, images, prompts):
        return [self.one(image.tobytes()) for image in images]

    def one(self, pixels):
        for _ in range(self.rounds):
            digest = hashlib.sha256(pixels).digest()
        return digest[0] / 255
'''


def rounds_for(seconds: float, size: int) -> int:
    """Hashes of an image that take about so long here."""
    pixels = os.urandom(3 * size * size)
    started = time.perf_counter()
    for _ in range(200):
        hashlib.sha256(pixels).digest()
    return max(1, round(200 * seconds / (time.perf_counter() - started)))


@contextmanager
def service(entries: list[dict[str, Any]], folder: str) -> Iterator[str]:
    """URL of a service of these rewards, until the block ends."""
    config = Path(folder) / "service.yaml"
    config.write_text(json.dumps({"rewards": entries}))  # JSON is YAML
    command = [sys.executable, "-m", "rewards.serve", "--port", "0", "--config", str(config)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    try:
        assert process.stdout is not None
        yield process.stdout.readline().split()[-1]
    finally:
        process.terminate()
        process.wait()


def ways_of(entry: dict[str, Any], url: str) -> list[Reward]:
    """The same reward on the three ways."""
    name = entry["name"]
    own = {**entry, "environment": {"python": sys.executable}}
    return load_rewards(entry) + load_rewards(own) + load_rewards({"use": name, "endpoints": url})


def timed(reward: Reward, images: list[Image.Image], columns: dict[str, list[Any]]) -> tuple[float, list[float]]:
    """Seconds and scores of one call."""
    started = time.perf_counter()
    (scores,), failures = score([reward], images, ["a picture"] * len(images), columns)
    seconds = time.perf_counter() - started
    if failures:
        raise SystemExit(f"error: {failures}")
    return seconds, scores


def measure(
    entry: dict[str, Any], url: str, images: list[Image.Image], columns: dict[str, list[Any]], repeats: int
) -> list[list[float]]:
    """Seconds of each repeat on each way, after one call of each to warm up; the scores must be the same to the bit."""
    rewards = ways_of(entry, url)
    seconds: list[list[float]] = [[] for _ in rewards]
    for repeat in range(repeats + 1):
        answers = []
        for n, reward in enumerate(rewards):
            taken, scores = timed(reward, images, columns)
            answers.append([repr(value) for value in scores])
            if repeat:
                seconds[n].append(taken)
        if answers.count(answers[0]) != len(answers):
            raise SystemExit(f"error: {entry['name']} scores differently on the three ways")
    for reward in rewards:
        reward.close()
    return seconds


def spread(values: list[float], form: str) -> str:
    """Median, and the range in brackets."""
    return f"{format(statistics.median(values), form)} ({format(min(values), form)} to {format(max(values), form)})"


def main() -> None:
    """Measure and print the two tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--use", action="append", default=[], help="a reward, by the name it has in a config")
    parser.add_argument("--config", type=Path, help="YAML with a list `rewards:`, as for training")
    parser.add_argument("--column", action="append", default=[], metavar="NAME=VALUE", help="JSON, for all images")
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    columns = {k: [json.loads(v)] * args.images for k, v in (text.split("=", 1) for text in args.column)}
    noise = Image.frombytes("RGB", (args.size, args.size), os.urandom(3 * args.size**2))
    images = [noise.rotate(n) for n in range(args.images)]
    with tempfile.TemporaryDirectory() as folder:
        known = Path(folder) / "known.py"
        known.write_text(KNOWN)
        computing = {"rounds": rounds_for(0.05, args.size)}
        specs = [*args.use, *(read_rewards(args.config) if args.config else [])]
        named = [{"use": spec} if isinstance(spec, str) else dict(spec) for spec in specs]
        named = [{"name": entry["use"].rpartition(":")[2]} | entry for entry in named]
        costs = [
            {"use": f"{known}:sleeping", "name": "sleeping 50 ms"},
            {"use": f"{known}:Computing", "name": "computing 50 ms", "args": computing},
        ]
        results = {}
        for entry in named + costs:
            with service([entry], folder) as url:
                results[entry["name"]] = measure(entry, url, images, columns, args.repeats)
    print(
        f"{args.images} images of {args.size}x{args.size} a call, {args.repeats} repeats, {os.cpu_count()} CPU cores\n"
    )
    print("| images/s | " + " | ".join(WAYS) + " |\n|---|---|---|---|")
    for name, seconds in results.items():
        print(f"| {name} | " + " | ".join(spread([args.images / s for s in way], ".3g") for way in seconds) + " |")
    print("\n| overhead against in process | worker | service |\n|---|---|---|")
    for entry in costs:
        here, *others = results[entry["name"]]
        cells = [spread([there / s - 1 for s, there in zip(here, way, strict=True)], "+.1%") for way in others]
        print(f"| {entry['name']} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
