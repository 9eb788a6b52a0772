"""What training keeps in memory: sums made before a weight is read.

Of one process, in bytes, from numbers of parameters alone. Without DeepSpeed what is trained stays in float32, beside
the copies that autocast makes of it for half precision; DeepSpeed keeps the whole transformer in half precision, and
float32 for its optimizer. Not counted: buffers of the communication, CUDA's own memory, fragments, and a picture's way
through the VAE.
"""

from dataclasses import dataclass, replace
from typing import Any

from torch import nn

GIB = 2**30
#: Parameters whose gradients ZeRO-3 turns to float32 at a time (DeepSpeed's `sub_group_size`).
SUB_GROUP = 10**9
#: Values that the backward of one block needs, per token and channel of its stream; a test measures them.
KEPT_BY_BLOCK = {"full": 28.2, "LoRA": 17.3}


@dataclass(frozen=True)
class Counts:
    """Numbers of parameters.

    transformer: all, an adapter's included. trained: of these. block: of the largest block. encoders: of text encoder
    and VAE. layers, width: blocks, and channels of a token between them. adapter: whether one is what is trained.
    """

    transformer: int
    trained: int
    block: int
    encoders: int
    layers: int
    width: int
    adapter: bool


def count(model: Any) -> Counts:
    """The numbers of a :class:`~align.models.qwen_image.QwenImage`, also of one without weights."""

    def size(module: nn.Module) -> int:
        return sum(p.numel() for p in module.parameters())

    transformer, blocks = model.transformer, model.transformer.transformer_blocks
    return Counts(
        transformer=size(transformer),
        trained=sum(p.numel() for p in transformer.parameters() if p.requires_grad),
        block=max(size(block) for block in blocks),
        encoders=size(model.pipeline.text_encoder) + size(model.pipeline.vae),
        layers=len(blocks),
        width=transformer.inner_dim,
        adapter=model.adapter,
    )


@dataclass(frozen=True)
class Setup:
    """How a run is launched.

    stage: of ZeRO, 0 without DeepSpeed. dtype: bytes of a loaded weight. half: computed in 16 bits. moments: see MOMENTS.
    reference: a whole frozen copy is kept. average: a moving average is. offload: text encoder and VAE are away while
    they do not work. to_host: the shares of weights, gradients and optimizer lie in the host's memory. tokens: of image
    and text in all rows of a micro-batch, those of guidance too. checkpointing: of activations.
    """

    stage: int = 0
    processes: int = 1
    dtype: int = 4
    half: bool = True
    moments: int = 2
    reference: bool = False
    average: bool = False
    offload: bool = False
    to_host: bool = False
    tokens: int = 0
    checkpointing: bool = True


@dataclass(frozen=True)
class Need:
    """Bytes on a process's device, by what they are for; ``host``: beside them, in the host's memory."""

    weights: float
    gradients: float
    optimizer: float
    copies: float
    encoders: float
    activations: float
    host: float = 0.0

    @property
    def lasting(self) -> float:
        """What is there whatever is computed."""
        return self.weights + self.gradients + self.optimizer + self.copies + self.encoders

    @property
    def total(self) -> float:
        """Everything at once."""
        return self.lasting + self.activations


def need(counts: Counts, setup: Setup) -> Need:
    """What a process keeps."""
    weights, gradients, optimizer = (_with_deepspeed if setup.stage else _alone)(counts, setup)
    gathered = 2.0 * counts.block * _held(setup) if setup.stage == 3 else 0.0  # weights and gradients of a block
    encoders, copies, host = float(counts.encoders * setup.dtype), 0.0, 0.0
    if setup.reference and not counts.adapter:
        copies += counts.transformer * setup.dtype / (setup.processes if setup.stage == 3 else 1)
    if setup.average:
        copies += 4 * counts.trained
    if setup.to_host:
        host, weights, gradients, optimizer = weights + gradients + optimizer, 0.0, 0.0, 0.0
    if setup.offload:
        host, encoders = host + encoders, 0.0
    kept = KEPT_BY_BLOCK["LoRA" if counts.adapter else "full"]
    blocks = counts.layers + kept if setup.checkpointing else counts.layers * kept
    activations = setup.tokens * counts.width * (2 if setup.half else 4) * blocks
    return Need(weights + gathered, gradients, optimizer, copies, encoders, activations, host)


