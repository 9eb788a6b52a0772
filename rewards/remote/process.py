"""The worker process of an isolated reward: its pipes, its time limits, its end."""

import collections
import contextlib
import fcntl
import logging
import os
import selectors
import signal
import subprocess
import threading
import time
import weakref
from collections.abc import Mapping
from typing import Any

from rewards.redaction import foreign
from rewards.remote import wire
from rewards.remote.variables import variables_for_worker

logger = logging.getLogger(__name__)


class WorkerLost(Exception):
    """The worker died, hung or did not start; a new one may succeed."""


class Worker:
    """A worker process, its pipes, and the last lines it wrote."""

    def __init__(self, command: list[str], variables: Mapping[str, Any]) -> None:
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=variables_for_worker(variables),
            process_group=0,  # so that Ctrl-C reaches only the run, and the worker can be killed with its children
        )
        self._lines: collections.deque[str] = collections.deque(maxlen=12)
        self._reader = threading.Thread(target=self._read_lines, daemon=True)
        self._reader.start()
        assert self.process.stdin is not None and self.process.stdout is not None
        self._in, self._out = self.process.stdin.fileno(), self.process.stdout.fileno()
        if hasattr(fcntl, "F_SETPIPE_SZ"):
            with contextlib.suppress(PermissionError):  # a user with many pipes may not enlarge another
                fcntl.fcntl(self._in, fcntl.F_SETPIPE_SZ, 2**20)
        os.set_blocking(self._in, False)
        os.set_blocking(self._out, False)
        self._finalizer = weakref.finalize(self, _end, self.process, os.getpid())  # at exit, too

    def ask(self, request: list[bytes], number: int, timeout: float) -> dict[str, Any]:
        """Send a request and return its answer.

        Raises:
            WorkerLost: the worker dies, takes longer than ``timeout`` seconds or answers another request.
        """
        deadline = time.monotonic() + timeout
        self.send(request, deadline, timeout)
        answer = self.receive(deadline, timeout)
        if answer.get("number") != number:
            raise WorkerLost("its worker gave the answer to another request")
        return answer

    def send(self, frame: list[bytes], deadline: float, timeout: float) -> None:
        """Write a frame."""
        with selectors.DefaultSelector() as selector:
            selector.register(self._in, selectors.EVENT_WRITE)
            for piece in frame:
                unsent = memoryview(piece)
                while unsent:
                    self._wait(selector, deadline, timeout)
                    try:
                        unsent = unsent[os.write(self._in, unsent[: 2**20]) :]
                    except BrokenPipeError:
                        raise WorkerLost(self.describe_end()) from None

    def receive(self, deadline: float, timeout: float) -> dict[str, Any]:
        """Read the next frame and return its header."""

        def fill(buffer: memoryview) -> None:
            while buffer:
                self._wait(selector, deadline, timeout)
                count = os.readv(self._out, [buffer])
                if not count:
                    raise WorkerLost(self.describe_end())
                buffer = buffer[count:]

        with selectors.DefaultSelector() as selector:
            selector.register(self._out, selectors.EVENT_READ)
            try:
                return wire.read_frame(fill)[0]
            except wire.FrameError as error:
                raise WorkerLost(f"its worker answered with {foreign(str(error))}") from None

    def _wait(self, selector: selectors.BaseSelector, deadline: float, timeout: float) -> None:
        """Wait until a pipe is ready; raise WorkerLost if the worker has ended or the time is up."""
        while True:
            # The end of the pipe is not enough: a child of the worker may keep the pipe open.
            has_ended = self.process.poll() is not None
            seconds_left = deadline - time.monotonic()
            if selector.select(0.0 if has_ended else max(0.0, min(1.0, seconds_left))):
                return
            if has_ended:
                raise WorkerLost(self.describe_end())
            if seconds_left <= 0:
                raise WorkerLost(f"its worker took longer than {timeout:g} s and was killed")

    def describe_end(self) -> str:
        """Return how the worker ended, with the last lines it wrote."""
        try:
            code = self.process.wait(timeout=1.0)
        except subprocess.TimeoutExpired:
            return "its worker closed its output"
        self._reader.join(timeout=1.0)  # a child of the worker may keep the pipe open
        how = f"was killed by signal {-code} ({signal.strsignal(-code)})" if code < 0 else f"ended with code {code}"
        return f"its worker {how}" + "".join(f"\n  {line}" for line in self._lines)

    def stop(self) -> None:
        """Kill the worker and its children; may be called from any thread."""
        _stop(self.process)

    def kill(self) -> None:
        """Kill the worker and its children and close its pipes; for the thread that uses the pipes."""
        if self._finalizer.detach():  # only once: later its process group's number may be reused
            _stop(self.process)
            _close(self.process)

    def end(self) -> None:
        """Close the worker's input, and kill it if it does not end within a second."""
        self._finalizer()

    def _read_lines(self) -> None:
        assert self.process.stderr is not None
        with self.process.stderr as stream:
            for line in iter(lambda: stream.readline(2000), b""):
                text = foreign(line.decode(errors="replace").rstrip())
                self._lines.append(text)
                logger.info("worker: %s", text)


def _stop(process: "subprocess.Popen[bytes]") -> None:
    # The group, because the worker's children may outlive it; the error means that all of them have ended.
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _close(process: "subprocess.Popen[bytes]") -> None:
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            pipe.close()


def _end(process: "subprocess.Popen[bytes]", owner: int) -> None:
    if os.getpid() != owner:  # in a fork of the run, which does not own the worker
        return
    if process.poll() is None and process.stdin is not None:
        process.stdin.close()
        try:
            process.wait(timeout=1.0)
        except subprocess.TimeoutExpired:
            logger.info("a reward's worker did not end by itself and is killed")
    _stop(process)
    _close(process)
