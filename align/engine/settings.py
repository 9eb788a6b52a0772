"""Settings that every algorithm here shares, over transformers' own, and what a setting says of itself."""

import json
import logging
from dataclasses import dataclass, field, fields
from functools import cache
from pathlib import Path
from typing import Any, get_type_hints

from transformers import TrainingArguments
from transformers.trainer_pt_utils import AcceleratorConfig

from align.engine.values import Bounds, wrong_kind
from align.parallel.sharding import check_launch, keep_zero3_from_loading
from align.sampling.rollout import SamplingPlan

logger = logging.getLogger(__name__)

#: numpy, which transformers seeds too, takes no larger one.
MAX_SEED = 2**32 - 1


class Help(str):
    """A field's line of ``--help``, which carries what else the field says of itself.

    transformers' parsers hand every other key of a field's metadata to argparse, which would refuse it.

    fixed_on_resume: it decides what an update is made of, so that a resumed run must not change it. mappings: the
    entries of the list may be mappings too, and one may stand alone. bounds: the numbers it may be.
    """

    fixed_on_resume: bool = False
    mappings: bool = False
    bounds: Bounds | None = None


def setting(
    default: Any,
    help: str,
    *,
    fixed_on_resume: bool = False,
    mappings: bool = False,
    least: float | None = None,
    most: float | None = None,
    above: float | None = None,
    below: float | None = None,
) -> Any:
    """Declare a dataclass field with all that there is to say of it. What its annotation says is checked without more.

    Args:
        default: its default; a list or a mapping is copied; ``dataclasses.MISSING`` where one must be given.
        help: its line of ``--help``.
        fixed_on_resume, mappings: see :class:`Help`.
        least, most, above, below: see :class:`Bounds`. None always passes where the annotation allows it.
    """
    line = Help(help)
    line.fixed_on_resume, line.mappings, line.bounds = fixed_on_resume, mappings, Bounds(least, most, above, below)
    if isinstance(default, (list, dict)):
        return field(default_factory=default.copy, metadata={"help": line})
    return field(default=default, metadata={"help": line})


def declared(settings: Any) -> list[tuple[str, Help]]:
    """List (name, help) of the fields that were declared by :func:`setting`."""
    found = [(f.name, f.metadata.get("help")) for f in fields(settings)]
    return [(name, help) for name, help in found if isinstance(help, Help)]


#: transformers' settings that say nothing of a flow model, and why.
_OF_LANGUAGE_MODELS = {
    "neftune_noise_alpha": "adds noise to the embeddings of a language model",
    "use_liger_kernel": "replaces layers of a language model",
    "label_smoothing_factor": "smooths the labels of a classifier",
}
#: The numbers that transformers' own settings may be, of which it checks none. Theirs of an optimizer are torch's.
_OF_TRANSFORMERS = {
    "num_train_epochs": Bounds(above=0),
    "weight_decay": Bounds(least=0),
    "adam_beta1": Bounds(least=0, below=1),
    "adam_beta2": Bounds(least=0, below=1),
    "adam_epsilon": Bounds(above=0),
    "max_grad_norm": Bounds(least=0),
    "warmup_steps": Bounds(least=0),
    "eval_steps": Bounds(least=0),
    "save_steps": Bounds(above=0),
    "per_device_eval_batch_size": Bounds(least=1),
    "dataloader_num_workers": Bounds(least=0),
    "dataloader_prefetch_factor": Bounds(least=1),
    "torch_empty_cache_steps": Bounds(least=1),
    "ddp_bucket_cap_mb": Bounds(above=0),
    "ddp_timeout": Bounds(above=0),
}


@cache
def kinds_of(settings: Any) -> dict[str, Any]:
    """Return the annotations of a class's settings, by their names: a parser of transformers leaves others in its fields."""
    hints = get_type_hints(settings)
    return {f.name: hints[f.name] for f in fields(settings) if f.init}


def check_settings(settings: Any) -> None:
    """Raise ValueError for the first value of another kind than its field's, or out of bounds, NaN and infinity included.

    A parser converts text alone: what a config file holds otherwise, and what Python passes, comes here as it is.
    """
    rules = dict(declared(settings))
    for name, kind in kinds_of(settings.__class__).items():
        value, rule = getattr(settings, name), rules.get(name, Help())
        wanted = wrong_kind(kind, value, rule.mappings)
        if wanted and not (value is None and name not in rules):  # transformers has defaults that are not of their kind
            raise ValueError(f"{name} must be {wanted}, found {value!r}")
        bounds = rule.bounds or _OF_TRANSFORMERS.get(name)
        if value is not None and bounds is not None and not bounds.hold(value):
            raise ValueError(f"{name} {bounds}, found {value}")