def _alone(counts: Counts, setup: Setup) -> tuple[float, float, float]:
    """Weights, gradients and optimizer without DeepSpeed; DDP's buckets are of the gradients' size."""
    weights = (counts.transformer - counts.trained) * setup.dtype + counts.trained * (6 if setup.half else 4)
    buckets = 2 if setup.processes > 1 else 1
    return float(weights), 4.0 * counts.trained * buckets, 4.0 * setup.moments * counts.trained


def _held(setup: Setup) -> int:
    """Bytes of a weight while DeepSpeed has it."""
    return 2 if setup.half else setup.dtype


def _with_deepspeed(counts: Counts, setup: Setup) -> tuple[float, float, float]:
    """A process's share of weights, gradients and optimizer."""
    share = counts.trained / setup.processes
    weights = _held(setup) * counts.transformer / (setup.processes if setup.stage == 3 else 1)
    gradients = _held(setup) * (share if setup.stage > 1 else counts.trained)
    if setup.half:  # and in float32 while the optimizer steps
        gradients += 4 * (min(share, SUB_GROUP) if setup.stage == 3 else share)
    return weights, gradients, 4 * (1 + setup.moments) * share


#: The shipped launcher configs, from the one that shares out nothing to the one that shares out most.
LAUNCHERS: dict[str, dict[str, Any]] = {
    "ddp": {"stage": 0, "to_host": False},
    "zero1": {"stage": 1, "to_host": False},
    "zero2": {"stage": 2, "to_host": False},
    "zero3": {"stage": 3, "to_host": False},
    "zero3_offload": {"stage": 3, "to_host": True},
}


def check_fits(counts: Counts, setup: Setup, there: float, on_host: int = 0) -> None:
    """Raise ValueError with the sum and what would fit, when a run keeps more than ``there`` bytes.

    on_host: so many processes share them, because these compute on the CPU; 0 where each has a device with as many.
    """
    wanted = _kept(counts, setup, on_host)
    if wanted <= there:
        return
    found = need(counts, setup)
    named = {
        "weights": found.weights,
        "gradients": found.gradients,
        "optimizer": found.optimizer,
        "copies of the model": found.copies,
        "text encoder and VAE": found.encoders,
        "kept off the device": found.host if on_host else 0,
    }
    told = ", ".join(f"{name} {value / GIB:.1f}" for name, value in named.items() if value)
    where = f"each of {setup.processes} GPUs" if not on_host else "this machine"
    where += f", for {on_host} processes" if on_host > 1 else ""
    raise ValueError(
        f"too little memory: {'a LoRA' if counts.adapter else 'a full fine-tune'} of this transformer of "
        f"{counts.transformer / 1e9:.1f}e9 parameters keeps {wanted / GIB:.1f} GiB on {where} (of a process: {told}; "
        f"activations come on top), and there are {there / GIB:.1f}. {_what_fits(counts, setup, there, on_host)}. To go "
        "on all the same: --check_memory false"
    )


def _kept(counts: Counts, setup: Setup, on_host: int) -> float:
    """Bytes on a process's device, or, of all processes, in the host's memory."""
    found = need(counts, setup)
    if not on_host:
        return found.lasting
    shared = (counts.transformer - counts.trained + counts.encoders) * setup.dtype
    return shared + on_host * max(0.0, found.lasting + found.host - shared)


def _what_fits(counts: Counts, setup: Setup, there: float, on_host: int) -> str:
    """The least changes of a run that would make it fit."""
    away = replace(setup, offload=True)
    tries = [("--offload true", away)]
    tries += [
        (f"--config_file configs/accelerate/{name}.yaml --offload true", replace(away, **stage))
        for name, stage in LAUNCHERS.items()
        if stage["stage"]
    ]
    if setup.average and not counts.adapter:  # which ZeRO-3 does not shard
        tries = [(said, other) for said, other in tries if other.stage < 3]
    whole = [] if on_host else [said for said, other in tries if _kept(counts, other, 0) <= there]
    # Of low rank, an adapter is nearly nothing.
    lora = _kept(replace(counts, trained=0, adapter=True), replace(away, dtype=2), on_host) <= there
    fitting = whole[:1] + ["a LoRA: --use_peft true --dtype bfloat16 --offload true"] * lora
    return "What would fit: " + ", or ".join(fitting) if fitting else "It takes a machine with more memory"
