"""Stopping a run on a signal without losing what it has done."""

import ctypes
import logging
import os
import signal
import sys
from datetime import timedelta
from types import TracebackType
from typing import Any

import torch
from transformers import TrainerCallback

logger = logging.getLogger(__name__)

PR_SET_PDEATHSIG = 1  # linux/prctl.h


#: SIGUSR1 is what schedulers send some time before they end a job (Slurm: ``--signal=USR1@300``).
NOTED = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class Interrupt:
    """Notes the signals in NOTED in :attr:`received`; a second SIGINT stops at once.

    Use it in ``with``, or :meth:`catch` the signals and :meth:`restore` them.

    Args:
        answer: printed when the first signal comes, behind its name.
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
        """Note signals from here on."""
        self.received = None
        if sys.platform == "linux" and os.environ.keys() & {"ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID"}:
            # `accelerate launch` passes no signal on, torchrun not all: ask the kernel for a SIGTERM when it dies.
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        try:
            self._previous = {n: signal.signal(n, self._handle) for n in NOTED}
        except ValueError:  # in another thread than the main one: signals are somebody else's
            logger.warning("not in the main thread: signals will not stop this run cleanly")

    def restore(self) -> None:
        """Restore the handlers that the signals had before."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}

    def __enter__(self) -> "Interrupt":
        self.catch()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.restore()


def bound_waiting(seconds: float) -> None:
    """Set how long a process waits for another before it ends with an error, in every process group that exists now.

    DeepSpeed makes groups of its own, which the time-out given to the launcher does not reach.
    """
    from torch.distributed import distributed_c10d

    if torch.distributed.is_available() and torch.distributed.is_initialized():
        for group in list(distributed_c10d._world.pg_map):
            distributed_c10d._set_pg_timeout(timedelta(seconds=seconds), group)


class InterruptCallback(TrainerCallback):
    """Ends a run on SIGINT (Ctrl-C), SIGTERM or SIGUSR1: after the update, with a checkpoint. A second SIGINT stops at once."""

    def __init__(self) -> None:
        self.signals = Interrupt("finishing this update, then writing a checkpoint.")
        self.stopped = False

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.stopped = False
        self.signals.catch()
        bound_waiting(args.ddp_timeout)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        asked = torch.tensor(float(self.signals.received is not None), device=args.device)
        if args.world_size > 1:  # the signal may have reached one process only; all must stop after the same update
            torch.distributed.all_reduce(asked, op=torch.distributed.ReduceOp.MAX)
        if asked.item() and not self.stopped and state.global_step < state.max_steps:
            self.stopped = control.should_save = control.should_training_stop = True

    def restore(self) -> None:
        """Restore the handlers that the signals had before."""
        self.signals.restore()