def check_mappings(args: TrainingArguments) -> None:
    """Raise ValueError for a text that is no mapping, where transformers takes one as JSON, or the name of a file of it."""
    for name in args._VALID_DICT_FIELDS:
        text = getattr(args, name)
        if not isinstance(text, str) or name in ("deepspeed", "fsdp_config"):  # DeepSpeed's own code reads more
            continue
        try:
            mapping = json.loads(text if text.startswith("{") or name.endswith("kwargs") else Path(text).read_text())
        except (OSError, ValueError) as error:
            raise ValueError(f"{name} must be a mapping, as JSON, found {text!r}: {error}") from error
        if not isinstance(mapping, dict):
            raise ValueError(f"{name} must be a mapping, as JSON, found {text!r}")
    known = {one.name for one in fields(AcceleratorConfig)}
    given = args.accelerator_config if isinstance(args.accelerator_config, dict) else {}
    for name in given.keys() - known:
        raise ValueError(f"accelerator_config has no {name!r}. There are: {', '.join(sorted(known))}")


def values_of(settings: Any, fixed_on_resume: bool) -> dict[str, Any]:
    """Return the values of this library's settings: those that a resume must not change, or the others."""
    return {
        name: getattr(settings, name) for name, rule in declared(settings) if rule.fixed_on_resume == fixed_on_resume
    }


