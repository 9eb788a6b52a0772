"""The pairs that one rollout leaves to train on, given out in micro-batches."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from align.models.contract import Request
from align.online.buffers import ORDER, Batching, Encode, even_share, prompts_of, read_buffer, write_buffer
from align.sampling.noise import seeded_noise

#: In a checkpoint: what is left of a rollout, the same on all processes.
PAIRS_FILE = "pairs.safetensors"


@dataclass
class PairBatch:
    """Some pairs of a rollout.

    latents: (P, 2, tokens, channels), the chosen image and the rejected. requests: P. places: what the noise of each is
    keyed by, (index of the rollout, pass over it, place of the group in it). groups: groups of the micro-batch, those
    without a pair included, by which the loss is divided.
    """

    latents: Tensor
    requests: list[Request]
    places: list[tuple[int, int, int]]
    groups: int

    def __len__(self) -> int:
        return len(self.places)


@dataclass
class PairBuffer:
    """The pairs of a rollout of all processes, the same on each of them.

    latents: (P, 2, tokens, channels) on the CPU, P from 0 to the number of groups. requests: P. groups: P, each pair's
    place in the rollout. rollout_index: number of the rollout. seed: of the order in which pairs are given out.
    group_count: groups of the rollout. batching: how this process splits its share of a pass.
    """

    latents: Tensor
    requests: list[Request]
    groups: list[int]
    rollout_index: int
    seed: int
    group_count: int
    batching: Batching

    def micro_batch(self, index: int) -> PairBatch:
        """Return this process's share of micro-batch ``index``; each pass gives out the pairs in another order.

        The pairs of an update are the same however many processes and micro-batches share them, as evenly as they can.
        """
        process, count = self.batching.process
        shares = self.batching.micro_batches * count
        pass_index, micro_batch = divmod(index, self.batching.micro_batches)
        order = seeded_noise((self.seed, self.rollout_index, ORDER, pass_index), (len(self.groups),)).argsort()
        mine = order[even_share(len(order), micro_batch * count + process, shares)].tolist()
        return PairBatch(
            latents=self.latents[mine],
            requests=[self.requests[pair] for pair in mine],
            places=[(self.rollout_index, pass_index, self.groups[pair]) for pair in mine],
            groups=self.group_count // shares,
        )

    def save(self, folder: Path) -> None:
        """Write what is left to train on into a checkpoint; called on every process."""
        facts: dict[str, Any] = {"prompts": prompts_of(self.requests)}
        facts |= {name: getattr(self, name) for name in ("groups", "rollout_index", "seed", "group_count")}
        if self.batching.saves:
            write_buffer(folder / PAIRS_FILE, {"latents": self.latents}, facts)

    @classmethod
    def load(cls, folder: Path, batching: Batching, device: torch.device, encode: Encode) -> "PairBuffer":
        """Read what :meth:`save` wrote, on any number of processes.

        The pairs stay on the CPU, and are encoded when they are trained: ``device`` and ``encode`` are those of all buffers.
        """
        tensors, facts = read_buffer(folder / PAIRS_FILE)
        requests = [Request(prompt) for prompt in facts.pop("prompts")]
        return cls(latents=tensors["latents"], requests=requests, batching=batching, **facts)
