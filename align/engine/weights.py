"""The trained weights: by name, in a checkpoint, as a second set beside them, and as a moving average."""

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from diffusers.training_utils import EMAModel
from safetensors.torch import load_file, save_file
from torch.nn.utils import get_total_norm
from transformers import Trainer, TrainerCallback

from align.models.contract import NotFinite
from align.parallel.sharding import full_shape, gathered

#: In a checkpoint: the trained weights, and their moving average.
WEIGHTS, EMA_WEIGHTS = "model.safetensors", "ema.safetensors"


def trained_parameters(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """Return name to parameter for everything that is trained."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def read_trained(parameters: Mapping[str, torch.Tensor], file: Path) -> dict[str, torch.Tensor]:
    """Read a checkpoint's tensors, one for each of ``parameters``.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: naming the first tensor that does not fit.
    """
    if not file.is_file():
        raise FileNotFoundError(f"{file.parent} is no checkpoint of this library: it has no {file.name}")
    stored = load_file(file)
    for name in sorted(parameters.keys() ^ stored.keys()):
        where = "the checkpoint lacks" if name in parameters else "the model does not train"
        raise ValueError(f"checkpoint {file.parent} does not fit this run: {where} {name}")
    for name, parameter in parameters.items():
        if stored[name].shape != full_shape(parameter):
            raise ValueError(
                f"checkpoint {file.parent} does not fit this run: {name} is {tuple(stored[name].shape)} there and "
                f"{tuple(full_shape(parameter))} here (another LoRA rank, or another model)"
            )
    return stored


def load_trained(parameters: Mapping[str, torch.Tensor], file: Path) -> None:
    """Copy a checkpoint's tensors into ``parameters``, which are not sharded; raises what :func:`read_trained` raises."""
    stored = read_trained(parameters, file)
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(stored[name])


class WeightCopy:
    """A second set of everything that ``model`` trains, complete on every process, which the model can carry for a while.

    It begins as a copy of the model's own. ``decay`` is that of the moving average which ``average.step`` makes of it.
    """

    def __init__(self, model: torch.nn.Module, decay: float = 0.0) -> None:
        self.model = model
        with gathered(self.parameters()):  # also of what ZeRO-3 shards
            self.average = EMAModel(self.parameters(), decay=decay)

    def parameters(self) -> list[torch.nn.Parameter]:
        """Return the model's own trained parameters."""
        return list(trained_parameters(self.model).values())

    def _named(self) -> dict[str, torch.Tensor]:
        return dict(zip(trained_parameters(self.model), self.average.shadow_params, strict=True))

    @torch.no_grad()
    def follow(self, keep: float) -> None:
        """Become ``keep`` times itself plus 1 - ``keep`` times the model's present weights."""
        with gathered(self.parameters()):
            for copy, parameter in zip(self.average.shadow_params, self.parameters(), strict=True):
                copy.copy_(torch.lerp(parameter.to(copy), copy, keep))  # keep 0: the present weights, exactly

    def save(self, file: Path) -> None:
        """Write the copy into a checkpoint."""
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in self._named().items()}, file)

    def load(self, file: Path) -> None:
        """Read what :meth:`save` wrote; raises as :func:`read_trained`."""
        load_trained(self._named(), file)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Enter a context in which the model carries the copy; its own weights come back afterwards."""
        with gathered(self.parameters(), write=True):
            self.average.store(self.parameters())
            self.average.copy_to(self.parameters())
        try:
            yield
        finally:
            with gathered(self.parameters(), write=True):
                self.average.restore(self.parameters())


class FiniteCallback(TrainerCallback):
    """Ends a run, on every process and before it saves, after an update whose loss or weights are NaN or infinite."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.model = model
        self._losses: list[torch.Tensor] = []

    def note(self, loss: torch.Tensor) -> None:
        """Remember the loss of a micro-batch."""
        self._losses.append(loss.detach().float())

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # Of a weight that ZeRO-3 shards, this process's own piece.
        pieces = [getattr(p, "ds_tensor", p).detach() for p in trained_parameters(self.model).values()]
        norms = [get_total_norm([piece for piece in pieces if piece.numel()], float("inf")), *self._losses]
        wrong = 1.0 - torch.stack([norm.to(args.device).isfinite() for norm in norms]).all().float()
        self._losses = []
        if args.world_size > 1:
            torch.distributed.all_reduce(wrong, op=torch.distributed.ReduceOp.MAX)
        if wrong.item():
            raise NotFinite(f"after update {state.global_step} the loss or the weights are NaN or infinite")


class EMACallback(TrainerCallback):
    """Exponential moving average of the trained parameters, stored beside each checkpoint.

    ``resumed_from``: the checkpoint whose average it goes on from, set before training begins.
    """

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self.copy: WeightCopy | None = None
        self.resumed_from: Path | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.copy = WeightCopy(self.trainer.model, args.ema_decay)
        if state.global_step:
            assert self.resumed_from is not None
            self.load(self.resumed_from)
            self.copy.average.optimization_step = state.global_step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        assert self.copy is not None
        with gathered(self.copy.parameters()):
            self.copy.average.step(self.copy.parameters())

    def save(self, folder: Path) -> None:
        """Write the average into a checkpoint."""
        assert self.copy is not None
        self.copy.save(folder / EMA_WEIGHTS)

    def load(self, folder: Path) -> None:
        """Read the average of a checkpoint of this run."""
        assert self.copy is not None
        self.copy.load(folder / EMA_WEIGHTS)

    def applied(self) -> AbstractContextManager[None]:
        """Enter a context in which the model carries the average; its own weights come back afterwards."""
        return nullcontext() if self.copy is None else self.copy.applied()
