"""What the trainers share: ``transformers.Trainer`` over the denoiser of a :class:`~align.models.base.FlowModel`.

Checkpoints hold what is trained and nothing else; the run folder ends with weights that stock diffusers loads.
"""

import ctypes
import logging
import os
import shutil
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from datasets import Dataset
from diffusers.training_utils import EMAModel
from peft import PeftConfig
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import Trainer, TrainerCallback, TrainingArguments, set_seed
from transformers.trainer_utils import get_last_checkpoint

from align.models.base import FlowModel

logger = logging.getLogger(__name__)

PR_SET_PDEATHSIG = 1  # linux/prctl.h
#: What a finished run leaves, besides a full fine-tune's folder and the pictures.
FINISHED = ("pytorch_lora_weights.safetensors", "trainer_state.json")
WEIGHTS, EMA_WEIGHTS = "model.safetensors", "ema.safetensors"


@dataclass
class FlowConfig(TrainingArguments):
    """Training arguments that every algorithm here shares, over transformers' own."""

    learning_rate: float = field(default=3e-4, metadata={"help": "Initial learning rate."})
    logging_steps: float = field(default=1, metadata={"help": "Log every this many optimizer updates."})
    remove_unused_columns: bool = field(
        default=False, metadata={"help": "Must stay false: rewards take columns by name."}
    )
    dataloader_pin_memory: bool = field(default=False, metadata={"help": "Rows are text: there is nothing to pin."})
    ddp_find_unused_parameters: bool | None = field(
        default=False, metadata={"help": "Every trainable parameter gets a gradient."}
    )
    ema_decay: float | None = field(
        default=None,
        metadata={"help": "Keep an exponential moving average of what is trained; evaluate and export it."},
    )
    overwrite_output_dir: bool = field(
        default=False, metadata={"help": "Start afresh in an output_dir that holds checkpoints of an earlier run."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.ema_decay is not None and not 0 < self.ema_decay < 1:
            raise ValueError(f"ema_decay must lie inside (0, 1), found {self.ema_decay}")
        if self.remove_unused_columns:
            raise ValueError("remove_unused_columns must be false: rewards and trainers take data columns by name")

    def clear_earlier_run(self) -> None:
        """Remove what an earlier run left in output_dir, which would pass for this run's."""
        folder = Path(self.output_dir)
        for earlier in [*folder.glob("checkpoint-*"), folder / "samples", folder / "transformer"]:
            shutil.rmtree(earlier, ignore_errors=True)
        for name in (*FINISHED, "before_after.png", "reward_curve.png", "README.md"):
            (folder / name).unlink(missing_ok=True)

    def checkpoint_to_resume(self) -> str | None:
        """The folder that ``resume_from_checkpoint`` means (``true``: the last in output_dir), if any.

        Raises FileNotFoundError when there is none, FileExistsError when an earlier run would be overwritten.
        """
        last = get_last_checkpoint(self.output_dir) if Path(self.output_dir).is_dir() else None
        wanted = self.resume_from_checkpoint
        if wanted is None or str(wanted).lower() == "false":
            left = [Path(last).name] if last else [n for n in FINISHED if (Path(self.output_dir) / n).exists()]
            if left and not self.overwrite_output_dir:
                go_on = "--resume_from_checkpoint true to go on from it, " if last else ""
                raise FileExistsError(
                    f"{self.output_dir} holds {left[0]} of an earlier run: pass {go_on}--overwrite_output_dir true to "
                    "start afresh, or another --output_dir"
                )
            return None
        folder = last if str(wanted).lower() == "true" else str(wanted)
        if folder is None or not Path(folder).is_dir():
            raise FileNotFoundError(f"no checkpoint to resume from: {self.output_dir if folder is None else folder}")
        return folder


def rows_as_they_are(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Data collator: a batch is a list of data rows."""
    return rows


class FlowTrainer(Trainer):
    """A Trainer whose model is a flow model's transformer.

    Args:
        model: the flow model; its transformer is what is trained.
        args: training arguments.
        peft_config: attach this fresh adapter and train it. Without one, an adapter already loaded goes on, and a
            model without any is fine-tuned whole.
    """

    args: FlowConfig
    control: Any

    def __init__(
        self,
        model: FlowModel,
        args: FlowConfig,
        train_dataset: Dataset | None = None,
        eval_dataset: Dataset | dict[str, Dataset] | None = None,
        peft_config: PeftConfig | None = None,
        callbacks: list[TrainerCallback] | None = None,
    ) -> None:
        self.flow = model
        self.resumed_from: str | None = None
        self.interrupt = InterruptCallback()
        if peft_config is not None and model.adapter:
            raise ValueError("the model has an adapter already: give no peft_config, or load the model without it")
        set_seed(args.seed)  # before the adapter's initial weights are drawn, on every process alike
        dead = model.add_lora(peft_config) if peft_config is not None else [] if model.adapter else model.unfreeze()
        if dead:
            logger.warning("not trained, because no gradient can reach them: %s", ", ".join(dead))
        transformer = cast(Any, model.transformer)
        # What transformers calls by these names, diffusers has by others.
        transformer.activation_checkpointing_enable = lambda **_: transformer.enable_gradient_checkpointing()
        transformer.config.to_json_string = transformer.to_json_string
        super().__init__(
            model=model.transformer,
            args=args,
            data_collator=rows_as_they_are,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            callbacks=[self.interrupt, *(callbacks or [])],
        )
        model.device = self.accelerator.device
        self.ema = EMACallback(self) if args.ema_decay else None
        if self.ema:
            self.add_callback(self.ema)

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> Any:
        last = get_last_checkpoint(self.args.output_dir) if resume_from_checkpoint is True else resume_from_checkpoint
        self.resumed_from = str(last) if last else None
        try:
            return super().train(resume_from_checkpoint=self.resumed_from, **kwargs)
        finally:
            self.interrupt.restore()

    @property
    def interrupted(self) -> bool:
        """Whether a signal ended the run early."""
        return self.interrupt.stopped

    def trained_parameters(self) -> dict[str, torch.nn.Parameter]:
        """Name to parameter, for everything that is trained."""
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    def averaged_weights(self) -> Any:
        """Context in which the model carries the moving average, if the run keeps one."""
        return self.ema.applied() if self.ema else nullcontext()

    # -- checkpoints: what is trained, in safetensors ---------------------------------------------------------------

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        if not self.args.should_save:
            return
        folder = Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        state = self._trained_state(state_dict)
        save_file(state, folder / WEIGHTS, metadata={"format": "pt"})
        if self.ema:
            self.ema.save(folder)
        if self.flow.adapter:  # so that every checkpoint can be tried in stock diffusers
            self.flow.save(str(folder), state)

    def _trained_state(self, state_dict: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
        names = self.trained_parameters()
        source = names if state_dict is None else state_dict
        return {name: source[name].detach().cpu().contiguous() for name in names}

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: torch.nn.Module | None = None) -> None:
        load_trained(self.trained_parameters(), Path(resume_from_checkpoint) / WEIGHTS)

    def export(self) -> None:
        """Write to ``output_dir`` what stock diffusers loads: the LoRA, or the whole transformer."""
        state = self.accelerator.get_state_dict(self.model_wrapped) if self.is_deepspeed_enabled else None
        with self.averaged_weights():
            if self.args.should_save:
                self.flow.save(self.args.output_dir, self._trained_state(state))


def load_trained(parameters: dict[str, torch.nn.Parameter], file: Path) -> None:
    """Copy a checkpoint's tensors into ``parameters``; raises ValueError naming the first that does not fit."""
    if not file.is_file():
        raise FileNotFoundError(f"{file.parent} is no checkpoint of this library: it has no {file.name}")
    stored = load_file(file)
    for name in sorted(parameters.keys() ^ stored.keys()):
        where = "the checkpoint lacks" if name in parameters else "the model does not train"
        raise ValueError(f"checkpoint {file.parent} does not fit this run: {where} {name}")
    for name, parameter in parameters.items():
        if stored[name].shape != parameter.shape:
            raise ValueError(
                f"checkpoint {file.parent} does not fit this run: {name} is {tuple(stored[name].shape)} there and "
                f"{tuple(parameter.shape)} here (another LoRA rank, or another model)"
            )
        with torch.no_grad():
            parameter.copy_(stored[name])


class EMACallback(TrainerCallback):
    """Exponential moving average of the trained parameters, stored beside each checkpoint."""

    def __init__(self, trainer: FlowTrainer) -> None:
        self.trainer = trainer
        self.average: EMAModel | None = None

    def _parameters(self) -> list[torch.nn.Parameter]:
        return list(self.trainer.trained_parameters().values())

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.average = EMAModel(self._parameters(), decay=args.ema_decay)
        if state.global_step:
            assert self.trainer.resumed_from is not None
            folder = Path(self.trainer.resumed_from)
            shadow = dict(zip(self.trainer.trained_parameters(), self.average.shadow_params, strict=True))
            load_trained(shadow, folder / EMA_WEIGHTS)
            self.average.optimization_step = state.global_step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        assert self.average is not None
        self.average.step(self._parameters())

    def save(self, folder: Path) -> None:
        """Write the average into a checkpoint."""
        assert self.average is not None
        names = self.trainer.trained_parameters()
        shadow = {n: p.detach().cpu().contiguous() for n, p in zip(names, self.average.shadow_params, strict=True)}
        save_file(shadow, folder / EMA_WEIGHTS)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The model carries the average; its own weights come back afterwards."""
        if self.average is None:
            yield
            return
        self.average.store(self._parameters())
        self.average.copy_to(self._parameters())
        try:
            yield
        finally:
            self.average.restore(self._parameters())


class InterruptCallback(TrainerCallback):
    """SIGINT (Ctrl-C) and SIGTERM: finish the update, write a checkpoint, stop. A second SIGINT stops at once."""

    def __init__(self) -> None:
        self.received: str | None = None
        self.stopped = False
        self._previous: dict[int, Any] = {}

    def _handle(self, number: int, frame: Any) -> None:
        if self.received and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = signal.Signals(number).name
        # Not print: the signal may have come in the middle of one.
        os.write(1, f"\n{self.received}: finishing this update, then writing a checkpoint.\n".encode())

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.received, self.stopped = None, False
        if sys.platform == "linux" and "ACCELERATE_MIXED_PRECISION" in os.environ:
            # `accelerate launch` passes no signal on: ask the kernel for a SIGTERM when it dies.
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        try:
            self._previous = {n: signal.signal(n, self._handle) for n in (signal.SIGINT, signal.SIGTERM)}
        except ValueError:  # training in another thread than the main one: signals are somebody else's
            logger.warning("training outside the main thread: signals will not write a checkpoint")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        asked = torch.tensor(float(self.received is not None), device=args.device)
        if args.world_size > 1:  # the signal may have reached one process only; all must stop after the same update
            torch.distributed.all_reduce(asked, op=torch.distributed.ReduceOp.MAX)
        if asked.item() and not self.stopped and state.global_step < state.max_steps:
            self.stopped = control.should_save = control.should_training_stop = True

    def restore(self) -> None:
        """Give the signals back to whoever had them."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}
