"""What one rollout leaves to train on, transitions, noised images or pairs, dealt out in micro-batches."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from align.maths.flow import StochasticSampler, Transition
from align.sampling.noise import seeded_noise
from align.sampling.rollout import first_places

#: In a checkpoint: what is left of a rollout on process {} of {}.
PART = "rollout-{}-of-{}.safetensors"


@dataclass
class MicroBatch:
    """Some transitions of a rollout, steps mixed.

    images: which of the rollout's images on this process each row belongs to. advantages, weights: (rows,); a weight is
    0 for a row that only keeps processes in step. step_positions: (rows,) index into the rollout's stochastic steps.
    nominal_size: rows there would be, dead ones included, by which the loss is divided. distinct: rows whose latents,
    noise level and prompt no row before them has: only these need a velocity. branch: of every row, which of them it is.
    """

    transition: Transition
    images: list[int]
    advantages: Tensor
    weights: Tensor
    step_positions: Tensor
    nominal_size: float
    distinct: list[int]
    branch: list[int]

    def __len__(self) -> int:
        return len(self.images)


@dataclass(kw_only=True)
class RolloutBuffer:
    """What the buffers of single images share: the dealing of ``copies`` rows of each of N images, copy by copy.

    prompts: of those N images, which are on this process. live: (all images of all processes,) which carry gradient.
    first: place of this process's first image among them. update: number of the rollout. micro_batches: parts of one
    pass over it. per_update: how many of them make one optimizer update. seed: of the order in which all processes' rows
    are dealt. keep_one: never deal an empty part (processes must stay in step).
    """

    prompts: list[str]
    live: Tensor
    first: int
    update: int
    micro_batches: int
    per_update: int
    seed: int
    keep_one: bool

    def _deal(
        self, index: int, copies: int, dead_too: bool, starts: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(copy, image, weight) of the rows of part ``index``; each pass deals the live rows in another order.

        The order is drawn over all processes' rows, and each takes its own of an update: that is the same whatever the
        number of processes. What it has there it spreads evenly over its parts: where a pass makes one update,
        none is larger than the batch size; where it makes several, at most as many times as there are updates, should
        all its rows fall into one. ``dead_too`` deals every row. ``starts``: (all images,) the first image that has the
        same first copy; such copies are dealt one after the other. A weight is 0 for a row that only keeps processes in
        step.
        """
        number, part = divmod(index, self.micro_batches)
        images = len(self.prompts)
        alive = torch.ones_like(self.live) if dead_too else self.live
        rows = alive.repeat(copies).nonzero().flatten()  # copy by copy, all processes' images in each
        place = torch.arange(copies * len(self.live))
        if starts is not None:
            place[: len(starts)] = starts
        drawn = seeded_noise((self.seed, self.update, "deal", number), (len(place),))
        rows = rows[drawn[place[rows]].argsort(stable=True)]
        update, part = divmod(part, self.per_update)
        rows = rows[_part(len(rows), update, self.micro_batches // self.per_update)]
        copy, image = rows // len(self.live), rows % len(self.live) - self.first
        own = ((image >= 0) & (image < images)).nonzero().flatten()
        own = own[_part(len(own), part, self.per_update)]
        copy, image = copy[own], image[own]
        if len(image) or not self.keep_one:
            return copy, image, torch.ones(len(image))
        return torch.zeros(1, dtype=torch.long), torch.zeros(1, dtype=torch.long), torch.zeros(1)

    def save(self, folder: Path, process: tuple[int, int]) -> None:
        """Write what is left to train on into a checkpoint, as safetensors; ``process``: (index, count)."""
        tensors = {name: value.contiguous().cpu() for name, value in (self._rows() | {"live": self.live}).items()}
        said = {name: getattr(self, name) for name in ("prompts", "first", "update", "seed")} | self._facts()
        save_file(tensors, folder / PART.format(*process), metadata={"rollout": json.dumps(said)})

    @classmethod
    def load(cls, folder: Path, process: tuple[int, int], device: torch.device, **parts: int | bool) -> Self:
        """The part of process (index, count) of what was written by as many processes, or by another number of them.

        ``parts``: micro_batches, per_update and keep_one as they are now. Raises FileNotFoundError when a process's part is
        missing.
        """
        rows, rest = _read_part(folder, process)
        live = rows.pop("live")
        rows = {name: value.to(device) for name, value in rows.items()}
        return cls._made(rows, rest | {"live": live} | parts)

    def _rows(self) -> dict[str, Tensor]:
        """What is kept of each image, or of each of its copies, by name: (N, ...) or (copies * N, ...)."""
        raise NotImplementedError

    def _facts(self) -> dict[str, Any]:
        """What else is kept of the rollout, for JSON."""
        return {}

    @classmethod
    def _made(cls, rows: dict[str, Tensor], rest: dict[str, Any]) -> Self:
        """A buffer of :meth:`_rows` and everything else."""
        return cls(**{**rows, **rest})


@dataclass(kw_only=True)
class TransitionBuffer(RolloutBuffer):
    """The transitions of a rollout on one process: K steps of its N images, as K * N rows, step by step.

    advantages: of those N images. starts: of each image of all processes, the first one with the same initial noise;
    None where all differ. Others: see :class:`RolloutBuffer`.
    """

    transitions: Transition
    advantages: Tensor
    steps: tuple[int, ...]
    sampler: StochasticSampler
    starts: list[int] | None = None

    def micro_batch(self, index: int, dead_too: bool = False) -> MicroBatch:
        """Part ``index`` of the passes over this rollout; ``dead_too`` deals every row, to check them."""
        steps, images, device = len(self.steps), len(self.prompts), self.advantages.device
        starts = None if self.starts is None else torch.tensor(self.starts)
        step, image, weights = self._deal(index, steps, dead_too, starts)
        # Up to the first stochastic step images with the same initial noise are one.
        own = self.first + image
        begun = own if starts is None else torch.where(step == 0, starts[own], own)
        distinct, branch = first_places(list(zip(step.tolist(), begun.tolist(), strict=True)))
        return MicroBatch(
            transition=self.transitions[(step * images + image).to(device)],
            images=image.tolist(),
            advantages=self.advantages[image.to(device)],
            weights=weights.to(device),
            step_positions=step,
            nominal_size=steps * images / self.micro_batches,
            distinct=distinct,
            branch=branch,
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
    """P images of a rollout at noise levels.

    latents, noise: (P, tokens, channels). sigma, optimality: (P,). old_velocity: like latents, of the policy that drew
    the images, None where that is still the one being trained. rows: (P,) of the buffer. images, weights, nominal_size:
    as in :class:`MicroBatch`.
    """

    latents: Tensor
    noise: Tensor
    sigma: Tensor
    optimality: Tensor
    old_velocity: Tensor | None
    rows: Tensor
    images: list[int]
    weights: Tensor
    nominal_size: float

    def __len__(self) -> int:
        return len(self.images)


@dataclass(kw_only=True)
class PointBuffer(RolloutBuffer):
    """The N images of a rollout on one process, each to be noised to K levels: K * N rows, the images' first levels first.

    latents: (N, tokens, channels). sigma: (K * N,) noise levels. optimality: (N,) how good the images are, 0..1.
    old_velocity: (K * N, tokens, channels) of the policy that drew them, where it is needed. Others: see
    :class:`RolloutBuffer`; the noise of a row is keyed by seed, update, image and level.
    """

    latents: Tensor
    sigma: Tensor
    optimality: Tensor
    old_velocity: Tensor | None = None

    def micro_batch(self, index: int) -> PointBatch:
        """Part ``index`` of the passes over this rollout; each pass has the same noise, dealt in another order."""
        images, device = len(self.prompts), self.latents.device
        level, image, weights = self._deal(index, len(self.sigma) // images, dead_too=False)
        rows, shape = (level * images + image).to(device), self.latents.shape[1:]
        keys = zip((self.first + image).tolist(), level.tolist(), strict=True)
        noise = [seeded_noise((self.seed, self.update, "noise", *key), shape) for key in keys]
        latents = self.latents[image.to(device)]
        return PointBatch(
            latents=latents,
            noise=torch.stack(noise).to(device) if noise else latents,
            sigma=self.sigma[rows],
            optimality=self.optimality[image.to(device)],
            old_velocity=None if self.old_velocity is None else self.old_velocity[rows],
            rows=rows,
            images=image.tolist(),
            weights=weights.to(device),
            nominal_size=len(self.sigma) / self.micro_batches,
        )

    def _rows(self) -> dict[str, Tensor]:
        names = ("latents", "sigma", "optimality", "old_velocity")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}


@dataclass
class PairBatch:
    """Some pairs of a rollout.

    latents: (P, 2, tokens, channels), the chosen image and the rejected. places: what the noise of each is keyed by,
    (update of the rollout, pass over it, place of the group in it).
    """

    latents: Tensor
    prompts: list[str]
    places: list[tuple[int, int, int]]

    def __len__(self) -> int:
        return len(self.places)


@dataclass
class PairBuffer:
    """The pairs of a rollout of all processes, the same on each of them.

    latents: (P, 2, tokens, channels) on the CPU, P from 0 to the number of groups. prompts: P. groups: P, each pair's
    place in the rollout. update: number of the rollout. seed: of the order in which pairs are dealt. micro_batches: of
    one pass over it on each process. process: (index, count).
    """

    latents: Tensor
    prompts: list[str]
    groups: list[int]
    update: int
    seed: int
    micro_batches: int
    process: tuple[int, int]

    def micro_batch(self, index: int) -> PairBatch:
        """This process's part of micro-batch ``index`` of the passes; each pass deals the pairs in another order.

        The pairs of an update are the same however many processes and micro-batches share them, as evenly as they can.
        """
        number, part = divmod(index, self.micro_batches)
        order = seeded_noise((self.seed, self.update, "deal", number), (len(self.groups),)).argsort()
        process, count = self.process
        own = order[_part(len(order), part * count + process, self.micro_batches * count)].tolist()
        return PairBatch(
            latents=self.latents[own],
            prompts=[self.prompts[pair] for pair in own],
            places=[(self.update, number, self.groups[pair]) for pair in own],
        )

    def save(self, file: Path) -> None:
        """Write what is left to train on into a checkpoint, as safetensors."""
        rest = {"prompts": self.prompts, "groups": self.groups, "update": self.update, "seed": self.seed}
        save_file({"latents": self.latents.contiguous()}, file, metadata={"rollout": json.dumps(rest)})

    @classmethod
    def load(cls, file: Path, **split: Any) -> "PairBuffer":
        """Read what :meth:`save` wrote; ``split``: micro_batches and process. Raises FileNotFoundError."""
        if not file.is_file():
            raise FileNotFoundError(f"{file} is missing: this checkpoint was taken in the middle of a rollout")
        with safe_open(file, framework="pt") as stored:
            latents, rest = stored.get_tensor("latents"), json.loads(stored.metadata()["rollout"])
        return cls(latents, **rest, **split)


def _read_part(folder: Path, process: tuple[int, int]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and facts of process (index, count), put together from the parts of all processes if they were others."""
    index, count = process
    file = folder / PART.format(index, count)
    if file.is_file():
        return _read(file)
    written = {int(part.stem.rpartition("-")[2]) for part in folder.glob(PART.format("*", "*"))}
    if not written:
        raise FileNotFoundError(f"{file} is missing: this checkpoint was taken in the middle of a rollout")
    parts = [_read(folder / PART.format(part, max(written))) for part in range(max(written))]
    live, share = parts[0][0]["live"], len(parts[0][1]["prompts"])
    own = slice(index * len(live) // count, (index + 1) * len(live) // count)

    def images(name: str) -> Tensor:
        each = [rows[name].unflatten(0, (-1, share)) for rows, _ in parts]  # copy by copy
        return torch.cat(each, 1)[:, own].flatten(0, 1)

    rows = {name: images(name) for name in parts[0][0] if name != "live"}
    prompts = [prompt for _, rest in parts for prompt in rest["prompts"]][own]
    return rows | {"live": live}, parts[0][1] | {"prompts": prompts, "first": own.start}


def _read(file: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and facts of one process's part."""
    with safe_open(file, framework="pt") as stored:
        tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118 (it is no dict)
        return tensors, json.loads(stored.metadata()["rollout"])


def _part(total: int, number: int, parts: int) -> slice:
    """Part ``number`` of ``total`` things that are split as evenly as they can be."""
    return slice(total * number // parts, total * (number + 1) // parts)
