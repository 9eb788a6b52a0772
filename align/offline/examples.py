"""Examples in batches of one size, with the noise they are trained at.

All that is random about an example is keyed by the run's seed and by its place in the order of the whole run, so a
resumed run, or one on another number of processes, trains on the same noise.
"""

import itertools
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from align.engine.matching import MatchingBatch
from align.models.contract import Request
from align.offline.latents import Example, LatentStore
from align.offline.settings import OfflineConfig
from align.sampling.noise import seeded_generator, seeded_noise
from preference_data.buckets import Bucket

#: (example, its place in the order of the run)
Drawn = tuple[Example, int]


class DrawnExamples(Dataset):
    """Examples by (index, place in the run), as :class:`BucketSampler` asks for them."""

    def __init__(self, examples: Sequence[Example]) -> None:
        self.examples = examples

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, drawn: tuple[int, int]) -> Drawn:
        index, place = drawn
        return self.examples[index], place


class BucketSampler(Sampler):
    """Batches of one bucket, in an order that is a function of (seed, epoch), with every example drawn as often as any other.

    ``batch_size`` is that of an optimizer update over all processes: however it is split, every micro-batch has one size.
    Batches come from passes over all examples, each in another order. Examples that do not fill a batch of their bucket
    wait for the next pass, so that the few of a rare bucket are not drawn more often than others. An epoch is as many
    batches as the examples would fill, at least one.
    """

    def __init__(self, buckets: Sequence[Bucket], batch_size: int, seed: int) -> None:
        self.batch_size, self.seed, self.epoch = batch_size, seed, 0
        self.batches = max(1, len(buckets) // batch_size)
        members: dict[Bucket, list[int]] = {}
        for index, bucket in enumerate(buckets):
            members.setdefault(bucket, []).append(index)
        self._members = [torch.tensor(indices) for indices in members.values()]
        self._stream, self._given_out = self._all_batches(), 0  # batches of the stream that were taken

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.batches * self.batch_size

    def _all_batches(self) -> Iterator[Tensor]:
        """Yield (batch_size,) indices, without end."""
        waiting = [torch.empty(0, dtype=torch.long) for _ in self._members]
        for number in itertools.count():
            generator = seeded_generator((self.seed, "order", number))
            full = []
            for place, members in enumerate(self._members):
                drawn = torch.cat([waiting[place], members[torch.randperm(len(members), generator=generator)]])
                whole = len(drawn) // self.batch_size * self.batch_size
                full += list(drawn[:whole].split(self.batch_size)) if whole else []
                waiting[place] = drawn[whole:]
            yield from (full[i] for i in torch.randperm(len(full), generator=generator))

    def __iter__(self) -> Iterator[tuple[int, int]]:
        first = self.epoch * self.batches
        if self._given_out > first:
            self._stream, self._given_out = self._all_batches(), 0
        for number in range(self._given_out, first + self.batches):
            batch, self._given_out = next(self._stream), number + 1
            if number >= first:
                for place, index in enumerate(batch.tolist(), number * self.batch_size):
                    yield index, place


def draw_batch(
    rows: Sequence[Drawn], store: LatentStore, args: OfflineConfig, device: torch.device, drop: float = 0.0
) -> MatchingBatch:
    """Draw noise and noise levels for examples; a share ``drop`` of the prompts becomes the negative one."""
    bucket = rows[0][0].bucket
    latents = torch.stack([store.latents(example) for example, _ in rows])
    streams = [seeded_generator((args.seed, "sigma", place)) for _, place in rows]
    sigma = args.draw_sigma(streams, store.model, bucket)
    dropped = [torch.rand((), generator=stream).item() < drop for stream in streams]
    negative = Request(args.negative_prompt)
    requests = [negative if drop_it else e.request for drop_it, (e, _) in zip(dropped, rows, strict=True)]
    noise = torch.stack([seeded_noise((args.seed, "noise", place), latents.shape[2:]) for _, place in rows])
    return MatchingBatch(latents.to(device), noise.to(device), sigma.to(device), requests, bucket)


def held_out_batch(
    example: Example, row: int, store: LatentStore, args: OfflineConfig, device: torch.device
) -> MatchingBatch:
    """Noise one held-out example to ``eval_sigmas`` evenly spaced levels, with noise that no run changes."""
    levels, bucket = args.eval_sigmas, example.bucket
    latents = store.latents(example)[None].expand(levels, -1, -1, -1)
    noise = torch.stack([seeded_noise((args.eval_seed, "held out", row, n), latents.shape[2:]) for n in range(levels)])
    sigma = store.model.shift_sigma((torch.arange(levels) + 0.5) / levels, *bucket)
    return MatchingBatch(latents.to(device), noise.to(device), sigma.to(device), [example.request] * levels, bucket)
