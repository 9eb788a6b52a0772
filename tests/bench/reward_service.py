"""Measure the images per second of rewards in this process, in a worker and through the service, and the overhead.

    python tests/bench/reward_service.py --use shapes_following --column 'spec={"n": 1, ...}' --repeats 5
    python tests/bench/reward_service.py --config rewards.yaml --images 4 --repeats 3

The three ways take turns within each repeat, so that other load on the machine affects all of them alike. The second table
is the overhead of worker and service, for rewards that take 50 ms an image by sleeping (like one on a GPU) and by
computing (which competes with the transfer for the CPU). It shows median and range over the repeats of the time on that
way, relative to the time in this process in the same repeat.
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
#: Rewards of a fixed cost; they are written to a file, because the worker and the service load them by path.
FIXED_COST_REWARDS = '''
import hashlib
import time


def sleeping(images, prompts):
    """Take 50 ms an image without using the CPU."""
    time.sleep(0.05 * len(images))
    return [image.getpixel((1, 1))[0] / 255 for image in images]


class Computing:
    """Compute `rounds` hashes of each image's pixels."""

    def __init__(self, rounds):
        self.rounds = rounds

    def __call__(self, images, prompts):
        return [self.hash(image.tobytes()) for image in images]

    def hash(self, pixels):
        for _ in range(self.rounds):
            digest = hashlib.sha256(pixels).digest()
        return digest[0] / 255
'''


def rounds_for(seconds: float, size: int) -> int:
    """Return how many hashes of an image of `size` x `size` pixels take `seconds` on this machine."""
    pixels = os.urandom(3 * size * size)
    started = time.perf_counter()
    for _ in range(200):
        hashlib.sha256(pixels).digest()
    return max(1, round(200 * seconds / (time.perf_counter() - started)))


@contextmanager
def service(entries: list[dict[str, Any]], folder: str) -> Iterator[str]:
    """Serve the rewards until the block ends; yields the URL."""
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
    """Load the same reward in each of the WAYS; `url` is that of its service."""
    in_worker = {**entry, "environment": {"python": sys.executable}}
    through_service = {"use": entry["name"], "endpoints": url}
    return load_rewards(entry) + load_rewards(in_worker) + load_rewards(through_service)


def timed(reward: Reward, images: list[Image.Image], columns: dict[str, list[Any]]) -> tuple[float, list[float]]:
    """Score the images once; return the seconds and the scores."""
    started = time.perf_counter()
    (scores,), failures = score([reward], images, ["a picture"] * len(images), columns)
    seconds = time.perf_counter() - started
    if failures:
        raise SystemExit(f"error: {failures}")
    return seconds, scores


def measure(
    entry: dict[str, Any], url: str, images: list[Image.Image], columns: dict[str, list[Any]], repeats: int
) -> list[list[float]]:
    """Measure the seconds of each repeat in each of the WAYS, after one call of each to warm up.

    Raises:
        SystemExit: the scores are not bit for bit the same.
    """
    rewards = ways_of(entry, url)
    seconds: list[list[float]] = [[] for _ in rewards]
    for repeat in range(repeats + 1):
        scores_of_ways = []
        for way, reward in enumerate(rewards):
            duration, scores = timed(reward, images, columns)
            scores_of_ways.append([repr(value) for value in scores])
            if repeat:
                seconds[way].append(duration)
        if scores_of_ways.count(scores_of_ways[0]) != len(scores_of_ways):
            raise SystemExit(f"error: the scores of {entry['name']} differ between {', '.join(WAYS)}")
    for reward in rewards:
        reward.close()
    return seconds


def spread(values: list[float], form: str) -> str:
    """Format the median, and the range in brackets."""
    return f"{format(statistics.median(values), form)} ({format(min(values), form)} to {format(max(values), form)})"


def main() -> None:
    """Measure and print the two tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--use", action="append", default=[], help="a reward, by its name in a config; repeatable")
    parser.add_argument("--config", type=Path, help="YAML file with a list `rewards:`, as for training")
    parser.add_argument(
        "--column", action="append", default=[], metavar="NAME=VALUE", help="a column, its value as JSON"
    )
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    columns = {k: [json.loads(v)] * args.images for k, v in (text.split("=", 1) for text in args.column)}
    noise = Image.frombytes("RGB", (args.size, args.size), os.urandom(3 * args.size**2))
    images = [noise.rotate(n) for n in range(args.images)]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "fixed_cost.py"
        file.write_text(FIXED_COST_REWARDS)
        rounds = rounds_for(0.05, args.size)
        specs = [*args.use, *(read_rewards(args.config) if args.config else [])]
        named = [{"use": spec} if isinstance(spec, str) else dict(spec) for spec in specs]
        named = [{"name": entry["use"].rpartition(":")[2]} | entry for entry in named]
        fixed_cost = [
            {"use": f"{file}:sleeping", "name": "sleeping 50 ms"},
            {"use": f"{file}:Computing", "name": "computing 50 ms", "args": {"rounds": rounds}},
        ]
        results = {}
        for entry in named + fixed_cost:
            with service([entry], folder) as url:
                results[entry["name"]] = measure(entry, url, images, columns, args.repeats)
    print(
        f"{args.images} images of {args.size}x{args.size} a call, {args.repeats} repeats, {os.cpu_count()} CPU cores\n"
    )
    print("| images/s | " + " | ".join(WAYS) + " |\n|---|---|---|---|")
    for name, seconds in results.items():
        rates = [spread([args.images / duration for duration in of_way], ".3g") for of_way in seconds]
        print(f"| {name} | " + " | ".join(rates) + " |")
    print("\n| overhead against in process | worker | service |\n|---|---|---|")
    for entry in fixed_cost:
        in_process, *other_ways = results[entry["name"]]
        cells = []
        for of_way in other_ways:
            overheads = [duration / base - 1 for base, duration in zip(in_process, of_way, strict=True)]
            cells.append(spread(overheads, "+.1%"))
        print(f"| {entry['name']} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
