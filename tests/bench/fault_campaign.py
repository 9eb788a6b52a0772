"""kill -9 at random moments of a tiny GRPO run on two processes: does each resumed run end as if nothing had happened?

    python tests/bench/fault_campaign.py --moments 20 --seed 0
    python tests/bench/fault_campaign.py --launcher zero2 --minutes 30

For each moment a fresh run loses one process, or all of them and their launcher, and is started again with
`--resume_from_checkpoint true` until it ends. It has survived when its LoRA equals that of an undisturbed run to the
last bit (or within --tolerance). Updates lost are those that were done and had to be done again. The kills fall evenly
over the time between the start of training and its end, the writing of checkpoints included. With --minutes, no further
moment is tried once they are over, and the figures are those of what was.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).parents[1] / "helpers"))

from launched import BIN, ROOT, on_cpu

LORA = "pytorch_lora_weights.safetensors"
REWARD = '''"""Bright pictures."""

from PIL import ImageStat


def score(images, prompts):
    return [ImageStat.Stat(image.convert("L")).mean[0] / 255 for image in images]
'''
#: Four updates on a rollout and a checkpoint every third: most are taken in the middle of one.
WORDS = [
    *("--eval_strategy", "no", "--eval_on_start", "false", "--num_generations", "4", "--generation_batch_size", "8"),
    *("--num_inference_steps", "4", "--sde_window_size", "2", "--num_prefixes", "4"),
    *("--per_device_train_batch_size", "4", "--gradient_accumulation_steps", "1"),
    *("--num_iterations", "2", "--save_strategy", "steps", "--save_steps", "3", "--save_total_limit", "2"),
    *("--disable_tqdm", "true", "--rewards", "./my_reward.py:score", "--resume_from_checkpoint", "true"),
]
GLOO = ["--ddp_backend", "gloo"]


class Run:
    """A launched run; :attr:`updates` are the moments at which its updates were logged."""

    def __init__(self, folder: Path, launcher: list[str], words: list[str]) -> None:
        command = [*launcher, str(ROOT / "align/grpo.py"), "--config", str(ROOT / "configs/tiny/grpo.yaml"), *words]
        environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
        environment |= {"DS_ACCELERATOR": "cpu"}  # or DeepSpeed looks for a GPU
        self.process = subprocess.Popen(
            command, cwd=folder, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        self.updates: list[float] = []
        self.lines: list[str] = []
        self.reader = threading.Thread(target=self._read)
        self.reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line)
            if "'loss'" in line:
                self.updates.append(time.monotonic())

    def wait_for_update(self, count: int) -> None:
        while len(self.updates) < count and self.process.poll() is None:
            time.sleep(0.002)

    def workers(self) -> list[int]:
        """The training processes: what the launcher started, however deep, that runs the trainer itself."""
        parents, found = {self.process.pid}, []
        for pid in sorted(int(p.name) for p in Path("/proc").iterdir() if p.name.isdigit()):
            try:
                parent = int((Path("/proc") / str(pid) / "stat").read_text().rpartition(")")[2].split()[1])
                line = (Path("/proc") / str(pid) / "cmdline").read_bytes().split(b"\0")
            except (FileNotFoundError, ProcessLookupError):  # ended while we looked
                continue
            if parent in parents:
                parents.add(pid)
                if any(word.endswith(b"grpo.py") for word in line[1:3]):
                    found.append(pid)
        return found

    def end(self, limit: float) -> int:
        """Its exit code; a run that does not end within the limit is killed, and that is an error."""
        workers = self.workers()
        try:
            return self.process.wait(limit)
        except subprocess.TimeoutExpired:
            kill([*workers, self.process.pid])
            raise SystemExit(f"a run did not end within {limit:.0f} s:\n{''.join(self.lines[-30:])}") from None
        finally:
            self.process.wait()
            self.reader.join()


def kill(pids: list[int]) -> None:
    for pid in pids:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            print(f"process {pid} had ended already", file=sys.stderr)


def last_checkpoint(folder: Path) -> int:
    """The update of the last checkpoint that has its name, 0 without any."""
    return max((int(p.name.rpartition("-")[2]) for p in folder.glob("checkpoint-*")), default=0)


def largest_difference(one: Path, other: Path) -> float:
    a, b = load_file(one / LORA), load_file(other / LORA)
    assert a.keys() == b.keys()
    return max((a[name] - b[name]).abs().max().item() for name in a)


def disturb(place: Path, words: argparse.Namespace, span: float, draw: random.Random) -> dict:
    """One run with one kill: how it went."""
    name, everything = place.name, draw.random() < 0.5
    run = Run(place.parent, words.launcher, [*words.words, "--output_dir", name])
    run.wait_for_update(1)
    victims = run.workers()  # before the moment: looking through all processes may take as long as several updates
    time.sleep(draw.uniform(0, span))
    if not everything:
        victims = [draw.choice(victims)] if victims else []
    kill([*victims, *([run.process.pid] if everything and run.process.poll() is None else [])])
    killed = time.monotonic()
    run.end(words.limit)
    down, done = time.monotonic() - killed, len(run.updates)
    unfinished, kept, starts = (place / ".unfinished").exists(), last_checkpoint(place), 0
    while not (place / LORA).is_file() and starts < 3:
        starts += 1
        again = Run(place.parent, words.launcher, [*words.words, "--output_dir", name])
        code = again.end(words.limit)
        if code:
            print("".join(again.lines[-90:]), file=sys.stderr)
    return {
        "killed": "all" if everything else "one", "done": done, "kept": kept, "in a checkpoint": unfinished,
        "down": down, "starts": starts,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--moments", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--max_steps", type=int, default=48)
    parser.add_argument("--launcher", help="of configs/accelerate, instead of torchrun and DDP: zero2, zero3, ...")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="after which no further moment is tried")
    parser.add_argument("--tolerance", type=float, default=0.0)
    parser.add_argument("--limit", type=float, default=300.0, help="seconds that one start may take")
    parser.add_argument("words", nargs="*", help="further words for the trainer, behind --")
    args = parser.parse_args()
    draw = random.Random(args.seed)
    begun, use_cpu = time.monotonic(), ["--use_cpu", "true"] if args.launcher in (None, "ddp") else []
    args.words = [*WORDS, "--max_steps", str(args.max_steps), *use_cpu, *GLOO, *args.words]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        (folder / "my_reward.py").write_text(REWARD)
        if args.launcher:
            args.launcher = [str(w) for w in on_cpu(ROOT / f"configs/accelerate/{args.launcher}.yaml", folder)]
        else:
            args.launcher = [str(BIN / "torchrun"), "--standalone", "--nproc_per_node", "2"]
        whole = Run(folder, args.launcher, [*args.words, "--output_dir", "whole"])
        if whole.end(args.limit):
            raise SystemExit("the undisturbed run failed:\n" + "".join(whole.lines[-30:]))
        span = whole.updates[-1] - whole.updates[0]
        print(f"undisturbed: {len(whole.updates)} updates, {span:.1f} s between the first and the last\n")
        print("| # | killed | updates done | last checkpoint | lost | in a checkpoint | down in s | difference |")
        print("|---|---|---|---|---|---|---|---|")
        survived, lost = 0, []
        for number in range(args.moments):
            if time.monotonic() - begun > 60 * args.minutes:
                break
            place = folder / f"run{number}"
            how = disturb(place, args, span, draw)
            ended = (place / LORA).is_file()
            difference = largest_difference(folder / "whole", place) if ended else float("inf")
            survived += difference <= args.tolerance
            lost.append(max(0, how["done"] - how["kept"]) if how["starts"] else 0)
            print(
                f"| {number + 1} | {how['killed']} | {how['done']} | {how['kept']} | {lost[-1]} "
                f"| {'yes' if how['in a checkpoint'] else 'no'} | {how['down']:.1f} | {difference:g} |",
                flush=True,
            )
        print(
            f"\n{json.dumps({'tried': len(lost), 'survived': survived, 'updates lost': sum(lost), 'most': max(lost, default=0)})}"
        )
    if survived < len(lost) or not lost:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
