"""The pairs of one rollout, given out in micro-batches."""

from itertools import chain

import pytest
import torch

from align.models.contract import Request
from align.online.buffers import Batching
from align.online.pairs import PairBatch, PairBuffer

#: Of eight groups two made no pair.
GROUPS = [0, 1, 3, 4, 6, 7]


def buffer(micro_batches=4, per_update=1, process=(0, 1), index=5, seed=3, saves=True) -> PairBuffer:
    """A pair is told by its latents, the number of its group, and by its prompt."""
    return PairBuffer(
        latents=torch.tensor(GROUPS).float().view(-1, 1, 1, 1).expand(-1, 2, 3, 4).contiguous(),
        requests=[Request(f"prompt {group}") for group in GROUPS],
        groups=GROUPS,
        rollout_index=index,
        seed=seed,
        group_count=8,
        batching=Batching(micro_batches, per_update, process, keep_in_step=False, saves=saves),
    )


def groups(batch: PairBatch) -> list[int]:
    """The groups of a micro-batch by their latents, which are those of its prompts and places."""
    found = [int(latents[0, 0, 0]) for latents in batch.latents]
    assert [request.prompt for request in batch.requests] == [f"prompt {group}" for group in found]
    assert [place[2] for place in batch.places] == found
    return found


def a_pass(source: PairBuffer, number: int) -> list[list[int]]:
    count = source.batching.micro_batches
    return [groups(source.micro_batch(number * count + part)) for part in range(count)]


@pytest.mark.parametrize("micro_batches", [1, 2, 4])
def test_a_pass_gives_out_every_pair_once_as_evenly_as_it_can(micro_batches):
    for number in range(3):
        parts = a_pass(buffer(micro_batches), number)
        assert sorted(chain(*parts)) == GROUPS
        assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_each_pass_and_each_rollout_has_an_order_of_its_own():
    """Pairs that always share an update are learned together, and later ones always from a policy that has moved."""
    orders = [tuple(chain(*a_pass(buffer(), number))) for number in range(4)]
    orders += [tuple(chain(*a_pass(buffer(**other), 0))) for other in ({"index": 6}, {"seed": 4})]
    assert len(set(orders)) == 6 and a_pass(buffer(), 2) == a_pass(buffer(), 2)


@pytest.mark.parametrize("processes", [2, 4])
def test_an_update_is_made_of_the_same_pairs_whatever_the_number_of_processes(processes):
    """A run would become another one on another number of GPUs, or after a resume there."""
    alone = buffer(micro_batches=4, per_update=processes)
    shared = [buffer(4 // processes, process=(n, processes)) for n in range(processes)]
    for number in range(2):
        parts = a_pass(alone, number)
        for update in range(4 // processes):
            together = [group for source in shared for group in a_pass(source, number)[update]]
            assert sorted(together) == sorted(chain(*parts[update * processes : (update + 1) * processes]))


def test_the_loss_is_divided_by_the_groups_of_the_micro_batch_those_without_a_pair_included():
    assert [buffer(n).micro_batch(0).groups for n in (1, 2, 4)] == [8, 4, 2]
    assert buffer(2, process=(1, 2)).micro_batch(0).groups == 2


def test_the_noise_of_a_pair_is_keyed_by_its_rollout_pass_and_group():
    """With a part of the key left out the same noise would be trained on in every pass, or in every rollout."""
    batch = buffer(micro_batches=1).micro_batch(2)
    assert sorted(batch.places) == [(5, 2, group) for group in GROUPS]
    assert sorted(buffer(micro_batches=1, index=0).micro_batch(0).places) == [(0, 0, group) for group in GROUPS]


def test_any_number_of_processes_goes_on_from_a_checkpoint_with_the_same_pairs(tmp_path):
    buffer().save(tmp_path)
    buffer(process=(1, 2), seed=9, saves=False).save(tmp_path)  # another process, which writes nothing
    batching = Batching(2, 1, (1, 2), keep_in_step=False)
    loaded = PairBuffer.load(tmp_path, batching, torch.device("cpu"), lambda requests: [])
    expected = buffer(2, process=(1, 2))
    assert [a_pass(loaded, number) for number in range(2)] == [a_pass(expected, number) for number in range(2)]
    assert loaded.micro_batch(1).places == expected.micro_batch(1).places
    assert loaded.micro_batch(1).groups == expected.micro_batch(1).groups
