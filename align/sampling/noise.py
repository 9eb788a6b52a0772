"""Randomness by key: the same on every machine, for every number of processes."""

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor


def seeded_generator(key: Sequence[int | str]) -> torch.Generator:
    """A random stream on the CPU that is a function of ``key`` alone."""
    digest = hashlib.blake2b(repr(tuple(key)).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)


def seeded_noise(key: Sequence[int | str], shape: Sequence[int]) -> Tensor:
    """Standard normal float32 of ``shape`` on the CPU, a function of ``key`` alone."""
    return torch.randn(tuple(shape), generator=seeded_generator(key))
