"""A reward service as a user starts it: a process, on a free port or on a given one."""

import atexit
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx

ROOT = Path(__file__).parents[2]
ODD = str(ROOT / "tests/helpers/odd_rewards.py")
IN_CLEAR = {key: value for key, value in os.environ.items() if key != "FLOW_ALIGN_TOKEN"}


class Service:
    """``python -m rewards.serve`` with these options; ready when made. ``files``: how many it may have open."""

    def __init__(
        self, *options: str, port: int = 0, token: str | None = None, wait: bool = True, files: int | None = None
    ) -> None:
        variables = IN_CLEAR | ({"FLOW_ALIGN_TOKEN": token} if token else {})
        command = [sys.executable, "-m", "rewards.serve", "--port", str(port), *options]
        if files is not None:
            command = ["sh", "-c", f'ulimit -n {files} && exec "$@"', "sh", *command]
        self.process = subprocess.Popen(
            command, cwd=ROOT, env=variables, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        atexit.register(self.process.kill)  # also where a test fails before it ends the service
        line = self.process.stdout.readline()
        found = re.match(r"listening on (http://\S+)", line)
        if not found:
            raise RuntimeError(f"the service did not start: {line}{self.process.communicate()[1]}")
        self.url = found[1]
        self.port = int(self.url.rpartition(":")[2])
        if wait:
            self.await_health()

    def await_health(self, seconds: float = 30.0) -> None:
        until = time.monotonic() + seconds
        while True:
            try:
                answer = httpx.get(f"{self.url}/health")
                if answer.status_code == 200:
                    return
            except httpx.TransportError:
                answer = None
            if time.monotonic() > until:
                raise TimeoutError(f"not well after {seconds} s: {answer and answer.text}")
            time.sleep(0.05)

    def end(self, number: int = signal.SIGTERM) -> str:
        """Send a signal, wait; returns what it wrote to standard error."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        return self.process.communicate(timeout=30)[1]
