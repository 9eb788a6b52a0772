"""The transitions and points of one rollout, given out in micro-batches."""

from collections import Counter
from itertools import chain

import pytest
import torch
from safetensors import safe_open

from align.maths.flow import StochasticSampler, Transition
from align.models.contract import Request
from align.online.buffers import Batching, MicroBatch, PointBuffer, RolloutBuffer, TransitionBuffer

torch.set_num_threads(1)

IMAGES, STEPS = 6, (0, 2, 3)
SIGMAS = {0: (1.0, 0.9), 2: (0.7, 0.5), 3: (0.5, 0.2)}
TOTAL = IMAGES * len(STEPS)
SAMPLER = StochasticSampler(0.7, sigma_max=0.9)
#: Images that carry gradient; the others belong to dead groups.
SOME = (True, False, True, True, False, True)

CPU = torch.device("cpu")


def batching(micro_batches=3, per_update=1, process=(0, 1), keep_in_step=False) -> Batching:
    return Batching(micro_batches, per_update, process, keep_in_step)


def encode(requests) -> list[str]:
    """A condition that tells its request."""
    return [f"condition of {request.prompt}" for request in requests]


def requests_of(images) -> list[Request]:
    return [Request(f"prompt {image}") for image in images]


def buffer(
    informative=SOME,
    micro_batches=3,
    per_update=1,
    seed=5,
    keep_in_step=False,
    sampler=SAMPLER,
    index=7,
    of=(0, 1),
    starts=None,
) -> TransitionBuffer:
    """A rollout of random latents; each row can be told by its first entry, position of the step * 10 + image.

    ``of`` is (process, processes): each has an equal share of the images.
    """
    share = IMAGES // of[1]
    mine = slice(of[0] * share, (of[0] + 1) * share)
    generator = torch.Generator().manual_seed(1)
    transitions = []
    for position, step in enumerate(STEPS):
        latents, velocity, noise = torch.randn(3, IMAGES, 4, 2, generator=generator)
        latents[:, 0, 0] = position * 10.0 + torch.arange(IMAGES)
        sigma, sigma_next = (torch.full((IMAGES,), value) for value in SIGMAS[step])
        transitions.append(sampler.transition(latents, velocity, sigma, sigma_next, noise=noise)[mine])
    return TransitionBuffer(
        transitions=Transition.cat(transitions),
        requests=requests_of(range(IMAGES))[mine],
        conditions=encode(requests_of(range(IMAGES)))[mine],
        advantages=(torch.arange(IMAGES) - 2.5)[mine],
        informative=torch.tensor(informative),
        first=mine.start,
        steps=STEPS,
        sampler=sampler,
        starts=starts,
        rollout_index=index,
        seed=seed,
        batching=batching(micro_batches, per_update, of, keep_in_step),
    )


def rows(batch: MicroBatch) -> list[int]:
    """Which rows a micro-batch holds, by their latents."""
    return [int(value) for value in batch.transition.latents[:, 0, 0]]


def given_out(source: TransitionBuffer, number: int) -> list[list[int]]:
    """The rows of every micro-batch of pass ``number``."""
    count = source.batching.micro_batches
    return [rows(source.micro_batch(number * count + part)) for part in range(count)]


def live_rows(informative) -> list[int]:
    return [position * 10 + image for position in range(len(STEPS)) for image in range(IMAGES) if informative[image]]


def same(a: MicroBatch, b: MicroBatch) -> bool:
    tensors = all(torch.equal(getattr(a.transition, name), value) for name, value in vars(b.transition).items())
    rest = torch.equal(a.advantages, b.advantages) and torch.equal(a.weights, b.weights)
    others = ("images", "nominal_size", "distinct", "conditions", "velocity_of")
    return (
        tensors
        and rest
        and torch.equal(a.step_positions, b.step_positions)
        and all(getattr(a, name) == getattr(b, name) for name in others)
    )


PATTERNS = [SOME, (True,) * 6, (False,) * 6, (True, *(False,) * 5), (False, False, False, False, True, True)]


# --- Giving out ---


