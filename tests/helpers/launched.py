"""Runs as a user starts them: real processes, in a folder of their own."""

import os
import subprocess
import sys
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
#: Two processes on this machine's CPU; GLOO goes to the trainers among the words.
TWO = [BIN / "torchrun", "--standalone", "--nproc_per_node", "2"]
GLOO = ["--use_cpu", "true", "--ddp_backend", "gloo"]


def start(folder: Path, *words: object) -> subprocess.Popen:
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    environment |= {"DS_ACCELERATOR": "cpu"}  # or DeepSpeed looks for a GPU
    return subprocess.Popen(
        [str(word) for word in words], cwd=folder, env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def finish(process: subprocess.Popen, timeout: float = 300) -> str:
    """What the process printed; it must end well."""
    output, _ = process.communicate(timeout=timeout)
    assert process.returncode == 0, output[-3000:]
    return output


def run(folder: Path, *words: object) -> str:
    return finish(start(folder, *words))


def on_cpu(launcher: Path, folder: Path, processes: int = 2, port: int = 0) -> list[object]:
    """The command that launches with a shipped config on this machine's CPU: fewer processes, in full precision."""
    config = yaml.safe_load(launcher.read_text()) | {"num_processes": processes, "mixed_precision": "no"}
    file = folder / f"{launcher.stem}-cpu.yaml"
    file.write_text(yaml.safe_dump(config))
    return [BIN / "accelerate", "launch", "--config_file", file, "--main_process_port", port]
