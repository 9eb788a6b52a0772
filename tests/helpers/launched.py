"""Runs as a user starts them: real processes, in a folder of their own."""

import os
import runpy
import subprocess
import sys
from contextlib import chdir, redirect_stdout
from io import StringIO
from pathlib import Path
from unittest.mock import patch

import torch
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


def here(folder: Path, door: Path, *words: object) -> str:
    """What a door printed that ran by its path in this process, on one thread, as a process of :func:`start` does.

    It spares the imports, of which most tests learn nothing: they take longer than a short run.
    """
    printed, threads, argv = StringIO(), torch.get_num_threads(), sys.argv
    torch.set_num_threads(1)
    sys.argv = [str(word) for word in (door, *words)]
    try:
        with chdir(folder), redirect_stdout(printed), patch.dict(os.environ):  # which a run's arguments write to
            runpy.run_path(str(door), run_name="__main__")
    finally:
        torch.set_num_threads(threads)
        sys.argv = argv
    return printed.getvalue()


def on_cpu(launcher: Path, folder: Path, processes: int = 2, port: int = 0) -> list[object]:
    """The command that launches with a shipped config on this machine's CPU: fewer processes, in full precision."""
    config = yaml.safe_load(launcher.read_text()) | {"num_processes": processes, "mixed_precision": "no"}
    file = folder / f"{launcher.stem}-cpu.yaml"
    file.write_text(yaml.safe_dump(config))
    return [BIN / "accelerate", "launch", "--config_file", file, "--main_process_port", port]
