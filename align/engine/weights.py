"""The trained weights: by name, in a checkpoint, as a second set beside them, and as a moving average."""

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from diffusers.training_utils import EMAModel
from safetensors.torch import load_file, save_file
from transformers import Trainer, TrainerCallback

from align.parallel.sharding import gathered, whole_shape

EMA_WEIGHTS = "ema.safetensors"


def trained_parameters(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """Name to parameter, for everything that is trained."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def read_trained(parameters: Mapping[str, torch.Tensor], file: Path) -> dict[str, torch.Tensor]:
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


def load_trained(parameters: Mapping[str, torch.Tensor], file: Path) -> None:
    """Copy a checkpoint's tensors into ``parameters``, which are whole."""
    stored = read_trained(parameters, file)
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(stored[name])


class HeldWeights:
    """Other values of everything that ``model`` trains, whole on every process, which the model can carry for a while.

    They begin as the model's own. ``decay`` is that of the moving average which ``average.step`` makes of them.
    """

    def __init__(self, model: torch.nn.Module, decay: float = 0.0) -> None:
        self.model = model
        with gathered(self.parameters()):  # also of what ZeRO-3 shares out
            self.average = EMAModel(self.parameters(), decay=decay)

    def parameters(self) -> list[torch.nn.Parameter]:
        return list(trained_parameters(self.model).values())

    def _named(self) -> dict[str, torch.Tensor]:
        return dict(zip(trained_parameters(self.model), self.average.shadow_params, strict=True))

    @torch.no_grad()
    def follow(self, keep: float) -> None:
        """Become ``keep`` times themselves and 1 - ``keep`` times the model's present weights."""
        with gathered(self.parameters()):
            for held, parameter in zip(self.average.shadow_params, self.parameters(), strict=True):
                held.copy_(torch.lerp(parameter.to(held), held, keep))  # keep 0: the present weights, exactly

    def save(self, file: Path) -> None:
        """Write them into a checkpoint."""
        save_file({name: held.detach().cpu().contiguous() for name, held in self._named().items()}, file)

    def load(self, file: Path) -> None:
        """Read what :meth:`save` wrote; raises as :func:`read_trained`."""
        load_trained(self._named(), file)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The model carries them; its own weights come back afterwards."""
        with gathered(self.parameters(), write=True):
            self.average.store(self.parameters())
            self.average.copy_to(self.parameters())
        try:
            yield
        finally:
            with gathered(self.parameters(), write=True):
                self.average.restore(self.parameters())


class EMACallback(TrainerCallback):
    """Exponential moving average of the trained parameters, stored beside each checkpoint."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self.held: HeldWeights | None = None
        self.resumed_from: str | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.held = HeldWeights(self.trainer.model, args.ema_decay)
        if state.global_step:
            assert self.resumed_from is not None
            self.held.load(Path(self.resumed_from) / EMA_WEIGHTS)
            self.held.average.optimization_step = state.global_step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        assert self.held is not None
        with gathered(self.held.parameters()):
            self.held.average.step(self.held.parameters())

    def save(self, folder: Path) -> None:
        """Write the average into a checkpoint."""
        assert self.held is not None
        self.held.save(folder / EMA_WEIGHTS)

    def applied(self) -> AbstractContextManager[None]:
        """The model carries the average; its own weights come back afterwards."""
        return nullcontext() if self.held is None else self.held.applied()
