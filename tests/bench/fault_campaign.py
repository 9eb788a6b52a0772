"""Kill processes of tiny GRPO runs at random moments, and compare the resumed runs with an undisturbed one.

    python tests/bench/fault_campaign.py --moments 20 --seed 0
    python tests/bench/fault_campaign.py --launcher zero2 --minutes 30

A run has two processes. For each moment a new run is started, `kill -9` ends one of its processes, or both and their
launcher, and the run is started again with `--resume_from_checkpoint true` until it finishes. It has survived if its LoRA
equals that of the undisturbed run to the last bit (or within --tolerance). Updates lost are those that had been done
and had to be repeated. The moments are uniform between the start and the end of training, which includes the writing
of checkpoints. With --minutes, no further run is started once they are over, and the summary covers the runs so far.
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
#: Four updates on each rollout and a checkpoint after every third update, so most checkpoints are inside a rollout.
TRAINER_ARGUMENTS = [
    *("--eval_strategy", "no", "--eval_on_start", "false", "--num_generations", "4", "--generation_batch_size", "8"),
    *("--num_inference_steps", "4", "--sde_window_size", "2", "--num_prefixes", "4"),
    *("--per_device_train_batch_size", "4", "--gradient_accumulation_steps", "1"),
    *("--num_iterations", "2", "--save_strategy", "steps", "--save_steps", "3", "--save_total_limit", "2"),
    *("--disable_tqdm", "true", "--rewards", "./my_reward.py:score", "--resume_from_checkpoint", "true"),
]
GLOO = ["--ddp_backend", "gloo"]


class Run:
    """Launch a run and read its output; :attr:`updates` are the times at which its updates were logged."""

    def __init__(self, folder: Path, launcher: list[str], trainer_arguments: list[str]) -> None:
        config = str(ROOT / "configs/tiny/grpo.yaml")
        command = [*launcher, str(ROOT / "align/grpo.py"), "--config", config, *trainer_arguments]
        environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
        environment |= {"DS_ACCELERATOR": "cpu"}  # otherwise DeepSpeed looks for a GPU
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
        """Wait until the run has logged `count` updates, or has ended."""
        while len(self.updates) < count and self.process.poll() is None:
            time.sleep(0.002)

    def workers(self) -> list[int]:
        """Return the ids of the training processes: descendants of the launcher that run the trainer itself."""
        descendants, workers = {self.process.pid}, []
        for pid in sorted(int(p.name) for p in Path("/proc").iterdir() if p.name.isdigit()):
            try:
                parent = int((Path("/proc") / str(pid) / "stat").read_text().rpartition(")")[2].split()[1])
                command = (Path("/proc") / str(pid) / "cmdline").read_bytes().split(b"\0")
            except (FileNotFoundError, ProcessLookupError):  # the process ended in the meantime
                continue
            if parent in descendants:
                descendants.add(pid)
                if any(argument.endswith(b"grpo.py") for argument in command[1:3]):
                    workers.append(pid)
        return workers

    def wait(self, limit: float) -> int:
        """Wait for the end of the run and return its exit code.

        Raises:
            SystemExit: the run took more than `limit` seconds; it has been killed.
        """
        workers = self.workers()
        try:
            return self.process.wait(limit)
        except subprocess.TimeoutExpired:
            kill([*workers, self.process.pid])
            output = "".join(self.lines[-30:])
            raise SystemExit(f"error: a run took more than {limit:.0f} s and was killed:\n{output}") from None
        finally:
            self.process.wait()
            self.reader.join()


def kill(pids: list[int]) -> None:
    """Kill processes with SIGKILL; those that have ended are reported."""
    for pid in pids:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            print(f"process {pid} had already ended", file=sys.stderr)


def last_checkpoint(folder: Path) -> int:
    """Return the update of the last complete checkpoint, 0 if there is none."""
    return max((int(p.name.rpartition("-")[2]) for p in folder.glob("checkpoint-*")), default=0)


def largest_difference(first: Path, second: Path) -> float:
    """Return the largest difference between elements of the LoRAs in two output folders."""
    a, b = load_file(first / LORA), load_file(second / LORA)
    assert a.keys() == b.keys()
    return max((a[name] - b[name]).abs().max().item() for name in a)


def disturb(output_dir: Path, args: argparse.Namespace, duration: float, rng: random.Random) -> dict:
    """Run once, kill at a random moment within `duration` seconds of the first update, and resume until it finishes.

    Returns:
        killed: "all" or "one".
        updates_done: how many updates the run had logged.
        checkpoint: the update of the last checkpoint.
        writing_checkpoint: whether a checkpoint was being written.
        down: seconds from the kill until the last process ended.
        restarts: how often the run was started again, 3 at most.
    """
    kill_all = rng.random() < 0.5
    trainer_arguments = [*args.trainer_arguments, "--output_dir", output_dir.name]
    run = Run(output_dir.parent, args.launcher, trainer_arguments)
    run.wait_for_update(1)
    victims = run.workers()  # before the sleep, because finding them may take as long as several updates
    time.sleep(rng.uniform(0, duration))
    if not kill_all:
        victims = [rng.choice(victims)] if victims else []
    kill([*victims, *([run.process.pid] if kill_all and run.process.poll() is None else [])])
    killed_at = time.monotonic()
    run.wait(args.limit)
    down = time.monotonic() - killed_at
    result = {
        "killed": "all" if kill_all else "one",
        "updates_done": len(run.updates),
        "checkpoint": last_checkpoint(output_dir),
        "writing_checkpoint": (output_dir / ".unfinished").exists(),
        "down": down,
        "restarts": 0,
    }
    while not (output_dir / LORA).is_file() and result["restarts"] < 3:
        result["restarts"] += 1
        resumed = Run(output_dir.parent, args.launcher, trainer_arguments)
        if resumed.wait(args.limit):
            print("".join(resumed.lines[-90:]), file=sys.stderr)
    return result


def main() -> None:
    """Run the campaign, print the table and the summary, and fail if a run has not survived."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--moments", type=int, default=20, help="number of runs to disturb")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--max_steps", type=int, default=48)
    parser.add_argument("--launcher", help="a config of configs/accelerate (zero2, ...); default: torchrun with DDP")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="start no further run after this time")
    parser.add_argument("--tolerance", type=float, default=0.0, help="difference of the LoRAs that counts as survived")
    parser.add_argument("--limit", type=float, default=300.0, help="seconds that a start of a run may take")
    parser.add_argument("trainer_arguments", nargs="*", help="further arguments of the trainer, after --")
    args = parser.parse_args()
    rng = random.Random(args.seed)
    started = time.monotonic()
    use_cpu = ["--use_cpu", "true"] if args.launcher in (None, "ddp") else []
    max_steps = ["--max_steps", str(args.max_steps)]
    args.trainer_arguments = [*TRAINER_ARGUMENTS, *max_steps, *use_cpu, *GLOO, *args.trainer_arguments]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        (folder / "my_reward.py").write_text(REWARD)
        if args.launcher:
            config = ROOT / f"configs/accelerate/{args.launcher}.yaml"
            args.launcher = [str(argument) for argument in on_cpu(config, folder)]
        else:
            args.launcher = [str(BIN / "torchrun"), "--standalone", "--nproc_per_node", "2"]
        undisturbed = Run(folder, args.launcher, [*args.trainer_arguments, "--output_dir", "undisturbed"])
        if undisturbed.wait(args.limit):
            raise SystemExit("error: the undisturbed run failed:\n" + "".join(undisturbed.lines[-30:]))
        duration = undisturbed.updates[-1] - undisturbed.updates[0]
        print(f"undisturbed: {len(undisturbed.updates)} updates, {duration:.1f} s between the first and the last\n")
        print("| # | killed | updates done | last checkpoint | lost | in a checkpoint | down in s | difference |")
        print("|---|---|---|---|---|---|---|---|")
        survived, lost = 0, []
        for number in range(args.moments):
            if time.monotonic() - started > 60 * args.minutes:
                break
            output_dir = folder / f"run{number}"
            result = disturb(output_dir, args, duration, rng)
            finished = (output_dir / LORA).is_file()
            difference = largest_difference(folder / "undisturbed", output_dir) if finished else float("inf")
            survived += difference <= args.tolerance
            lost.append(max(0, result["updates_done"] - result["checkpoint"]) if result["restarts"] else 0)
            print(
                f"| {number + 1} | {result['killed']} | {result['updates_done']} | {result['checkpoint']} | {lost[-1]} "
                f"| {'yes' if result['writing_checkpoint'] else 'no'} | {result['down']:.1f} | {difference:g} |",
                flush=True,
            )
        summary = {"tried": len(lost), "survived": survived, "updates lost": sum(lost), "most": max(lost, default=0)}
        print(f"\n{json.dumps(summary)}")
    if survived < len(lost) or not lost:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
