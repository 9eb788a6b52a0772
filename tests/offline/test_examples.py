"""Batches of training and of held-out examples: at which noise levels, with whose noise."""

import pytest
import torch
from matching_runs import settings, shifted
from PIL import Image

from align.engine.matching import MatchingBatch
from align.models.contract import Request
from align.models.families import load_model
from align.offline.examples import BucketSampler, draw_batch, held_out_batch
from align.offline.latents import Example, LatentStore
from align.sft import SFTConfig
from preference_data.buckets import Bucket
from preference_data.images import ImageSource

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def store() -> LatentStore:
    return LatentStore(load_model("tiny"), None, [Bucket(64, 64)])


@pytest.fixture(scope="module")
def example() -> Example:
    return Example(Request("red"), Bucket(64, 64), ("",), (ImageSource.of(Image.new("RGB", (64, 64), "red"), "red"),))


def config(tmp_path, **overrides) -> SFTConfig:
    return SFTConfig(**settings(tmp_path, **overrides))


def drawn(store, example, args, places) -> MatchingBatch:
    return draw_batch([(example, place) for place in places], store, args, CPU)


def held_out(store, example, args, row=0) -> MatchingBatch:
    return held_out_batch(example, row, store, args, CPU)


def test_every_example_is_trained_at_noise_and_a_level_of_its_own_that_the_seed_and_its_place_decide(
    store, example, tmp_path
):
    """Else a resumed run trains on other noise, or every epoch on the same; or a batch on one level."""
    batch, again = (drawn(store, example, config(tmp_path), places) for places in (range(20), range(19, -1, -1)))
    assert (
        len(set(batch.sigma.tolist())) == 20 and torch.cdist(*[batch.noise.flatten(1)] * 2).fill_diagonal_(9).min() > 1
    )
    assert torch.equal(batch.sigma, again.sigma.flip(0)) and torch.equal(batch.noise, again.noise.flip(0))
    other = drawn(store, example, config(tmp_path, seed=7), range(20))
    assert not torch.isin(batch.sigma, other.sigma).any() and (batch.noise - other.noise).abs().amax((1, 2)).min() > 0.1


def test_held_out_noise_is_that_of_the_evaluations_seed_and_of_no_run(store, example, tmp_path):
    """Two runs, or two seeds of one, would be compared at different noise: the difference is larger than most gains."""
    batch, other_run = (held_out(store, example, config(tmp_path, seed=seed)) for seed in (1, 2))
    assert torch.equal(batch.noise, other_run.noise) and torch.equal(batch.sigma, other_run.sigma)
    others = [
        held_out(store, example, config(tmp_path, eval_seed=5)),
        held_out(store, example, config(tmp_path), row=1),
    ]
    noise = torch.cat([b.noise for b in (batch, *others)]).flatten(1)
    assert len(noise) == 15 and torch.cdist(noise, noise).fill_diagonal_(9).min() > 1


@pytest.mark.parametrize("levels", [1, 5])
def test_held_out_levels_lie_in_the_middle_of_equal_parts_and_are_shifted(store, example, tmp_path, levels):
    """At a level of 1, which is pure noise, there is nothing to predict; and names in the log would be of other levels."""
    batch = held_out(store, example, config(tmp_path, eval_sigmas=levels))
    middles = torch.tensor([0.5] if levels == 1 else [0.1, 0.3, 0.5, 0.7, 0.9])
    torch.testing.assert_close(batch.sigma, shifted(middles))
    assert batch.latents.shape == (levels, 1, 16, 64) and batch.requests == [example.request] * levels


@pytest.mark.parametrize("rows", [3, 7, 8, 41])
def test_batches_are_full_and_an_epoch_has_as_many_as_the_examples_fill(rows):
    """A batch that is short, or one too many, takes the same step from fewer images."""
    sampler = BucketSampler([Bucket(64, 64)] * rows, 4, seed=0)
    assert len(sampler) == max(1, rows // 4) * 4
    seen = []
    for epoch in range(3):
        sampler.set_epoch(epoch)
        drawn = list(sampler)
        assert len(drawn) == len(sampler)
        seen += [place for _, place in drawn]
    assert seen == list(range(3 * len(sampler)))  # places of the run, none twice: noise is keyed by them


def test_the_order_is_that_of_its_seed_and_another_in_every_epoch():
    def order(seed, epoch):
        sampler = BucketSampler([Bucket(64, 64)] * 40, 4, seed)
        sampler.set_epoch(epoch)
        return [index for index, _ in sampler]

    assert order(0, 0) == order(0, 0) and sorted(order(0, 0)) == sorted(order(0, 1)) == list(range(40))
    assert len({tuple(order(seed, epoch)) for seed in (0, 1) for epoch in (0, 1)} | {tuple(range(40))}) == 5
