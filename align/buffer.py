"""The transitions of one rollout, dealt out in micro-batches."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from align.flow import StochasticSampler, Transition
from align.rollout import Rollout, seeded_noise


@dataclass
class MicroBatch:
    """Some transitions of a rollout, steps mixed.

    prompts: one per row. advantages, weights: (rows,); a weight is 0 for a row that only keeps processes in step.
    step_positions: (rows,) index into the rollout's stochastic steps. nominal_size: rows there would be, dead ones
    included, by which the loss is divided.
    """

    transition: Transition
    prompts: list[str]
    advantages: Tensor
    weights: Tensor
    step_positions: Tensor
    sampler: StochasticSampler
    update: int
    nominal_size: float

    def __len__(self) -> int:
        return len(self.prompts)


@dataclass
class TransitionBuffer:
    """All transitions of a rollout on one process: K steps of N images, as K * N rows, step by step.

    live: (N,) images that carry gradient. update: number of the rollout. micro_batches: parts of one pass over it.
    seed: of the order in which rows are dealt. keep_one: never deal an empty part (processes must stay in step).
    """

    transitions: Transition
    prompts: list[str]
    advantages: Tensor
    live: Tensor
    steps: tuple[int, ...]
    sampler: StochasticSampler
    update: int
    micro_batches: int
    seed: tuple[int, ...]
    keep_one: bool

    @classmethod
    def of_rollout(
        cls,
        result: Rollout,
        prompts: list[str],
        advantages: Tensor,
        live: Tensor,
        *,
        update: int,
        micro_batches: int,
        seed: tuple[int, ...],
        keep_one: bool,
    ) -> "TransitionBuffer":
        transitions = Transition.cat(result.transitions)
        device = transitions.latents.device
        return cls(
            transitions, prompts, advantages.to(device), live.to(device), result.steps, result.sampler, update,
            micro_batches, seed, keep_one,
        )  # fmt: skip

    def _rows(self, rows: Tensor, weights: Tensor, nominal_size: float) -> MicroBatch:
        images = rows % len(self.prompts)
        return MicroBatch(
            transition=self.transitions[rows],
            prompts=[self.prompts[i] for i in images.tolist()],
            advantages=self.advantages[images],
            weights=weights.to(self.advantages),
            step_positions=rows // len(self.prompts),
            sampler=self.sampler,
            update=self.update,
            nominal_size=nominal_size,
        )

    def micro_batch(self, index: int) -> MicroBatch:
        """Part ``index`` of the passes over this rollout; each pass deals the live rows in another seeded order."""
        number, part = divmod(index, self.micro_batches)
        total = len(self.steps) * len(self.prompts)
        live = self.live.repeat(len(self.steps)).nonzero().flatten()
        order = seeded_noise((*self.seed, "order", number), (len(live),)).argsort().to(live.device)
        rows = live[order].tensor_split(self.micro_batches)[part]
        weights = torch.ones(len(rows))
        if not len(rows) and self.keep_one:
            rows, weights = torch.zeros(1, dtype=torch.long, device=live.device), torch.zeros(1)
        return self._rows(rows, weights, total / self.micro_batches)

    def in_order(self, size: int) -> Iterator[MicroBatch]:
        """Every row once, live or not, ``size`` at a time."""
        device = self.advantages.device
        for rows in torch.arange(len(self.steps) * len(self.prompts), device=device).split(size):
            yield self._rows(rows, torch.ones(len(rows)), len(rows))

    def save(self, file: Path) -> None:
        """Write what is left to train on into a checkpoint, as safetensors."""
        tensors = {name: value.contiguous().cpu() for name, value in vars(self.transitions).items()}
        tensors |= {"advantages": self.advantages.cpu(), "live": self.live.cpu()}
        rest = {
            "prompts": self.prompts,
            "steps": self.steps,
            "sampler": vars(self.sampler),
            "update": self.update,
            "micro_batches": self.micro_batches,
            "seed": self.seed,
            "keep_one": self.keep_one,
        }
        save_file(tensors, file, metadata={"rollout": json.dumps(rest)})

    @classmethod
    def load(cls, file: Path, device: torch.device) -> "TransitionBuffer":
        """Read what :meth:`save` wrote. Raises FileNotFoundError when the world size has changed since."""
        if not file.is_file():
            raise FileNotFoundError(
                f"{file} is missing: this checkpoint was taken in the middle of a rollout, by another number of "
                "processes. Resume with that number, or from a checkpoint between two rollouts"
            )
        with safe_open(file, framework="pt", device=str(device)) as stored:
            tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118 (it is no dict)
            rest = json.loads(stored.metadata()["rollout"])
        advantages, live = tensors.pop("advantages"), tensors.pop("live")
        sampler = StochasticSampler(**rest.pop("sampler"))
        rest |= {"steps": tuple(rest["steps"]), "seed": tuple(rest["seed"])}
        return cls(Transition(**tensors), advantages=advantages, live=live, sampler=sampler, **rest)
