"""Randomness by key: the same on every machine, for every number of processes and every chunk size."""

import hashlib
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

#: The step under which an image's initial noise is keyed.
INITIAL = -1


def seeded_generator(key: Sequence[int | str]) -> torch.Generator:
    """Return a random stream on the CPU that is a function of ``key`` alone."""
    digest = hashlib.blake2b(repr(tuple(key)).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)


def seeded_noise(key: Sequence[int | str], shape: Sequence[int]) -> Tensor:
    """Draw standard normal float32 of ``shape`` on the CPU, a function of ``key`` alone."""
    return torch.randn(tuple(shape), generator=seeded_generator(key))


@dataclass(frozen=True)
class ImageKey:
    """The key of an image's noise: which image it is, whatever machine draws it.

    rollout: the rollout's index, or a word for what is no rollout of training. prompt, sample: place of the prompt in
    the rollout, and of the image in its group. start: the sample of the group whose initial noise it begins with; its
    own by default.
    """

    seed: int
    rollout: int | str
    prompt: int
    sample: int
    start: int | None = None

    def initial(self) -> tuple[int | str, ...]:
        """Return the key of the initial noise."""
        start = self.sample if self.start is None else self.start
        return (self.seed, self.rollout, self.prompt, start, INITIAL)

    def step(self, step: int) -> tuple[int | str, ...]:
        """Return the key of the noise that is injected at a denoising step."""
        return (self.seed, self.rollout, self.prompt, self.sample, step)


def first_of_start(image: int, num_generations: int, num_prefixes: int | None) -> int:
    """Return the first image of a rollout that begins with the same noise as ``image``.

    Groups of ``num_generations`` have ``num_prefixes`` different initial noises; None gives each image its own.
    """
    sample = image % num_generations
    return image - sample + sample % (num_prefixes or num_generations)


def distinct(values: Sequence[Hashable]) -> tuple[list[int], list[int]]:
    """Number the different values in the order in which they first appear.

    Returns:
        first: the index at which each different value first appears.
        number_of: for every value, which of the different values it is.
    """
    numbers: dict[Hashable, int] = {}
    number_of = [numbers.setdefault(value, len(numbers)) for value in values]
    return [number_of.index(number) for number in range(len(numbers))], number_of
