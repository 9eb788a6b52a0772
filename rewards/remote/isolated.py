"""A reward in a process of its own, with packages of its own: started, watched, killed when it hangs, started again.

In a config: ``{use: NAME, environment: {python: /path/to/venv}}``, or ``{requirements: [...]}`` for a virtual environment
that is made once. The worker (`rewards.remote.worker`) sees that environment's packages, this package's own plain modules and the
working folder, and nothing else of the run's.
"""

import collections
import contextlib
import fcntl
import itertools
import json
import logging
import os
import random
import selectors
import signal
import subprocess
import threading
import time
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from rewards.contract import CALL_SECONDS, RewardError, RewardFailed, RewardUnavailable
from rewards.remote import wire
from rewards.remote.environments import check_environment, environment_python
from rewards.remote.threads import in_thread

logger = logging.getLogger(__name__)

#: Seconds until a worker must have loaded its reward: some fetch a model first.
LOADING_SECONDS = 1800.0
#: Seconds before the second start after a failure; doubled by each further one, up to the last.
BACKOFF_SECONDS = (0.25, 30.0)
#: Puts this package, and nothing that lies beside it, on the worker's path.
_START = """
import sys
if sys.version_info < (3, 10): sys.exit("the environment has Python " + sys.version.split()[0] + "; 3.10 or later is needed")
import importlib.util
spec = importlib.util.spec_from_file_location("rewards", sys.argv[1] + "/__init__.py", submodule_search_locations=[sys.argv[1]])
sys.modules["rewards"] = module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
from rewards.remote.worker import main
main(sys.argv[2])
"""
#: Of the run and not of the worker: its packages, its place among the processes, the service's token.
_NOT_INHERITED = ("PYTHONPATH", "PYTHONHOME", "FLOW_ALIGN_TOKEN", "RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT")


class _Lost(Exception):
    """The worker died, hung or did not start; another one may do better."""


class _LoadError(Exception):
    """The worker is fine, and its reward is not: (type name, message)."""


