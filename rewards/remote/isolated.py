"""A reward in a worker process with its own packages, which is killed when it hangs and started again when it dies.

In a config: ``{use: NAME, environment: {python: /path/to/venv}}``, or ``{requirements: [...]}`` for a virtual
environment that is made once. The worker (`rewards.remote.worker`) sees the packages of that environment, the modules
of this package and the working folder, but none of the run's packages.
"""

import itertools
import logging
import random
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from rewards.contract import CALL_SECONDS, Answer, RewardError, RewardFailed, RewardUnavailable, RunsElsewhere
from rewards.redaction import foreign
from rewards.remote import wire
from rewards.remote.environments import check_environment, environment_python
from rewards.remote.process import Worker, WorkerLost
from rewards.remote.variables import own_variables
from rewards.threads import in_thread

logger = logging.getLogger(__name__)

#: Seconds until a worker must have loaded its reward; some download a model first.
LOADING_SECONDS = 1800.0
#: Seconds to pause before a start after a failure, doubled by each further failure, and the longest pause.
BACKOFF_SECONDS = (0.25, 30.0)
#: Makes this package, and nothing beside it, importable in the worker.
_START = """
import sys
if sys.version_info < (3, 10): sys.exit("the environment has Python " + sys.version.split()[0] + "; 3.10 or later is needed")
import importlib.util
spec = importlib.util.spec_from_file_location("rewards", sys.argv[1] + "/__init__.py", submodule_search_locations=[sys.argv[1]])
sys.modules["rewards"] = module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
from rewards.remote.worker import main
main()
"""


class _LoadError(Exception):
    """The worker runs but could not load its reward. Args: name of the error's type, message."""