@dataclass
class FlowConfig(TrainingArguments):
    """Training arguments that every algorithm here shares, over transformers' own."""

    learning_rate: float = setting(3e-4, "Initial learning rate.", fixed_on_resume=True, least=0)
    logging_steps: float = setting(1, "Log every this many optimizer updates.", above=0)
    seed: int = setting(42, "Of everything random in a run.", fixed_on_resume=True, least=0, most=MAX_SEED)
    data_seed: int | None = setting(
        None, "Of the order of the data. Default: seed.", fixed_on_resume=True, least=0, most=MAX_SEED
    )
    remove_unused_columns: bool = setting(False, "Must stay false: rewards take columns by name.")
    dataloader_pin_memory: bool = setting(False, "Rows are text and small: there is nothing to pin.")
    ddp_find_unused_parameters: bool | None = setting(False, "Every trainable parameter gets a gradient.")
    per_device_train_batch_size: int = setting(8, "Examples of one forward and backward on each process.", least=1)
    gradient_accumulation_steps: int = setting(1, "Forwards and backwards of one update.", least=1)
    ema_decay: float | None = setting(
        None,
        "Keep an exponential moving average of what is trained; evaluate and export it.",
        fixed_on_resume=True,
        above=0,
        below=1,
    )
    overwrite_output_dir: bool = setting(
        False, "Start afresh in an output_dir that holds checkpoints of an earlier run."
    )

    #: Settings of data and model, from a command line, that belong to the identity of the run as these here do.
    fixed_beside: dict[str, Any] = field(default_factory=dict, init=False, repr=False)
    free_beside: dict[str, Any] = field(default_factory=dict, init=False, repr=False)

    check_memory: bool = setting(
        True, "Stop before loading when weights, gradients and optimizer alone are more than there is memory for."
    )

    # Sampling.
    height: int = setting(512, "Pixels of a sampled image.", fixed_on_resume=True, above=0)
    width: int = setting(512, "Pixels of a sampled image.", fixed_on_resume=True, above=0)
    num_inference_steps: int = setting(30, "Denoising steps of a sample.", least=2)  # one step has no second sigma
    guidance_scale: float = setting(1.0, "True classifier-free guidance; acts above 1, at twice the forwards.", least=0)
    negative_prompt: str = setting(" ", "What guidance steers away from.", fixed_on_resume=True)
    rollout_batch_size: int = setting(16, "Images per forward while sampling.", least=1)

    # Held-out evaluation, by the ODE.
    num_generations_eval: int = setting(1, "Images per held-out prompt.", least=1)
    eval_seed: int = setting(1234, "Seed of the held-out images' noise.", fixed_on_resume=True)
    num_grid_prompts: int = setting(8, "Prompts on the sample grid.", least=0)
    max_failed_fraction: float = setting(
        0.1, "Share of a batch of images a reward may fail on before the run stops.", least=0, most=1
    )

    def __post_init__(self) -> None:
        check_settings(self)
        for name in ("adam_beta1", "adam_beta2"):
            setattr(self, name, float(getattr(self, name)))  # torch takes no 0 beside a 0.9
        if self.metric_for_best_model is None and (self.load_best_model_at_end or self.save_strategy == "best"):  # type: ignore[has-type]
            self.metric_for_best_model = (
                "eval_reward"  # transformers' would be the loss, which online trainers have not
            )
        if self.max_steps == 0 or self.max_steps < -1:
            raise ValueError(f"max_steps must be at least 1, or -1 for num_train_epochs, found {self.max_steps}")
        check_mappings(self)
        super().__post_init__()
        check_launch(self)
        keep_zero3_from_loading()
        self.neftune_noise_alpha = self.neftune_noise_alpha or None  # type: ignore[has-type]  # 0 would be set up
        for name, why in _OF_LANGUAGE_MODELS.items():
            if getattr(self, name):
                raise ValueError(f"{name} {why}, which is not trained here: leave it out")
        for name in ("dataloader_multiprocessing_context", "dataloader_persistent_workers"):
            if getattr(self, name) and not self.dataloader_num_workers:
                raise ValueError(f"{name} needs dataloader_num_workers of at least 1, found 0")
        if self.remove_unused_columns:
            raise ValueError("remove_unused_columns must be false: rewards and trainers take data columns by name")

    def check_evaluation(self, possible: bool) -> None:
        """Raise ValueError when evaluation is asked for and there is nothing to evaluate on."""
        if not possible and (self.eval_strategy != "no" or self.eval_on_start):
            raise ValueError(
                "eval_strategy is set and there is no held-out data: give --eval_dataset_name, or eval_strategy: no"
            )

    def check_best(self, rewards: bool, data: bool) -> None:
        """Make sure that the measure of the best checkpoint is one that there is.

        ``rewards``: whether samples of held-out prompts are scored; ``data``: whether there are held-out data, whose loss is
        then the default.

        Raises:
            ValueError: it is the reward, and nothing is scored; or nothing is evaluated before the end.
        """
        if self.save_strategy == "best" and self.eval_strategy == "no" and (rewards or data):
            raise ValueError(
                "save_strategy best saves after evaluations and eval_strategy is no: nothing would be saved. Set eval_strategy"
            )
        wanted = self.metric_for_best_model
        if wanted is not None and not rewards and not data and wanted not in ("reward", "eval_reward"):
            raise ValueError(
                f"metric_for_best_model {wanted!r} is not measured: there are no held-out data, and no samples are scored"
            )
        if wanted not in ("reward", "eval_reward") or rewards:
            return
        if not data:
            asked = "load_best_model_at_end" if self.load_best_model_at_end else "save_strategy best"
            raise ValueError(
                f"{asked}: the best checkpoint is chosen by eval_reward and no held-out samples are scored: give held-out "
                "prompts and rewards, or metric_for_best_model"
            )
        self.metric_for_best_model, self.greater_is_better = "eval_loss", False
        if self.process_index == 0:
            logger.warning("the best checkpoint is chosen by eval_loss: no held-out samples are scored")

    def eval_plan(self) -> SamplingPlan:
        """Return how held-out images are sampled: by the plain ODE."""
        return plan_of(self)

    def keeps_reference(self) -> bool:
        """Whether the model as it was before training is run beside it."""
        return False

    def full_copy(self) -> str | None:
        """Name the setting that keeps a second, full copy of what is trained on every process, if one does."""
        return f"ema_decay {self.ema_decay}" if self.ema_decay else None

    def order_seed(self) -> int:
        """Return the seed of the order of the data."""
        return self.seed if self.data_seed is None else self.data_seed

    def rows_per_update(self) -> int:
        """Return the rows of all processes that one update sees: batch size x accumulation x processes."""
        return self.per_device_train_batch_size * self.gradient_accumulation_steps * self.world_size


def plan_of(settings: Any) -> SamplingPlan:
    """Return the ODE plan that settings with these six names describe."""
    return SamplingPlan(
        height=settings.height,
        width=settings.width,
        num_inference_steps=settings.num_inference_steps,
        guidance_scale=settings.guidance_scale,
        negative_prompt=settings.negative_prompt,
        batch_size=settings.rollout_batch_size,
    )