class Isolated:
    """A reward as a callable whose work is done by a worker process.

    Args:
        name: of the reward. spec: what to load there, as in a config (``use``, ``args``). environment: see
            :func:`rewards.remote.environments.check_environment`. timeout: seconds a call may take; the worker is then killed.
            retries: how often a call that was lost with its worker is tried again, with loading it again for at most
            `rewards.calling.CALL_SECONDS` in all (or one ``timeout``, if that is longer).

    Raises (when made): what loading the reward raises there, if that is a ValueError, FileNotFoundError or ImportError;
    otherwise RuntimeError with the last lines the worker wrote.
    """

    def __init__(
        self,
        name: str,
        spec: Mapping[str, Any],
        environment: Mapping[str, Any],
        timeout: float = 300.0,
        retries: int = 2,
    ) -> None:
        check_environment(name, environment)
        self.name, self.timeout, self.retries, self.environment = name, timeout, retries, environment
        self._spec, self._variables = json.dumps({**spec, "name": name}), dict(environment.get("variables", {}))
        self._python = environment_python(name, environment)
        self._lock = threading.Lock()
        self._worker: _Worker | None = None
        self._lost_in_a_row, self._last_words, self._closed = 0, "", threading.Event()
        self._numbers = itertools.count()
        try:
            hello = self._start(LOADING_SECONDS)
        except _LoadError as error:
            kinds = {"ValueError": ValueError, "FileNotFoundError": FileNotFoundError, "ImportError": ImportError}
            kind, message = error.args
            known = kinds.get("ImportError" if kind == "ModuleNotFoundError" else kind)
            text = f"reward {name!r} in its environment ({self._python}): "
            raise (known or ValueError)(text + (message if known else f"{kind}: {message}")) from None
        except _Lost as error:
            raise ValueError(f"reward {name!r} did not start in its environment: {error}") from None
        columns = hello["columns"]
        self.columns: tuple[str, ...] | None = None if columns is None else tuple(columns)
        self.required: tuple[str, ...] = tuple(hello["required"])

    async def __call__(self, images: list[Image.Image], prompts: list[str], **columns: list[Any]) -> list[float | None]:
        """Scores, from a thread of its own: other rewards go on meanwhile."""
        return await in_thread(self.call, images, prompts, columns)

    def call(
        self, images: Sequence[Image.Image], prompts: Sequence[str], columns: Mapping[str, Sequence[Any]]
    ) -> list[float | None]:
        """Scores; raises RewardFailed, RewardUnavailable or RewardError."""
        number = next(self._numbers)
        request = wire.encode_request(images, prompts, columns, number=number)
        with self._lock:
            deadline = time.monotonic() + max(CALL_SECONDS, self.timeout)
            for attempt in range(1, self.retries + 2):
                try:
                    return self._exchange(request, number, deadline)
                except _Lost as lost:
                    self._lost_in_a_row, self._last_words = self._lost_in_a_row + 1, str(lost)
                    logger.warning("reward %r: %s (try %d of %d)", self.name, lost, attempt, self.retries + 1)
                if time.monotonic() > deadline:
                    break
        raise RewardUnavailable(f"given up after {attempt} tries: {self._last_words}")

    def problem(self) -> str | None:
        """Why the next call cannot simply go to the worker, if so."""
        if self._closed.is_set():
            return "closed"
        if self._worker is None or self._worker.process.poll() is not None:
            return self._last_words or (self._worker.last_words() if self._worker else "not running")
        return None

    def revive(self) -> None:
        """Start the worker again if it is dead and nobody is about to; RewardUnavailable if that fails."""
        if self.problem() is None or self._closed.is_set() or not self._lock.acquire(blocking=False):
            return
        try:
            self._ensure_running(LOADING_SECONDS)
        except _Lost as lost:
            self._lost_in_a_row, self._last_words = self._lost_in_a_row + 1, str(lost)
            raise RewardUnavailable(str(lost)) from None
        finally:
            self._lock.release()

    def close(self) -> None:
        """End the worker, in the middle of a call too."""
        self._closed.set()
        if self._lock.acquire(timeout=0.1):
            try:
                if self._worker is not None:
                    self._worker.end()
            finally:
                self._lock.release()
        elif self._worker is not None:
            self._worker.stop()  # the call that is under way notices

    def _exchange(self, request: list[bytes], number: int, deadline: float) -> list[float | None]:
        worker = self._ensure_running(min(LOADING_SECONDS, deadline - time.monotonic()))
        try:
            answer = worker.ask(request, number, min(self.timeout, max(0.0, deadline - time.monotonic())))
        except BaseException:  # an interrupt too: what it would still answer must not be taken for the next answer
            worker.kill()
            raise
        self._lost_in_a_row = 0
        if "error" in answer:
            raise (RewardError if answer["kind"] == "contract" else RewardFailed)(answer["error"])
        return answer["scores"]

    def _ensure_running(self, seconds: float) -> "_Worker":
        """The worker, started again if need be, with ``seconds`` for that; raises _Lost, or RewardUnavailable if closed."""
        if self._worker is None or self._worker.process.poll() is not None:
            if self._worker is not None and not self._lost_in_a_row:
                logger.warning("reward %r: %s; it is started again", self.name, self._worker.last_words())
            first, most = BACKOFF_SECONDS
            pause = min(most, first * 2 ** min(20, self._lost_in_a_row - 1)) * random.uniform(0.5, 1.0)
            if not self._closed.wait(pause if self._lost_in_a_row else 0.0):
                try:
                    self._start(seconds)
                except _LoadError as error:
                    raise _Lost(f"it could not be loaded again: {': '.join(error.args)}") from None
            self._last_words = ""
        assert self._worker is not None
        if self._closed.is_set():  # before or meanwhile: its pipes' numbers may soon be another file's
            self._worker.end()
            raise RewardUnavailable(f"reward {self.name!r} was closed")
        return self._worker

    def _start(self, seconds: float) -> dict[str, Any]:
        if self._worker is not None:
            self._worker.kill()
        try:
            command = [self._python, "-c", _START, str(Path(__file__).parents[1]), self._spec]
            self._worker = _Worker(command, self._variables)
        except OSError as error:  # no such program any more, or no memory or files for one more now
            raise _Lost(f"its worker could not be started: {error}") from None
        try:
            hello = self._worker.receive(time.monotonic() + seconds, seconds)
        except BaseException:
            self._worker.kill()
            raise
        if "error" in hello:
            self._worker.kill()
            raise _LoadError(hello["type"], hello["error"])
        return hello