class Isolated(RunsElsewhere):
    """A reward whose work is done by a worker process.

    Args:
        name: of the reward. spec: what the worker loads, as in a config (``use``, ``args``). environment: see
            :func:`rewards.remote.environments.check_environment`. timeout: seconds a call may take; then the worker is
            killed. retries: how often a call that was lost with its worker is tried again, all tries together, with
            loading the reward again, for at most `rewards.contract.CALL_SECONDS` (or one ``timeout``, if that is
            longer).

    Raises:
        ValueError, FileNotFoundError, ImportError: what loading the reward raises; ValueError for an error of another
            type, and if the worker does not start, with the last lines it wrote.
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
        self._spec, self._variables = {**spec, "name": name}, own_variables(environment.get("variables") or {})
        self._python = environment_python(name, environment)
        self._lock = threading.Lock()
        self._worker: Worker | None = None
        self._failures_in_a_row, self._last_error, self._closed = 0, "", threading.Event()
        self._request_numbers = itertools.count()
        try:
            loaded = self._start(LOADING_SECONDS)
        except _LoadError as error:
            kinds = {"ValueError": ValueError, "FileNotFoundError": FileNotFoundError, "ImportError": ImportError}
            kind, message = error.args
            same_type = kinds.get("ImportError" if kind == "ModuleNotFoundError" else kind)
            prefix = f"reward {name!r} in its environment ({self._python}): "
            raise (same_type or ValueError)(prefix + (message if same_type else f"{kind}: {message}")) from None
        except WorkerLost as error:
            raise ValueError(f"reward {name!r} did not start in its environment: {error}") from None
        self.columns = None if loaded["columns"] is None else tuple(loaded["columns"])
        self.required = tuple(loaded["required"])

    async def __call__(self, images: list[Image.Image], prompts: list[str], **columns: list[Any]) -> Answer:
        """Score images, in a thread, so that other rewards run meanwhile."""
        return await in_thread(self._call, images, prompts, columns)

    def _call(
        self, images: Sequence[Image.Image], prompts: Sequence[str], columns: Mapping[str, Sequence[Any]]
    ) -> Answer:
        """Score images; raise RewardFailed, RewardUnavailable or RewardError."""
        number = next(self._request_numbers)
        request = wire.encode_request(images, prompts, columns, number=number)
        with self._lock:
            deadline = time.monotonic() + max(CALL_SECONDS, self.timeout)
            for attempt in range(1, self.retries + 2):
                try:
                    return self._exchange(request, number, deadline)
                except WorkerLost as lost:
                    self._failures_in_a_row, self._last_error = self._failures_in_a_row + 1, str(lost)
                    logger.warning("reward %r: %s (try %d of %d)", self.name, lost, attempt, self.retries + 1)
                if time.monotonic() > deadline:
                    break
        raise RewardUnavailable(f"given up after {attempt} tries: {self._last_error}")

    def check_values(self, row: Mapping[str, Any]) -> None:
        """Raise ValueError, naming the column, for a value of a data row that JSON would lose or change."""
        wire.check_json_values({name: [value] for name, value in row.items()})

    def problem(self) -> str | None:
        """Return why the worker cannot take a call now, or None."""
        if self._closed.is_set():
            return "closed"
        if self._worker is None or self._worker.process.poll() is not None:
            return self._last_error or (self._worker.describe_end() if self._worker else "not running")
        return None

    def revive(self) -> None:
        """Start the worker again if it is dead and no call is doing so; raise RewardUnavailable if that fails."""
        if self.problem() is None or self._closed.is_set() or not self._lock.acquire(blocking=False):
            return
        try:
            self._ensure_running(LOADING_SECONDS)
        except WorkerLost as lost:
            self._failures_in_a_row, self._last_error = self._failures_in_a_row + 1, str(lost)
            raise RewardUnavailable(str(lost)) from None
        finally:
            self._lock.release()

    def close(self) -> None:
        """End the worker, also in the middle of a call."""
        self._closed.set()
        if self._lock.acquire(timeout=0.1):
            try:
                if self._worker is not None:
                    self._worker.end()
            finally:
                self._lock.release()
        elif self._worker is not None:
            self._worker.stop()  # which ends the call in progress

    def _exchange(self, request: list[bytes], number: int, deadline: float) -> Answer:
        worker = self._ensure_running(min(LOADING_SECONDS, deadline - time.monotonic()))
        try:
            answer = worker.ask(request, number, min(self.timeout, max(0.0, deadline - time.monotonic())))
        except BaseException:  # also after an interrupt, so that a late answer is not taken for the next one
            worker.kill()
            raise
        self._failures_in_a_row = 0
        if "error" in answer:
            raise (RewardError if answer.get("kind") == "contract" else RewardFailed)(foreign(str(answer["error"])))
        return Answer(answer["scores"], answer["extras"])

    def _ensure_running(self, seconds: float) -> Worker:
        """Return the worker, started again if necessary within ``seconds``.

        Raises:
            WorkerLost: it could not be started. RewardUnavailable: this reward was closed.
        """
        if self._worker is None or self._worker.process.poll() is not None:
            if self._worker is not None and not self._failures_in_a_row:
                logger.warning("reward %r: %s; it is started again", self.name, self._worker.describe_end())
            shortest, longest = BACKOFF_SECONDS
            pause = min(longest, shortest * 2 ** min(20, self._failures_in_a_row - 1)) * random.uniform(0.5, 1.0)
            if not self._closed.wait(pause if self._failures_in_a_row else 0.0):
                try:
                    self._start(seconds)
                except _LoadError as error:
                    raise WorkerLost(f"it could not be loaded again: {': '.join(error.args)}") from None
            self._last_error = ""
        assert self._worker is not None
        if self._closed.is_set():  # the worker's pipes are closed, and their numbers may be reused for other files
            self._worker.end()
            raise RewardUnavailable(f"reward {self.name!r} was closed")
        return self._worker

    def _start(self, seconds: float) -> dict[str, Any]:
        """Start a worker and return what it sends once its reward is loaded: columns and required."""
        if self._worker is not None:
            self._worker.kill()
        try:
            command = [self._python, "-c", _START, str(Path(__file__).parents[1])]
            self._worker = Worker(command, self._variables)
        except OSError as error:  # the program was removed, or there is no memory or file handle for another process
            raise WorkerLost(f"its worker could not be started: {error}") from None
        try:
            deadline = time.monotonic() + seconds
            self._worker.send(wire.frame({"spec": self._spec}), deadline, seconds)
            loaded = self._worker.receive(deadline, seconds)
        except BaseException:
            self._worker.kill()
            raise
        if "error" in loaded:
            self._worker.kill()
            raise _LoadError(foreign(str(loaded["type"])), foreign(str(loaded["error"])))
        return loaded