@pytest.mark.parametrize("informative", PATTERNS)
@pytest.mark.parametrize("micro_batches", [1, 2, 3, 6, 18])
def test_a_pass_gives_out_every_live_row_once_and_no_dead_one(informative, micro_batches):
    source = buffer(informative, micro_batches)
    for number in range(3):
        parts = given_out(source, number)
        assert Counter(row for part in parts for row in part) == Counter(live_rows(informative))
        assert max(map(len, parts)) <= TOTAL // micro_batches


def test_every_row_keeps_its_prompt_advantage_and_step():
    source = buffer(micro_batches=4)
    for part in range(4):
        batch = source.micro_batch(part)
        steps, images = zip(*(divmod(row, 10) for row in rows(batch)), strict=True)
        assert batch.images == list(images)
        assert batch.conditions == encode(requests_of(images[row] for row in batch.distinct))
        assert batch.advantages.tolist() == [image - 2.5 for image in images]
        assert batch.step_positions.tolist() == list(steps)
        sigmas = [SIGMAS[STEPS[step]] for step in steps]
        pairs = torch.stack([batch.transition.sigma, batch.transition.sigma_next], 1)
        assert torch.equal(pairs, torch.tensor(sigmas))
        assert len(batch) == len(images)


def test_a_given_row_carries_the_log_probability_of_the_noise_that_drew_it():
    source = buffer(informative=(True,) * 6, micro_batches=1)
    drawn = source.micro_batch(0).transition
    noise = (drawn.next_latents - drawn.mean) / drawn.std
    expected = (-(noise**2) / 2 - drawn.std.log() - 0.5 * torch.log(torch.tensor(2 * torch.pi))).flatten(1).mean(1)
    torch.testing.assert_close(drawn.log_prob, expected)


def test_steps_are_mixed_within_a_micro_batch():
    source = buffer(informative=(True,) * 6, micro_batches=2)
    assert all(len(set(source.micro_batch(part).step_positions.tolist())) == len(STEPS) for part in range(2))


def test_each_pass_has_another_order():
    source = buffer(informative=(True,) * 6)
    orders = [tuple(row for part in given_out(source, number) for row in part) for number in range(4)]
    assert len(set(orders)) == 4 and orders[0] != tuple(sorted(orders[0]))


def test_the_order_is_a_function_of_the_seed():
    first = given_out(buffer(), 1)
    torch.manual_seed(99)
    assert given_out(buffer(), 1) == first
    assert given_out(buffer(seed=6), 1) != first and given_out(buffer(index=8), 1) != first