class _Worker:
    """A worker process, its pipes, and the last lines it wrote."""

    def __init__(self, command: list[str], variables: Mapping[str, Any]) -> None:
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=_variables() | {key: str(value) for key, value in variables.items()},
            process_group=0,  # Ctrl-C is for the run, which may still want scores; and all of it can be killed
        )
        self._lines: collections.deque[str] = collections.deque(maxlen=12)
        self._reader = threading.Thread(target=self._read_lines, daemon=True)
        self._reader.start()
        assert self.process.stdin is not None and self.process.stdout is not None
        self._in, self._out = self.process.stdin.fileno(), self.process.stdout.fileno()
        if hasattr(fcntl, "F_SETPIPE_SZ"):
            with contextlib.suppress(PermissionError):  # who has many pipes already does with less
                fcntl.fcntl(self._in, fcntl.F_SETPIPE_SZ, 2**20)
        os.set_blocking(self._in, False)
        os.set_blocking(self._out, False)
        self._finalizer = weakref.finalize(self, _end, self.process, os.getpid())  # at exit, too

    def ask(self, request: list[bytes], number: int, timeout: float) -> dict[str, Any]:
        """Answer to a request; _Lost when the worker dies, takes longer than ``timeout`` seconds or answers another one."""
        deadline = time.monotonic() + timeout
        with selectors.DefaultSelector() as selector:
            selector.register(self._in, selectors.EVENT_WRITE)
            for part in request:
                rest = memoryview(part)
                while rest:
                    self._wait(selector, deadline, timeout)
                    try:
                        rest = rest[os.write(self._in, rest[: 2**20]) :]
                    except BrokenPipeError:
                        raise _Lost(self.last_words()) from None
        answer = self.receive(deadline, timeout)
        if answer.get("number") != number:
            raise _Lost("its worker gave the answer to another request")
        return answer

    def receive(self, deadline: float, timeout: float) -> dict[str, Any]:
        """The next frame's header."""

        def fill(room: memoryview) -> None:
            while room:
                self._wait(selector, deadline, timeout)
                count = os.readv(self._out, [room])
                if not count:
                    raise _Lost(self.last_words())
                room = room[count:]

        with selectors.DefaultSelector() as selector:
            selector.register(self._out, selectors.EVENT_READ)
            try:
                return wire.read_frame(fill)[0]
            except wire.FrameError as error:
                raise _Lost(f"its worker answered with {error}") from None

    def _wait(self, selector: selectors.BaseSelector, deadline: float, timeout: float) -> None:
        while True:
            ended = (
                self.process.poll() is not None
            )  # the pipe alone does not tell: a child of it may hold the other end
            left = deadline - time.monotonic()
            if selector.select(0.0 if ended else max(0.0, min(1.0, left))):
                return
            if ended:
                raise _Lost(self.last_words())
            if left <= 0:
                raise _Lost(f"its worker took longer than {timeout:g} s and was killed")

    def last_words(self) -> str:
        """How it ended, once it has."""
        try:
            code = self.process.wait(timeout=1.0)
        except subprocess.TimeoutExpired:
            return "its worker closed its output"
        self._reader.join(timeout=1.0)  # a child of it may keep the pipe open
        how = f"was killed by signal {-code} ({signal.strsignal(-code)})" if code < 0 else f"ended with code {code}"
        return f"its worker {how}" + "".join(f"\n  {line}" for line in self._lines)

    def stop(self) -> None:
        """Kill it and its children; from any thread."""
        _stop(self.process)

    def kill(self) -> None:
        """Kill it and its children, and close its pipes: for the thread that uses them."""
        if self._finalizer.detach():  # once: later, the number of its process group may be another's
            _stop(self.process)
            _close(self.process)

    def end(self) -> None:
        """Let it go: its input ends, and after a moment it is killed."""
        self._finalizer()

    def _read_lines(self) -> None:
        assert self.process.stderr is not None
        with self.process.stderr as stream:
            for line in iter(lambda: stream.readline(2000), b""):
                text = line.decode(errors="replace").rstrip()
                self._lines.append(text)
                logger.info("worker: %s", text)


def _variables() -> dict[str, str]:
    """This process's environment variables, less those that are not the worker's; one GPU of several stays one."""
    variables = {key: value for key, value in os.environ.items() if key not in _NOT_INHERITED}
    local, visible = os.environ.get("LOCAL_RANK", ""), os.environ.get("CUDA_VISIBLE_DEVICES")
    devices = visible.split(",") if visible is not None else None
    if local.isdigit() and (devices is None or int(local) < len(devices)):
        # Each process of a run has a GPU of its own; without this all workers would take the first.
        variables["CUDA_VISIBLE_DEVICES"] = local if devices is None else devices[int(local)]
    return variables


def _stop(process: "subprocess.Popen[bytes]") -> None:
    with contextlib.suppress(ProcessLookupError):  # its children may outlive it, or there is nobody left
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _close(process: "subprocess.Popen[bytes]") -> None:
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            pipe.close()


def _end(process: "subprocess.Popen[bytes]", owner: int) -> None:
    if os.getpid() != owner:  # a fork of the run, whose worker it is not
        return
    if process.poll() is None and process.stdin is not None:
        process.stdin.close()
        try:
            process.wait(timeout=1.0)
        except subprocess.TimeoutExpired:
            logger.info("a reward's worker did not end by itself and is killed")
    _stop(process)
    _close(process)
