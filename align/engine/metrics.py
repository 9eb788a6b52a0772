"""What a run counts between two log lines, over all processes."""

import resource
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import nn


def memory_peak_gib() -> float:
    """Return the most memory this process has held so far: of its GPU if it has one, else its resident memory."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    unit = 1 if sys.platform == "darwin" else 1024  # getrusage(2): bytes there, kilobytes on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


class ModelClock:
    """Seconds that the modules of a model compute: on a GPU by its own events, which nothing waits for, else by the wall."""

    def __init__(self) -> None:
        self.counting = True
        self._seconds: dict[str, float] = {}
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []
        self._open: dict[str, Callable[[], None]] = {}

    def begin(self, name: str) -> None:
        """Count the time from here to :meth:`end` under ``name``."""
        self._open[name] = self._start(name)

    def end(self, name: str) -> None:
        """End what :meth:`begin` began, if it did."""
        if name in self._open:
            self._open.pop(name)()

    def _start(self, name: str) -> Callable[[], None]:
        if not self.counting:
            return lambda: None
        if torch.cuda.is_available():
            first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            first.record()
            self._events.append((name, first, last))
            return last.record
        started = time.perf_counter()

        def ended() -> None:
            self._seconds[name] = self._seconds.get(name, 0.0) + time.perf_counter() - started

        return ended

    @contextmanager
    def attached(self, modules: Mapping[str, Sequence[nn.Module]]) -> Iterator[None]:
        """Enter a context in which every forward of these modules is counted under their name."""
        running: list[Callable[[], None]] = []
        hooks = []

        def before(name: str) -> Callable[..., None]:
            return lambda *_: running.append(self._start(name))

        def after(*_: Any) -> None:
            running.pop()()

        for name, of_name in modules.items():
            for module in of_name:
                hooks.append(module.register_forward_pre_hook(before(name)))
                hooks.append(module.register_forward_hook(after, always_call=True))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def read(self) -> dict[str, float]:
        """Return the seconds of each name since the last call; waits for the GPU."""
        if self._events:
            torch.cuda.synchronize()
        for name, first, last in self._events:
            self._seconds[name] = self._seconds.get(name, 0.0) + first.elapsed_time(last) / 1000
        seconds, self._seconds, self._events = self._seconds, {}, []
        return seconds


class RunMetrics:
    """Values, seconds and transformer forwards of this process; :meth:`drain` brings the processes together.

    ``forward_equivalents`` is cumulative: a forward of one image counts 1, a backward 2, a recomputed forward 1.
    ``memory_peak_gib`` is the largest of any process since its start. ``seconds_outside_models`` is the time in which
    neither the model computed nor a reward was waited for, of this process.
    """

    def __init__(self, phases: Sequence[str]) -> None:
        self.forward_equivalents = 0.0
        self.models = ModelClock()
        self._phases = phases
        self._since: float | None = None
        self._reset()

    def _reset(self) -> None:
        self._values: dict[str, list[float]] = {}
        self.seconds = dict.fromkeys(self._phases, 0.0)
        self._images, self._paused = 0, 0.0

    def record(self, **values: float | list[float]) -> None:
        """Remember values until the next log line, which shows their mean (``ratio_min``, ``ratio_max``: extremes)."""
        for name, value in values.items():
            self._values.setdefault(name, []).extend(value if isinstance(value, list) else [value])

    def count_images(self, images: int) -> None:
        """Count sampled images, over all processes."""
        self._images += images

    @contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        """Enter a context whose time counts to a phase, less what other phases inside it took."""
        started, before = time.perf_counter(), sum(self.seconds.values())
        self._since = started if self._since is None else self._since
        yield
        inner = sum(self.seconds.values()) - before
        self.seconds[phase] += time.perf_counter() - started - inner

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Enter a context whose time belongs to no update: evaluation, checkpoints."""
        started, self.models.counting = time.perf_counter(), False
        yield
        self.models.counting = True
        self._paused += time.perf_counter() - started

    def _where_time_went(self) -> dict[str, float]:
        time_now, models = time.perf_counter(), self.models.read()
        total = time_now - (self._since or time_now) - self._paused
        self._since = time_now
        known = sum(models.values()) + self.seconds.get("reward", 0.0)
        return {f"seconds_{name}": spent for name, spent in {**models, "outside_models": total - known}.items()}

    def drain(self) -> dict[str, float]:
        """Return everything since the last call, over all processes; called on every process."""
        gathered = gather_object([(self._values, self.forward_equivalents, memory_peak_gib())])
        logs: dict[str, float] = {}
        for name in dict.fromkeys(name for values, *_ in gathered for name in values):
            found = [v for of_process, *_ in gathered for v in of_process.get(name, [])]
            values = torch.tensor(found, dtype=torch.float32)  # they may all be whole
            reduced = {"ratio_min": values.min, "ratio_max": values.max}.get(name, values.nanmean)()
            logs[name] = reduced.item()
        if self._images:
            logs["images_per_second"] = self._images / max(sum(self.seconds.values()), 1e-9)
        logs |= {f"seconds_{phase}": spent for phase, spent in self.seconds.items()} | self._where_time_went()
        logs["forward_equivalents"] = sum(count for _, count, _ in gathered)
        logs["memory_peak_gib"] = max(peak for *_, peak in gathered)
        self._reset()
        return logs
