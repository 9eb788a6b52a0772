"""What one rollout leaves to train on, transitions or noised images, given out in micro-batches."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from align.maths.flow import StochasticSampler, Transition
from align.models.contract import Request
from align.sampling.noise import distinct, seeded_noise

#: In a checkpoint: what is left of a rollout on process {} of {}.
PROCESS_FILE = "rollout-{}-of-{}.safetensors"
#: In the key of the random order of a rollout's rows. Another word would be another order.
ORDER = "deal"

Encode = Callable[[Sequence[Request]], list[Any]]


@dataclass(frozen=True)
class Batching:
    """How a process splits a pass over a rollout into micro-batches.

    micro_batches: of one pass. per_update: micro-batches that make one update. process: (index, count). keep_in_step:
    never give an empty micro-batch, since the processes wait for each other. saves: this process writes what is the same
    on all of them.
    """

    micro_batches: int
    per_update: int
    process: tuple[int, int]
    keep_in_step: bool
    saves: bool = True

    @property
    def updates(self) -> int:
        """Updates of one pass."""
        return self.micro_batches // self.per_update


def even_share(total: int, index: int, shares: int) -> slice:
    """Return share ``index`` of ``total`` things that are split as evenly as they can be."""
    return slice(total * index // shares, total * (index + 1) // shares)


@dataclass(kw_only=True)
class RolloutBuffer:
    """What the buffers of single images share: ``copies`` rows of each of N images, stored copy by copy.

    requests, conditions: of the N images on this process. informative: (images of all processes,) bool, which carry
    gradient. first: place of this process's first image among them. rollout_index: number of the rollout. seed: of the
    order in which all processes' rows are given out. batching: how this process splits them.
    """

    requests: list[Request]
    conditions: list[Any]
    informative: Tensor
    first: int
    rollout_index: int
    seed: int
    batching: Batching

    def _select_rows(
        self, index: int, copies: int, dead_too: bool, starts: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Choose the rows of micro-batch ``index`` of the passes; each pass has another order of the informative rows.

        Order and updates are drawn over all processes' rows, and each process takes its own rows of an update: an update
        is the same whatever the number of processes. A process spreads its rows of an update evenly over its
        micro-batches, of which none is larger than the batch size.

        Args:
            dead_too: give out every row.
            starts: (images of all processes,) the first image with the same first copy; such copies of an update stay
                together.

        Returns:
            copy, image: (rows,) which row of which of this process's images.
            weight: (rows,) 1, or 0 for a row that only keeps processes in step.
        """
        batching, images, total = self.batching, len(self.requests), len(self.informative)
        pass_index, micro_batch = divmod(index, batching.micro_batches)
        chosen = torch.ones_like(self.informative) if dead_too else self.informative
        rows = chosen.repeat(copies).nonzero().flatten()  # copy by copy, all processes' images in each
        draw_of = torch.arange(copies * total)  # rows with one draw between them stand next to each other
        if starts is not None:
            draw_of[:total] = starts
        noise = seeded_noise((self.seed, self.rollout_index, ORDER, pass_index), (copies * total,))
        draws = noise[draw_of[rows]]
        rows = rows[draws.argsort(stable=True)]  # one random order over all processes' rows
        update, micro_batch = divmod(micro_batch, batching.per_update)
        rows = rows[self._updates_of(copies, pass_index)[rows] == update]
        copy, image = rows // total, rows % total - self.first
        mine = ((image >= 0) & (image < images)).nonzero().flatten()
        mine = mine[even_share(len(mine), micro_batch, batching.per_update)]
        if not len(mine) and batching.keep_in_step:
            return torch.zeros(1, dtype=torch.long), torch.zeros(1, dtype=torch.long), torch.zeros(1)
        return copy[mine], image[mine], torch.ones(len(mine))

    def _updates_of(self, copies: int, pass_index: int) -> Tensor:
        """Draw which update of a pass each of all processes' rows belongs to, dead ones included: (copies * images,).

        Of as many rows as there are updates, beginning with those of the first image, each update takes one. So the images
        of every process, however many processes there are, have as many rows in one update as in another.
        """
        updates, total = self.batching.updates, len(self.informative)
        blocks = -(-copies * total // updates)
        noise = seeded_noise((self.seed, self.rollout_index, "updates", pass_index), (blocks, updates))
        by_image = noise.argsort(dim=1).flatten()[: copies * total]
        return by_image.view(total, copies).T.flatten()

    def save(self, folder: Path) -> None:
        """Write what is left to train on into a checkpoint; called on every process."""
        facts: dict[str, Any] = {"prompts": prompts_of(self.requests)}
        facts |= {name: getattr(self, name) for name in ("first", "rollout_index", "seed")} | self._facts()
        file = folder / PROCESS_FILE.format(*self.batching.process)
        write_buffer(file, self._rows() | {"informative": self.informative}, facts)

    @classmethod
    def load(cls, folder: Path, batching: Batching, device: torch.device, encode: Encode) -> Self:
        """Read this process's share of what was written by as many processes, or by another number of them.

        Raises FileNotFoundError when the file of a process is missing.
        """
        rows, facts = _read_share(folder, batching.process)
        informative = rows.pop("informative")
        rows = {name: value.to(device) for name, value in rows.items()}
        requests = [Request(prompt) for prompt in facts.pop("prompts")]
        shared = {
            "requests": requests,
            "conditions": encode(requests),
            "informative": informative,
            "batching": batching,
        }
        return cls._made(rows, facts | shared)

    def _rows(self) -> dict[str, Tensor]:
        """Return what is kept of each image, or of each of its copies, by name: (N, ...) or (copies * N, ...)."""
        raise NotImplementedError

    def _facts(self) -> dict[str, Any]:
        """Return what else is kept of the rollout, for JSON."""
        return {}

    @classmethod
    def _made(cls, rows: dict[str, Tensor], rest: dict[str, Any]) -> Self:
        """Make a buffer of :meth:`_rows` and everything else."""
        return cls(**{**rows, **rest})


@dataclass
class MicroBatch:
    """Some transitions of a rollout, steps mixed, with all that the loss needs.

    transition: R rows. images: R, which of this process's images each row belongs to. advantages, weights: (R,); a
    weight is 0 for a row that only keeps processes in step. step_positions: (R,) index into the rollout's stochastic
    steps. nominal_size: rows there would be, dead ones included, by which the loss is divided. sampler: of the policy.
    distinct: D rows whose latents, noise level and condition no row before them has: only these need a velocity.
    conditions: of these D rows. velocity_of: R, which of the D velocities is each row's.
    """

    transition: Transition
    images: list[int]
    advantages: Tensor
    weights: Tensor
    step_positions: Tensor
    nominal_size: float
    sampler: StochasticSampler
    distinct: list[int]
    conditions: list[Any]
    velocity_of: list[int]

    def __len__(self) -> int:
        return len(self.images)


@dataclass(kw_only=True)
class TransitionBuffer(RolloutBuffer):
    """The transitions of a rollout on one process: K steps of its N images, as K * N rows, step by step.

    advantages: (N,). steps: K indices. starts: of each image of all processes, the first one with the same initial
    noise; None where all differ. Others: see :class:`RolloutBuffer`.
    """

    transitions: Transition
    advantages: Tensor
    steps: tuple[int, ...]
    sampler: StochasticSampler
    starts: list[int] | None = None

    def micro_batch(self, index: int, dead_too: bool = False) -> MicroBatch:
        """Return micro-batch ``index`` of the passes over this rollout; ``dead_too`` gives out every row, to check them."""
        steps, images, device = len(self.steps), len(self.requests), self.advantages.device
        starts = None if self.starts is None else torch.tensor(self.starts)
        step, image, weights = self._select_rows(index, steps, dead_too, starts)
        # Up to the first stochastic step images with the same initial noise are one.
        place = self.first + image
        point = place if starts is None else torch.where(step == 0, starts[place], place)
        first, velocity_of = distinct(list(zip(step.tolist(), point.tolist(), strict=True)))
        chosen = image.tolist()
        return MicroBatch(
            transition=self.transitions[(step * images + image).to(device)],
            images=chosen,
            advantages=self.advantages[image.to(device)],
            weights=weights.to(device),
            step_positions=step,
            nominal_size=steps * images / self.batching.micro_batches,
            sampler=self.sampler,
            distinct=first,
            conditions=[self.conditions[chosen[row]] for row in first],
            velocity_of=velocity_of,
        )

    def _rows(self) -> dict[str, Tensor]:
        return {**vars(self.transitions), "advantages": self.advantages}

    def _facts(self) -> dict[str, Any]:
        return {"steps": self.steps, "sampler": vars(self.sampler), "starts": self.starts}

    @classmethod
    def _made(cls, rows: dict[str, Tensor], rest: dict[str, Any]) -> Self:
        sampler, steps = StochasticSampler(**rest.pop("sampler")), tuple(rest.pop("steps"))
        advantages = rows.pop("advantages")
        return cls(transitions=Transition(**rows), advantages=advantages, steps=steps, sampler=sampler, **rest)


@dataclass
class PointBatch:
    """P images of a rollout at noise levels, with all that the loss needs.

    latents, noise: (P, tokens, channels). sigma, optimality: (P,). old_velocity: like latents, of the policy that drew
    the images, None where that is still the one being trained. rows: (P,) of the buffer. images, weights, nominal_size:
    as in :class:`MicroBatch`. conditions: P.
    """

    latents: Tensor
    noise: Tensor
    sigma: Tensor
    optimality: Tensor
    old_velocity: Tensor | None
    rows: Tensor
    images: list[int]
    conditions: list[Any]
    weights: Tensor
    nominal_size: float

    def __len__(self) -> int:
        return len(self.images)


@dataclass(kw_only=True)
class PointBuffer(RolloutBuffer):
    """The N images of a rollout on one process, each to be noised to K levels: K * N rows, the images' first levels first.

    latents: (N, tokens, channels). sigma: (K * N,) noise levels. optimality: (N,) how good the images are, 0..1.
    old_velocity: (K * N, tokens, channels) of the policy that drew them, where it is needed. Others: see
    :class:`RolloutBuffer`; the noise of a row is keyed by seed, rollout, image and level.
    """

    latents: Tensor
    sigma: Tensor
    optimality: Tensor
    old_velocity: Tensor | None = None

    def micro_batch(self, index: int) -> PointBatch:
        """Return micro-batch ``index`` of the passes over this rollout; each pass has the same noise in another order."""
        images, device = len(self.requests), self.latents.device
        level, image, weights = self._select_rows(index, len(self.sigma) // images, dead_too=False)
        rows, shape = (level * images + image).to(device), self.latents.shape[1:]
        keys = zip((self.first + image).tolist(), level.tolist(), strict=True)
        noise = [seeded_noise((self.seed, self.rollout_index, "noise", *key), shape) for key in keys]
        latents, chosen = self.latents[image.to(device)], image.tolist()
        return PointBatch(
            latents=latents,
            noise=torch.stack(noise).to(device) if noise else latents,
            sigma=self.sigma[rows],
            optimality=self.optimality[image.to(device)],
            old_velocity=None if self.old_velocity is None else self.old_velocity[rows],
            rows=rows,
            images=chosen,
            conditions=[self.conditions[i] for i in chosen],
            weights=weights.to(device),
            nominal_size=len(self.sigma) / self.batching.micro_batches,
        )

    def _rows(self) -> dict[str, Tensor]:
        names = ("latents", "sigma", "optimality", "old_velocity")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}


# -- files -------------------------------------------------------------------------------------------------------------


def prompts_of(requests: Sequence[Request]) -> list[str]:
    """Return the prompts of requests, which is all that a checkpoint keeps of them."""
    if any(request.images for request in requests):
        raise ValueError("a checkpoint in the middle of a rollout keeps no input images")
    return [request.prompt for request in requests]


def write_buffer(file: Path, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
    """Write tensors, and what JSON can hold, into one safetensors file."""
    cpu = {name: value.contiguous().cpu() for name, value in tensors.items()}
    save_file(cpu, file, metadata={"rollout": json.dumps(facts)})


def read_buffer(file: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read the tensors and facts of one file."""
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing: this checkpoint was taken in the middle of a rollout")
    with safe_open(file, framework="pt") as stored:
        tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118 (it is no dict)
        return tensors, json.loads(stored.metadata()["rollout"])


def _read_share(folder: Path, process: tuple[int, int]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read tensors and facts of process (index, count), put together from all files if there were other processes."""
    index, count = process
    file = folder / PROCESS_FILE.format(index, count)
    counts = {int(path.stem.rpartition("-")[2]) for path in folder.glob(PROCESS_FILE.format("*", "*"))}
    if file.is_file() or not counts:
        return read_buffer(file)
    files = [read_buffer(folder / PROCESS_FILE.format(writer, max(counts))) for writer in range(max(counts))]
    informative, images = files[0][0]["informative"], len(files[0][1]["prompts"])
    mine = slice(index * len(informative) // count, (index + 1) * len(informative) // count)

    def joined(name: str) -> Tensor:
        of_process = [rows[name].unflatten(0, (-1, images)) for rows, _ in files]  # copy by copy
        return torch.cat(of_process, 1)[:, mine].flatten(0, 1)

    rows = {name: joined(name) for name in files[0][0] if name != "informative"}
    prompts = [prompt for _, facts in files for prompt in facts["prompts"]][mine]
    return rows | {"informative": informative}, files[0][1] | {"prompts": prompts, "first": mine.start}
