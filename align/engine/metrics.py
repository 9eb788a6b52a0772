"""What a run counts between two log lines, over all processes."""

import resource
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from accelerate.utils import gather_object
from torch import nn


def memory_peak_gib() -> float:
    """The most memory this process has held so far: of its GPU if it has one, else its resident memory."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    unit = 1 if sys.platform == "darwin" else 1024  # getrusage(2): bytes there, kilobytes on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


class ModelClock:
    """Seconds that parts of a model compute: on a GPU by its own events, which nothing waits for, else by the wall."""

    def __init__(self) -> None:
        self.counting = True
        self._seconds: dict[str, float] = {}
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def timed(self, part: str) -> Iterator[None]:
        """Add the time within to a part."""
        ended = self._start(part)
        yield
        ended()

    def _start(self, part: str) -> Callable[[], None]:
        if not self.counting:
            return lambda: None
        if torch.cuda.is_available():
            first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            first.record()
            self._events.append((part, first, last))
            return last.record
        started = time.perf_counter()

        def ended() -> None:
            self._seconds[part] = self._seconds.get(part, 0.0) + time.perf_counter() - started

        return ended

    @contextmanager
    def attached(self, parts: Mapping[str, Sequence[nn.Module]]) -> Iterator[None]:
        """Within it every forward of these modules is counted to its part."""
        running: list[Callable[[], None]] = []
        hooks = []
        for part, modules in parts.items():
            for module in modules:
                hooks.append(module.register_forward_pre_hook(lambda *_, p=part: running.append(self._start(p))))
                hooks.append(module.register_forward_hook(lambda *_: running.pop()(), always_call=True))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def read(self) -> dict[str, float]:
        """Seconds of each part since the last call; waits for the GPU."""
        if self._events:
            torch.cuda.synchronize()
        for part, first, last in self._events:
            self._seconds[part] = self._seconds.get(part, 0.0) + first.elapsed_time(last) / 1000
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

    def record(self, **values: float) -> None:
        """Remember values until the next log line, which shows their mean (``ratio_min``, ``ratio_max``: extremes)."""
        for name, value in values.items():
            self._values.setdefault(name, []).append(value)

    def count_images(self, images: int) -> None:
        """Images sampled, over all processes."""
        self._images += images

    @contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        """Add the time within to a phase, less what other phases inside it took."""
        started, before = time.perf_counter(), sum(self.seconds.values())
        self._since = started if self._since is None else self._since
        yield
        inner = sum(self.seconds.values()) - before
        self.seconds[phase] += time.perf_counter() - started - inner

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What happens within is not of the updates: evaluation, checkpoints."""
        started, self.models.counting = time.perf_counter(), False
        yield
        self.models.counting = True
        self._paused += time.perf_counter() - started

    def _where_time_went(self) -> dict[str, float]:
        now, models = time.perf_counter(), self.models.read()
        whole = now - (self._since or now) - self._paused
        self._since = now
        known = sum(models.values()) + self.seconds.get("reward", 0.0)
        return {f"seconds_{part}": spent for part, spent in {**models, "outside_models": whole - known}.items()}

    def drain(self) -> dict[str, float]:
        """Everything since the last call; to be called on every process."""
        gathered = gather_object([(self._values, self.forward_equivalents, memory_peak_gib())])
        logs: dict[str, float] = {}
        for name in dict.fromkeys(name for values, *_ in gathered for name in values):
            values = torch.tensor([v for part, *_ in gathered for v in part.get(name, [])])
            reduced = {"ratio_min": values.min, "ratio_max": values.max}.get(name, values.nanmean)()
            logs[name] = reduced.item()
        if self._images:
            logs["images_per_second"] = self._images / max(sum(self.seconds.values()), 1e-9)
        logs |= {f"seconds_{phase}": spent for phase, spent in self.seconds.items()} | self._where_time_went()
        logs["forward_equivalents"] = sum(count for _, count, _ in gathered)
        logs["memory_peak_gib"] = max(peak for *_, peak in gathered)
        self._reset()
        return logs
