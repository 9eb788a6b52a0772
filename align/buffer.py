"""What one rollout leaves to train on, transitions or pairs, dealt out in micro-batches."""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from align.flow import StochasticSampler, Transition
from align.rollout import seeded_noise

#: In a checkpoint: what is left of a rollout on process {} of {}.
PART = "rollout-{}-of-{}.safetensors"


@dataclass
class MicroBatch:
    """Some transitions of a rollout, steps mixed.

    images: which of the rollout's images on this process each row belongs to. advantages, weights: (rows,); a weight is
    0 for a row that only keeps processes in step. step_positions: (rows,) index into the rollout's stochastic steps.
    nominal_size: rows there would be, dead ones included, by which the loss is divided.
    """

    transition: Transition
    images: list[int]
    advantages: Tensor
    weights: Tensor
    step_positions: Tensor
    nominal_size: float

    def __len__(self) -> int:
        return len(self.images)


@dataclass
class TransitionBuffer:
    """The transitions of a rollout on one process: K steps of its N images, as K * N rows, step by step.

    prompts, advantages: of those N images. live: (all images of all processes,) which carry gradient. first: place of
    this process's first image among them. update: number of the rollout. micro_batches: parts of one pass over it.
    seed: of the order in which all processes' rows are dealt. keep_one: never deal an empty part (processes must stay
    in step).
    """

    transitions: Transition
    prompts: list[str]
    advantages: Tensor
    live: Tensor
    first: int
    steps: tuple[int, ...]
    sampler: StochasticSampler
    update: int
    micro_batches: int
    seed: int
    keep_one: bool

    def micro_batch(self, index: int, dead_too: bool = False) -> MicroBatch:
        """Part ``index`` of the passes over this rollout; each pass deals the live rows in another order.

        The order is drawn over all processes' rows, and each takes its own of a part: an update is the same whatever
        the number of processes. ``dead_too`` deals every row, to check them.
        """
        number, part = divmod(index, self.micro_batches)
        steps, images = len(self.steps), len(self.prompts)
        alive = torch.ones_like(self.live) if dead_too else self.live
        rows = alive.repeat(steps).nonzero().flatten()  # step by step, all processes' images in each
        rows = rows[seeded_noise((self.seed, self.update, "deal", number), (len(rows),)).argsort()]
        rows = rows[_part(len(rows), part, self.micro_batches)]
        step, image = rows // len(self.live), rows % len(self.live) - self.first
        own = (image >= 0) & (image < images)
        step, image = step[own], image[own]
        weights = torch.ones(len(image))
        if not len(image) and self.keep_one:
            step, image, weights = torch.zeros(1, dtype=torch.long), torch.zeros(1, dtype=torch.long), torch.zeros(1)
        device = self.advantages.device
        return MicroBatch(
            transition=self.transitions[(step * images + image).to(device)],
            images=image.tolist(),
            advantages=self.advantages[image.to(device)],
            weights=weights.to(device),
            step_positions=step,
            nominal_size=steps * images / self.micro_batches,
        )

    def save(self, folder: Path, process: tuple[int, int]) -> None:
        """Write what is left to train on into a checkpoint, as safetensors; ``process``: (index, count)."""
        tensors = {name: value.contiguous().cpu() for name, value in vars(self.transitions).items()}
        tensors |= {"advantages": self.advantages.cpu(), "live": self.live}
        rest = {
            "prompts": self.prompts,
            "first": self.first,
            "steps": self.steps,
            "sampler": vars(self.sampler),
            "update": self.update,
            "seed": self.seed,
        }
        save_file(tensors, folder / PART.format(*process), metadata={"rollout": json.dumps(rest)})

    @classmethod
    def load(
        cls, folder: Path, process: tuple[int, int], micro_batches: int, keep_one: bool, device: torch.device
    ) -> "TransitionBuffer":
        """The part of process (index, count) of what was written by as many processes, or by another number of them.

        Raises FileNotFoundError when a part is missing.
        """
        index, count = process
        file, split = folder / PART.format(*process), {"micro_batches": micro_batches, "keep_one": keep_one}
        if file.is_file():
            return cls._read(file, device, **split)
        written = {int(part.stem.rpartition("-")[2]) for part in folder.glob(PART.format("*", "*"))}
        if not written:
            raise FileNotFoundError(f"{file} is missing: this checkpoint was taken in the middle of a rollout")
        before = max(written)
        parts = [cls._read(folder / PART.format(part, before), device, **split) for part in range(before)]
        images = len(parts[0].live) // count
        return cls._joined(parts, slice(index * images, (index + 1) * images))

    @classmethod
    def _read(cls, file: Path, device: torch.device, **split: Any) -> "TransitionBuffer":
        with safe_open(file, framework="pt") as stored:  # it knows no device "cpu:0", which several processes have
            tensors = {name: stored.get_tensor(name).to(device) for name in stored.keys()}  # noqa: SIM118 (it is no dict)
            rest = json.loads(stored.metadata()["rollout"]) | split
        advantages, live = tensors.pop("advantages"), tensors.pop("live").cpu()
        sampler = StochasticSampler(**rest.pop("sampler"))
        rest["steps"] = tuple(rest["steps"])
        return cls(Transition(**tensors), advantages=advantages, live=live, sampler=sampler, **rest)

    @classmethod
    def _joined(cls, parts: list["TransitionBuffer"], own: slice) -> "TransitionBuffer":
        """Of all processes' ``parts`` the images ``own``, by their places in the rollout."""
        steps = len(parts[0].steps)

        def images(name: str) -> Tensor:
            each = [getattr(part.transitions, name).unflatten(0, (steps, -1)) for part in parts]
            return torch.cat(each, 1)[:, own].flatten(0, 1)

        return replace(
            parts[0],
            transitions=Transition(**{name: images(name) for name in vars(parts[0].transitions)}),
            prompts=[prompt for part in parts for prompt in part.prompts][own],
            advantages=torch.cat([part.advantages for part in parts])[own],
            first=own.start,
        )


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


def _part(total: int, number: int, parts: int) -> slice:
    """Part ``number`` of ``total`` things that are split as evenly as they can be."""
    return slice(total * number // parts, total * (number + 1) // parts)