@pytest.mark.parametrize("informative", PATTERNS)
@pytest.mark.parametrize("processes", [2, 3])
def test_an_update_is_made_of_the_same_rows_whatever_the_number_of_processes(informative, processes):
    alone = buffer(informative, micro_batches=6, per_update=processes)
    shared = [buffer(informative, micro_batches=6 // processes, of=(n, processes)) for n in range(processes)]
    for number in range(2):
        parts = given_out(alone, number)
        for part in range(6 // processes):  # as many micro-batches of one process as there are processes make an update
            together = sorted(row for source in shared for row in given_out(source, number)[part])
            assert together == sorted(row for own in parts[part * processes : (part + 1) * processes] for row in own)
    assert sum(source.micro_batch(0).nominal_size for source in shared) == alone.micro_batch(0).nominal_size * processes


@pytest.mark.parametrize("informative", PATTERNS)
@pytest.mark.parametrize(("updates", "per_update"), [(1, 3), (2, 3), (3, 1)])
@pytest.mark.parametrize("starts", [None, [0, 0, 0, 3, 3, 3]])
def test_a_process_spreads_its_rows_of_an_update_over_its_parts(informative, updates, per_update, starts):
    sizes, parts = [], updates * per_update
    shared = [buffer(informative, parts, per_update, of=(n, 2), starts=starts) for n in range(2)]
    alone = buffer(informative, parts, per_update, starts=starts)
    for update in range(updates):
        mine = slice(update * per_update, (update + 1) * per_update)
        one, two = (given_out(source, 0)[mine] for source in shared)
        assert sorted(chain(*one, *two)) == sorted(chain(*given_out(alone, 0)[mine]))
        for own in (one, two):
            count = [len(part) for part in own]
            assert max(count) - min(count) <= 1
            sizes += count
    assert max(sizes) <= -(-9 // parts)  # 3 images x 3 steps on each process: never more than the batch size


@pytest.mark.parametrize("processes", [1, 2, 4, 8])
@pytest.mark.parametrize("updates", [1, 2, 3, 4])
@pytest.mark.parametrize("shared", [False, True])
def test_no_micro_batch_is_larger_than_the_batch_size(processes, updates, shared):
    """Or a GPU runs out of memory in the middle of the night: with groups of 8 that share a start, and some of them dead."""
    generator = torch.Generator().manual_seed(0)
    for number in range(20):
        informative = (torch.rand(64, generator=generator) < 0.7).repeat_interleave(8 if number % 2 else 1)[:64]
        for process in range(processes):
            images = 64 // processes
            source = RolloutBuffer(
                requests=requests_of(range(images)), conditions=[None] * images, informative=informative,
                first=process * images, rollout_index=number, seed=3,
                batching=Batching(2 * updates, 2, (process, processes), keep_in_step=False),
            )  # fmt: skip
            starts = torch.arange(64) // 8 * 8 if shared else None
            for index in range(4 * updates):  # two passes of micro-batches, two of which make an update
                for dead_too in (False, True):
                    rows = source._select_rows(index, 3, dead_too, starts)[1]
                    assert len(rows) <= images * 3 // (2 * updates), (process, index)


def test_a_micro_batch_can_be_asked_for_again_and_in_any_order():
    source = buffer()
    forwards = [source.micro_batch(part) for part in range(6)]
    backwards = [source.micro_batch(part) for part in reversed(range(6))][::-1]
    assert all(same(a, b) for a, b in zip(forwards, backwards, strict=True))


# --- Dead rows ---


@pytest.mark.parametrize("informative", PATTERNS)
@pytest.mark.parametrize("micro_batches", [1, 3, 6, 18])
@pytest.mark.parametrize("keep_in_step", [False, True])
def test_nominal_sizes_and_weights_add_up(informative, micro_batches, keep_in_step):
    source = buffer(informative, micro_batches, keep_in_step=keep_in_step)
    parts = [source.micro_batch(part) for part in range(micro_batches)]
    assert sum(part.nominal_size for part in parts) == pytest.approx(TOTAL)
    assert sum(part.weights.sum().item() for part in parts) == len(live_rows(informative))
    assert all(len(part.weights) == len(part) for part in parts)


def test_more_parts_than_live_rows_leave_parts_empty():
    informative = (True, *(False,) * 5)
    parts = [buffer(informative, micro_batches=6).micro_batch(part) for part in range(6)]
    assert sorted(map(len, parts)) == [0, 0, 0, 1, 1, 1]
    empty = next(part for part in parts if not len(part))
    assert empty.images == [] and empty.transition.latents.shape == (0, 4, 2) and empty.nominal_size == 3


@pytest.mark.parametrize("informative", [(False,) * 6, (True, *(False,) * 5)])
def test_keep_in_step_fills_an_empty_part_with_a_row_of_weight_nothing(informative):
    parts = [buffer(informative, micro_batches=6, keep_in_step=True).micro_batch(part) for part in range(6)]
    bare = [buffer(informative, micro_batches=6).micro_batch(part) for part in range(6)]
    for filled, empty in zip(parts, bare, strict=True):
        if len(empty):
            assert same(filled, empty) and filled.weights.tolist() == [1.0] * len(empty)
        else:
            assert len(filled) == 1 and filled.weights.tolist() == [0.0]
            assert filled.transition.log_prob.isfinite().all() and filled.images == [0]


@pytest.mark.parametrize("processes", [1, 2])
def test_rows_that_began_alike_are_given_out_together_and_need_one_velocity(processes):
    starts = [0, 1, 0, 3, 4, 3]  # images 0 and 2, and 3 and 5, have one initial noise
    for micro_batches in (1, 3, 5):
        parts = [
            buffer((True,) * 6, micro_batches, of=(process, processes), starts=starts) for process in range(processes)
        ]
        for number in range(4):
            velocities = 0
            for source in parts:
                for part in range(micro_batches):
                    batch = source.micro_batch(number * micro_batches + part)
                    found = rows(batch)
                    known = [(position, starts[image] if position == 0 else image) for position, image in
                             (divmod(row, 10) for row in found)]  # fmt: skip
                    assert [known[row] for row in batch.distinct] == list(dict.fromkeys(known))
                    assert [known[batch.distinct[place]] for place in batch.velocity_of] == known
                    velocities += len(batch.distinct)
            # 18 rows, four of which are two by two the same; the border of a part may lie between the two.
            assert 16 <= velocities <= 16 + min(2, micro_batches - 1)
            given_rows = sorted(row for source in parts for batch in given_out(source, number) for row in batch)
            assert given_rows == live_rows((True,) * 6)


def test_every_row_can_be_given_out_live_or_not():
    source = buffer(informative=(False,) * 6)
    batches = [source.micro_batch(part, dead_too=True) for part in range(3)]
    assert [len(batch) for batch in batches] == [6, 6, 6]
    assert sorted(row for batch in batches for row in rows(batch)) == live_rows((True,) * 6)


# --- In a checkpoint ---


@pytest.mark.parametrize(
    "sampler",
    [SAMPLER, StochasticSampler(0.5, "cps", 0.9), StochasticSampler(1.2, sigma_max=0.87, log_prob_reduction="sum")],
)
@pytest.mark.parametrize("keep_in_step", [False, True])
def test_saving_and_loading_goes_on_identically(tmp_path, sampler, keep_in_step):
    source = buffer(keep_in_step=keep_in_step, sampler=sampler, micro_batches=4, starts=[0, 0, 2, 3, 4, 3])
    source.save(tmp_path)
    how = batching(4, keep_in_step=keep_in_step)
    loaded = TransitionBuffer.load(tmp_path, how, torch.device("cpu:0"), encode)  # as launchers say it
    for name, value in vars(source.transitions).items():
        stored = getattr(loaded.transitions, name)
        assert stored.dtype == value.dtype and torch.equal(stored, value), name
    assert torch.equal(loaded.advantages, source.advantages) and torch.equal(loaded.informative, source.informative)
    assert loaded.informative.dtype == torch.bool
    for name in ("requests", "conditions", "steps", "sampler", "rollout_index", "seed", "batching", "first", "starts"):
        assert getattr(loaded, name) == getattr(source, name), name
        assert type(getattr(loaded, name)) is type(getattr(source, name)), name
    assert all(same(loaded.micro_batch(part), source.micro_batch(part)) for part in range(12))


def test_what_is_saved_is_safetensors_of_plain_data(tmp_path):
    buffer().save(tmp_path)
    with safe_open(tmp_path / "rollout-0-of-1.safetensors", framework="pt") as stored:
        assert {"latents", "next_latents", "log_prob", "advantages", "informative"} <= set(stored.keys())
        assert "prompt 0" in stored.metadata()["rollout"]


@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1), (2, 6), (3, 2)])
def test_another_number_of_processes_goes_on_with_the_same_rows(tmp_path, before, after):
    """Each with its own images of the rollout, and with another number of micro-batches."""
    starts = [0, 1, 0, 3, 4, 3] if max(before, after) < 3 else None
    for part in range(before):
        buffer(of=(part, before), micro_batches=3, starts=starts).save(tmp_path)
    for index in range(after):
        loaded = TransitionBuffer.load(tmp_path, batching(6, 1, (index, after), True), CPU, encode)
        expected = buffer(of=(index, after), micro_batches=6, keep_in_step=True, starts=starts)
        assert loaded.first == expected.first and loaded.requests == expected.requests
        assert all(same(loaded.micro_batch(part), expected.micro_batch(part)) for part in range(12))


def test_a_missing_part_is_named(tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"rollout-0-of-2.safetensors is missing: .* in the middle of a rollout"
    ):
        TransitionBuffer.load(tmp_path, batching(process=(0, 2)), CPU, encode)
    buffer(of=(0, 2)).save(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"rollout-1-of-2.safetensors"):
        TransitionBuffer.load(tmp_path, batching(), CPU, encode)


# --- Images at noise levels ---


def points(informative=SOME, of=(0, 1), old=True, keep_in_step=False) -> PointBuffer:
    """Three levels of each of six images; an image is told by its latents, a row by its old velocity."""
    share = IMAGES // of[1]
    mine = torch.arange(of[0] * share, (of[0] + 1) * share)
    number = torch.cat([level * 10.0 + mine for level in range(3)])
    return PointBuffer(
        latents=mine.float().view(-1, 1, 1).expand(-1, 4, 2),
        sigma=number / 100,
        optimality=mine / 10,
        old_velocity=number.view(-1, 1, 1).expand(-1, 4, 2).contiguous() if old else None,
        requests=requests_of(mine.tolist()),
        conditions=encode(requests_of(mine.tolist())),
        informative=torch.tensor(informative),
        first=int(mine[0]),
        rollout_index=7,
        seed=5,
        batching=batching(process=of, keep_in_step=keep_in_step),
    )


def test_every_live_image_is_given_out_once_at_each_of_its_levels_with_all_that_is_its_own():
    batches = [points().micro_batch(part) for part in range(3)]
    found = sorted(int(value) for batch in batches for value in batch.old_velocity[:, 0, 0])
    assert found == sorted(level * 10 + image for level in range(3) for image in range(IMAGES) if SOME[image])
    for batch in batches:
        image, row = batch.latents[:, 0, 0], batch.old_velocity[:, 0, 0]
        assert torch.equal(row % 10, image) and torch.equal(batch.sigma, row / 100)
        assert torch.equal(batch.optimality, image / 10) and batch.images == image.int().tolist()
        assert batch.nominal_size == 6 and batch.noise.shape == (len(batch), 4, 2)
    noise = torch.cat([batch.noise for batch in batches]).flatten(1)
    assert torch.cdist(noise, noise).add(torch.eye(len(noise)) * 1e9).min() > 0.1


def test_points_and_their_noise_are_the_same_however_many_processes_share_them():
    def by_row(parts):
        return {int(v[0, 0]): n for part in parts for v, n in zip(part.old_velocity, part.noise, strict=True)}

    for part in range(6):  # two passes
        whole = by_row([points().micro_batch(part)])
        shared = by_row([points(of=(process, 2)).micro_batch(part) for process in range(2)])
        assert whole.keys() == shared.keys() and all(torch.equal(whole[row], shared[row]) for row in whole)
    first, second = (by_row([points().micro_batch(n + part) for part in range(3)]) for n in (0, 3))
    assert all(torch.equal(first[row], second[row]) for row in first)  # a second pass sees the same points


def test_an_empty_part_of_the_points_is_empty_or_one_row_of_weight_nothing():
    nothing = points((False,) * 6).micro_batch(0)
    assert len(nothing) == 0 and nothing.noise.shape == (0, 4, 2)
    kept = points((False,) * 6, keep_in_step=True).micro_batch(0)
    assert len(kept) == 1 and kept.weights.tolist() == [0.0]


@pytest.mark.parametrize("old", [False, True])
def test_points_go_on_identically_from_a_checkpoint(tmp_path, old):
    source = points(old=old)
    source.save(tmp_path)
    loaded = PointBuffer.load(tmp_path, batching(), torch.device("cpu:0"), encode)
    for part in range(6):
        one, other = source.micro_batch(part), loaded.micro_batch(part)
        assert one.images == other.images and one.nominal_size == other.nominal_size
        for name in ("latents", "noise", "sigma", "optimality", "rows", "weights"):
            assert torch.equal(getattr(one, name), getattr(other, name)), name
        assert torch.equal(one.old_velocity, other.old_velocity) if old else other.old_velocity is None


def test_points_of_other_processes_are_split_anew(tmp_path):
    for part in range(2):
        points(of=(part, 2)).save(tmp_path)
    for index in range(3):
        loaded = PointBuffer.load(tmp_path, batching(process=(index, 3)), CPU, encode)
        expected = points(of=(index, 3))
        for part in range(3):
            one, other = loaded.micro_batch(part), expected.micro_batch(part)
            for name in ("latents", "noise", "sigma", "optimality", "old_velocity"):
                assert torch.equal(getattr(one, name), getattr(other, name)), name
