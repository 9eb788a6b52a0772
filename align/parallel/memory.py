"""What training keeps in memory: sums made before a weight is read.

They count the bytes of one process, from numbers of parameters alone. Without DeepSpeed what is trained stays in
float32, beside the copies that autocast makes of it for half precision; DeepSpeed keeps the whole transformer in half
precision, and float32 for its optimizer. Not counted: buffers of the communication, CUDA's own memory, fragments, and
an image's way through the VAE.
"""

from dataclasses import dataclass, replace
from typing import Any

GIB = 2**30
#: Parameters whose gradients ZeRO-3 turns to float32 at a time (DeepSpeed's `sub_group_size`).
SUB_GROUP = 10**9


@dataclass(frozen=True)
class Counts:
    """Numbers of parameters.

    transformer: all of the transformer's, an adapter's included. trained: those of them that are trained. block: those of
    the largest block. encoders: those of text encoder and VAE. layers: number of blocks. width: channels of a token
    between blocks. kept_by_block: values that the backward of one block needs, per token and channel. adapter: whether an
    adapter is what is trained.
    """

    transformer: int
    trained: int
    block: int
    encoders: int
    layers: int
    width: int
    kept_by_block: float
    adapter: bool


@dataclass(frozen=True)
class Setup:
    """How a run is launched, and what it keeps.

    stage: ZeRO stage, 0 without DeepSpeed. dtype: bytes of a loaded weight. half: computed in 16 bits. moments: float32
    numbers that the optimizer keeps for each trained parameter. reference: a frozen copy of a full fine-tune is kept.
    average: a moving average is kept. offload: text encoder and VAE leave the device while they do not work. to_host:
    the shares of weights, gradients and optimizer lie in the host's memory. tokens: image and text tokens of all rows of
    a micro-batch, those of guidance included. checkpointing: activations are recomputed.
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
class MemoryUse:
    """Bytes on one process's device by purpose, and in the host's memory (``host``)."""

    weights: float
    gradients: float
    optimizer: float
    copies: float
    encoders: float
    activations: float
    host: float = 0.0

    @property
    def lasting(self) -> float:
        """Bytes that stay for the whole run."""
        return self.weights + self.gradients + self.optimizer + self.copies + self.encoders

    @property
    def total(self) -> float:
        """Bytes at the largest moment of an update."""
        return self.lasting + self.activations


def memory_use(counts: Counts, setup: Setup) -> MemoryUse:
    """Sum up what one process keeps."""
    weights, gradients, optimizer = (_with_deepspeed if setup.stage else _without_deepspeed)(counts, setup)
    gathered = (
        2.0 * counts.block * _weight_bytes(setup) if setup.stage == 3 else 0.0
    )  # weights and gradients of a block
    encoders, copies, host = float(counts.encoders * setup.dtype), 0.0, 0.0
    if setup.reference and not counts.adapter:
        copies += counts.transformer * setup.dtype / (setup.processes if setup.stage == 3 else 1)
    if setup.average:
        copies += 4 * counts.trained
    if setup.to_host:
        host, weights, gradients, optimizer = weights + gradients + optimizer, 0.0, 0.0, 0.0
    if setup.offload:
        host, encoders = host + encoders, 0.0
    kept = counts.kept_by_block
    blocks = counts.layers + kept if setup.checkpointing else counts.layers * kept
    activations = setup.tokens * counts.width * (2 if setup.half else 4) * blocks
    return MemoryUse(weights + gathered, gradients, optimizer, copies, encoders, activations, host)


def _without_deepspeed(counts: Counts, setup: Setup) -> tuple[float, float, float]:
    """Return weights, gradients and optimizer without DeepSpeed; DDP's buckets are as large as the gradients."""
    weights = (counts.transformer - counts.trained) * setup.dtype + counts.trained * (6 if setup.half else 4)
    buckets = 2 if setup.processes > 1 else 1
    return float(weights), 4.0 * counts.trained * buckets, 4.0 * setup.moments * counts.trained


def _weight_bytes(setup: Setup) -> int:
    """Return the bytes of one weight under DeepSpeed."""
    return 2 if setup.half else setup.dtype


def _with_deepspeed(counts: Counts, setup: Setup) -> tuple[float, float, float]:
    """Return one process's share of weights, gradients and optimizer."""
    share = counts.trained / setup.processes
    weights = _weight_bytes(setup) * counts.transformer / (setup.processes if setup.stage == 3 else 1)
    gradients = _weight_bytes(setup) * (share if setup.stage > 1 else counts.trained)
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


def check_fits(counts: Counts, setup: Setup, available: float, processes_sharing: int = 0) -> None:
    """Raise ValueError with the sum and what would fit, when a run keeps more than ``available`` bytes.

    processes_sharing: the number of processes that share the bytes, because these compute on the CPU; 0 where each
    process has a device with as many bytes.
    """
    wanted = _kept_bytes(counts, setup, processes_sharing)
    if wanted <= available:
        return
    use = memory_use(counts, setup)
    by_purpose = {
        "weights": use.weights,
        "gradients": use.gradients,
        "optimizer": use.optimizer,
        "copies of the model": use.copies,
        "text encoder and VAE": use.encoders,
        "kept off the device": use.host if processes_sharing else 0,
    }
    listed = ", ".join(f"{purpose} {value / GIB:.1f}" for purpose, value in by_purpose.items() if value)
    where = f"each of {setup.processes} GPUs" if not processes_sharing else "this machine"
    where += f", for {processes_sharing} processes" if processes_sharing > 1 else ""
    raise ValueError(
        f"too little memory: {'a LoRA' if counts.adapter else 'a full fine-tune'} of this transformer of "
        f"{counts.transformer / 1e9:.1f}e9 parameters keeps {wanted / GIB:.1f} GiB on {where} (per process: {listed}; "
        f"activations not included), and {available / GIB:.1f} GiB are available. "
        f"{_what_fits(counts, setup, available, processes_sharing)}. To try anyway: --check_memory false"
    )


def _kept_bytes(counts: Counts, setup: Setup, processes_sharing: int) -> float:
    """Return the lasting bytes on one process's device, or those of all processes in the host's memory."""
    use = memory_use(counts, setup)
    if not processes_sharing:
        return use.lasting
    shared = (counts.transformer - counts.trained + counts.encoders) * setup.dtype
    return shared + processes_sharing * max(0.0, use.lasting + use.host - shared)


def _what_fits(counts: Counts, setup: Setup, available: float, processes_sharing: int) -> str:
    """Name the smallest changes of a run that would make it fit."""
    offloaded = replace(setup, offload=True)
    options = [("--offload true", offloaded)]
    options += [
        (f"--config_file configs/accelerate/{name}.yaml --offload true", replace(offloaded, **launcher))
        for name, launcher in LAUNCHERS.items()
        if launcher["stage"]
    ]
    if setup.average and not counts.adapter:  # which ZeRO-3 does not shard
        options = [(words, option) for words, option in options if option.stage < 3]
    full = [words for words, option in options if _kept_bytes(counts, option, 0) <= available]
    fitting = [] if processes_sharing else full[:1]
    # A LoRA of low rank adds next to nothing.
    lora = replace(counts, trained=0, adapter=True)
    if _kept_bytes(lora, replace(offloaded, dtype=2), processes_sharing) <= available:
        fitting.append("a LoRA: --use_peft true --dtype bfloat16 --offload true")
    return "What would fit: " + ", or ".join(fitting) if fitting else "A machine with more memory is needed"
