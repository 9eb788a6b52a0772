"""Stopping a run on a signal without losing what it has done."""

import ctypes
import logging
import os
import signal
import sys
from types import TracebackType
from typing import Any

logger = logging.getLogger(__name__)

PR_SET_PDEATHSIG = 1  # linux/prctl.h


#: SIGUSR1 is what schedulers send some time before they end a job (Slurm: ``--signal=USR1@300``).
NOTED = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class Interrupt:
    """The signals in NOTED are noted in :attr:`received`, for whoever looks there; a second SIGINT stops at once.

    Use it in ``with``, or :meth:`catch` the signals and :meth:`restore` them.

    Args:
        answer: what is printed when the first signal comes, behind its name.
    """

    def __init__(self, answer: str) -> None:
        self.answer = answer
        self.received: str | None = None
        self._previous: dict[int, Any] = {}

    def _handle(self, number: int, frame: Any) -> None:
        if self.received and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = signal.Signals(number).name
        # Not print: the signal may have come in the middle of one.
        os.write(1, f"\n{self.received}: {self.answer}\n".encode())

    def catch(self) -> None:
        """From here on signals are noted."""
        self.received = None
        if sys.platform == "linux" and os.environ.keys() & {"ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID"}:
            # `accelerate launch` passes no signal on, torchrun not all: ask the kernel for a SIGTERM when it dies.
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        try:
            self._previous = {n: signal.signal(n, self._handle) for n in NOTED}
        except ValueError:  # in another thread than the main one: signals are somebody else's
            logger.warning("outside the main thread: no signal will end this run in good order")

    def restore(self) -> None:
        """Give the signals back to whoever had them."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}

    def __enter__(self) -> "Interrupt":
        self.catch()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.restore()
