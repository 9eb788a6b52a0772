"""What the trainers do at the Trainer's hooks: a moving average of the weights, and stopping on a signal."""

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from diffusers.training_utils import EMAModel
from safetensors.torch import load_file, save_file
from transformers import Trainer, TrainerCallback

from align.sharding import gathered, whole_shape
from align.signals import Interrupt

EMA_WEIGHTS = "ema.safetensors"


def trained_parameters(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """Name to parameter, for everything that is trained."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def read_trained(parameters: dict[str, torch.nn.Parameter], file: Path) -> dict[str, torch.Tensor]:
    """A checkpoint's tensors, one for each of ``parameters``; raises ValueError naming the first that does not fit."""
    if not file.is_file():
        raise FileNotFoundError(f"{file.parent} is no checkpoint of this library: it has no {file.name}")
    stored = load_file(file)
    for name in sorted(parameters.keys() ^ stored.keys()):
        where = "the checkpoint lacks" if name in parameters else "the model does not train"
        raise ValueError(f"checkpoint {file.parent} does not fit this run: {where} {name}")
    for name, parameter in parameters.items():
        if stored[name].shape != whole_shape(parameter):
            raise ValueError(
                f"checkpoint {file.parent} does not fit this run: {name} is {tuple(stored[name].shape)} there and "
                f"{tuple(whole_shape(parameter))} here (another LoRA rank, or another model)"
            )
    return stored


def load_trained(parameters: dict[str, torch.nn.Parameter], file: Path) -> None:
    """Copy a checkpoint's tensors into ``parameters``, which are whole."""
    stored = read_trained(parameters, file)
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(stored[name])


class EMACallback(TrainerCallback):
    """Exponential moving average of the trained parameters, stored beside each checkpoint."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self.average: EMAModel | None = None
        self.resumed_from: str | None = None

    def _parameters(self) -> list[torch.nn.Parameter]:
        return list(trained_parameters(self.trainer.model).values())

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        with gathered(self._parameters()):  # the average is whole on every process, also of what ZeRO-3 shares out
            self.average = EMAModel(self._parameters(), decay=args.ema_decay)
        if state.global_step:
            assert self.resumed_from is not None
            folder = Path(self.resumed_from)
            shadow = dict(zip(trained_parameters(self.trainer.model), self.average.shadow_params, strict=True))
            load_trained(shadow, folder / EMA_WEIGHTS)
            self.average.optimization_step = state.global_step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        assert self.average is not None
        with gathered(self._parameters()):
            self.average.step(self._parameters())

    def save(self, folder: Path) -> None:
        """Write the average into a checkpoint."""
        assert self.average is not None
        names = trained_parameters(self.trainer.model)
        shadow = {n: p.detach().cpu().contiguous() for n, p in zip(names, self.average.shadow_params, strict=True)}
        save_file(shadow, folder / EMA_WEIGHTS)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The model carries the average; its own weights come back afterwards."""
        if self.average is None:
            yield
            return
        with gathered(self._parameters(), write=True):
            self.average.store(self._parameters())
            self.average.copy_to(self._parameters())
        try:
            yield
        finally:
            with gathered(self._parameters(), write=True):
                self.average.restore(self._parameters())


def bound_waiting(seconds: float) -> None:
    """A process that waits longer for another one ends with an error: in every process group that there is now.

    DeepSpeed makes groups of its own, which the time-out given to the launcher does not reach.
    """
    from torch.distributed import distributed_c10d

    if torch.distributed.is_available() and torch.distributed.is_initialized():
        for group in list(distributed_c10d._world.pg_map):
            distributed_c10d._set_pg_timeout(timedelta(seconds=seconds), group)


class InterruptCallback(TrainerCallback):
    """SIGINT (Ctrl-C), SIGTERM, SIGUSR1: finish the update, write a checkpoint, stop. A second SIGINT stops at once."""

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
        """Give the signals back to whoever had them."""
        self.signals.restore()
