"""What a run counts between two log lines, over all processes."""

import resource
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from accelerate.utils import gather_object


def memory_peak_gib() -> float:
    """The most memory this process has held so far: of its GPU if it has one, else its resident memory."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    unit = 1 if sys.platform == "darwin" else 1024  # getrusage(2): bytes there, kilobytes on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


class RunMetrics:
    """Values, seconds and transformer forwards of this process; :meth:`drain` brings the processes together.

    ``forward_equivalents`` is cumulative: a forward of one image counts 1, a backward 2, a recomputed forward 1.
    ``memory_peak_gib`` is the largest of any process since its start.
    """

    def __init__(self, phases: Sequence[str]) -> None:
        self.forward_equivalents = 0.0
        self._phases = phases
        self._reset()

    def _reset(self) -> None:
        self._values: dict[str, list[float]] = {}
        self.seconds = dict.fromkeys(self._phases, 0.0)
        self._images = 0

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
        yield
        inner = sum(self.seconds.values()) - before
        self.seconds[phase] += time.perf_counter() - started - inner

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
        logs |= {f"seconds_{phase}": spent for phase, spent in self.seconds.items()}
        logs["forward_equivalents"] = sum(count for _, count, _ in gathered)
        logs["memory_peak_gib"] = max(peak for *_, peak in gathered)
        self._reset()
        return logs
