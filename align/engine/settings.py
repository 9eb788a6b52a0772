"""Settings that every algorithm here shares, over transformers' own: what a run keeps, and how it shows samples."""

import logging
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

from transformers import TrainingArguments

from align.engine import checkpoints
from align.parallel.sharding import keep_models_whole
from align.sampling.rollout import SamplingPlan

logger = logging.getLogger(__name__)

#: What a finished run leaves, besides a full fine-tune's folder and the pictures.
FINISHED = ("pytorch_lora_weights.safetensors", "trainer_state.json")


def setting(default: Any, help: str) -> Any:
    """A dataclass field with its line of ``--help``."""
    return field(default=default, metadata={"help": help})


@dataclass
class FlowConfig(TrainingArguments):
    """Training arguments that every algorithm here shares, over transformers' own."""

    learning_rate: float = setting(3e-4, "Initial learning rate.")
    logging_steps: float = setting(1, "Log every this many optimizer updates.")
    remove_unused_columns: bool = setting(False, "Must stay false: rewards take columns by name.")
    dataloader_pin_memory: bool = setting(False, "Rows are text and small: there is nothing to pin.")
    ddp_find_unused_parameters: bool | None = setting(False, "Every trainable parameter gets a gradient.")
    ema_decay: float | None = setting(
        None, "Keep an exponential moving average of what is trained; evaluate and export it."
    )
    overwrite_output_dir: bool = setting(
        False, "Start afresh in an output_dir that holds checkpoints of an earlier run."
    )

    check_memory: bool = setting(
        True, "Stop before loading when weights, gradients and optimizer alone are more than there is memory for."
    )

    # Sampling.
    height: int = setting(512, "Pixels of a sampled image.")
    width: int = setting(512, "Pixels of a sampled image.")
    num_inference_steps: int = setting(30, "Denoising steps of a sample.")
    guidance_scale: float = setting(1.0, "True classifier-free guidance; acts above 1, at twice the forwards.")
    negative_prompt: str = setting(" ", "What guidance steers away from.")
    rollout_batch_size: int = setting(16, "Images per forward while sampling.")

    # Held-out evaluation, by the ODE.
    num_generations_eval: int = setting(1, "Images per held-out prompt.")
    eval_seed: int = setting(1234, "Seed of the held-out images' noise.")
    num_grid_prompts: int = setting(8, "Prompts on the sample grid.")
    max_failed_fraction: float = setting(0.1, "Share of a batch of images a reward may fail on before the run stops.")

    def __post_init__(self) -> None:
        super().__post_init__()
        keep_models_whole()
        if self.ema_decay is not None and not 0 < self.ema_decay < 1:
            raise ValueError(f"ema_decay must lie inside (0, 1), found {self.ema_decay}")
        if self.remove_unused_columns:
            raise ValueError("remove_unused_columns must be false: rewards and trainers take data columns by name")
        self.check_range("max_failed_fraction", 0, 1)
        self.check_least("num_inference_steps", 2)  # one step has no second sigma
        for name in ("rollout_batch_size", "num_generations_eval", "gradient_accumulation_steps"):
            self.check_least(name, 1)
        self.check_least("per_device_train_batch_size", 1)

    # A config file's values pass the parser unchecked; these say what was found.

    def check_choices(self, **choices: Any) -> None:
        """Raise ValueError for a setting that is none of its Literal's values."""
        for name, literal in choices.items():
            if getattr(self, name) not in get_args(literal):
                raise ValueError(f"{name} must be one of {', '.join(get_args(literal))}, found {getattr(self, name)!r}")

    def check_least(self, name: str, least: float) -> None:
        """Raise ValueError for a number below ``least``; None passes."""
        if getattr(self, name) is not None and getattr(self, name) < least:
            raise ValueError(f"{name} must be at least {least}, found {getattr(self, name)}")

    def check_positive(self, *names: str) -> None:
        """Raise ValueError for a number that is not above 0; None passes."""
        for name in names:
            if getattr(self, name) is not None and not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, found {getattr(self, name)}")

    def check_range(self, name: str, low: float, high: float) -> None:
        """Raise ValueError for a number outside [low, high]."""
        if not low <= getattr(self, name) <= high:
            raise ValueError(f"{name} must lie in [{low}, {high}], found {getattr(self, name)}")

    def check_evaluation(self, possible: bool) -> None:
        """Raise ValueError when evaluation is asked for and there is nothing to evaluate on."""
        if not possible and (self.eval_strategy != "no" or self.eval_on_start):
            raise ValueError(
                "eval_strategy is set and there is no held-out data: give --eval_dataset_name, or eval_strategy: no"
            )

    def eval_plan(self) -> SamplingPlan:
        """How held-out images are sampled: the plain ODE."""
        return SamplingPlan(
            height=self.height,
            width=self.width,
            num_inference_steps=self.num_inference_steps,
            guidance_scale=self.guidance_scale,
            negative_prompt=self.negative_prompt,
            batch_size=self.rollout_batch_size,
        )

    def clear_earlier_run(self) -> None:
        """Remove what an earlier run left in output_dir, which would pass for this run's."""
        folder = Path(self.output_dir)
        for earlier in [*checkpoints.checkpoints(folder), folder / checkpoints.UNFINISHED]:
            shutil.rmtree(earlier, ignore_errors=True)
        for earlier in (folder / "samples", folder / "rollouts", folder / "transformer"):
            shutil.rmtree(earlier, ignore_errors=True)
        for name in (*FINISHED, "before_after.png", "reward_curve.png", "README.md"):
            (folder / name).unlink(missing_ok=True)

    def keeps_reference(self) -> bool:
        """Whether the model as it was before training is run beside it."""
        return False

    def whole_copy(self) -> str | None:
        """Which of these settings keeps a second copy of what is trained, whole on every process, if any does."""
        return f"ema_decay {self.ema_decay}" if self.ema_decay else None

    def rows_per_update(self) -> int:
        """Rows of all processes that one update sees: per_device_train_batch_size x accumulation x processes."""
        return self.per_device_train_batch_size * self.gradient_accumulation_steps * self.world_size

    def dealing(self) -> dict[str, Any]:
        """What decides what an update is made of: the same when a run is resumed, or it is another run."""
        return {checkpoints.ROWS_PER_UPDATE: self.rows_per_update()}

    def check_batch(self, folder: Path) -> None:
        """Raise ValueError, with values that would do, when an update would see other rows than the checkpoint's did."""
        then, now = checkpoints.stored_dealing(folder).get(checkpoints.ROWS_PER_UPDATE), self.rows_per_update()
        if then in (None, now):
            return
        size, accumulation, world = self.per_device_train_batch_size, self.gradient_accumulation_steps, self.world_size
        ways = []
        if then % (accumulation * world) == 0:
            ways.append(f"--per_device_train_batch_size {then // (accumulation * world)}")
        if then % (size * world) == 0:
            ways.append(f"--gradient_accumulation_steps {then // (size * world)}")
        if then % (size * accumulation) == 0:
            ways.append(f"--num_processes {then // (size * accumulation)}")
        if not ways and then % world == 0:
            ways.append(f"--per_device_train_batch_size {then // world} --gradient_accumulation_steps 1")
        if not ways:
            ways.append(f"a number of processes that divides {then}")
        raise ValueError(
            f"per_device_train_batch_size {size} x gradient_accumulation_steps {accumulation} x {world} processes = {now} "
            f"rows an update, and it was {then} when {folder} was written: resume with {' or '.join(ways)}"
        )

    def checkpoint_to_resume(self) -> str | None:
        """The folder that ``resume_from_checkpoint`` means (``true``: the last whole one in output_dir), if any.

        ``true`` without any checkpoint starts afresh: so does a run that is started again after it died early.

        Raises as :func:`align.engine.checkpoints.find`, and FileExistsError when an earlier run would be overwritten.
        """
        wanted = self.resume_from_checkpoint
        resume = wanted is not None and str(wanted).lower() != "false"
        if resume:
            folder = checkpoints.find(str(self.output_dir), str(wanted), say=self.process_index == 0)
            if folder is not None:
                return str(folder)
        there = checkpoints.checkpoints(str(self.output_dir))
        left = [there[0].name] if there else [n for n in FINISHED if (Path(str(self.output_dir)) / n).exists()]
        if left and not self.overwrite_output_dir:
            go_on = "--resume_from_checkpoint true to go on from it, " if there else ""
            raise FileExistsError(
                f"{self.output_dir} holds {left[0]} of an earlier run: pass {go_on}--overwrite_output_dir true to "
                "start afresh, or another --output_dir"
            )
        if resume and self.process_index == 0:
            logger.warning("%s holds no checkpoint to resume from yet: starting afresh", self.output_dir)
        return None
