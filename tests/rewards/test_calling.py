"""Calling rewards and holding them to their contract: one number or None for each image."""

import asyncio
import dataclasses
import functools
import math
import threading
import time
from collections import OrderedDict
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
import torch
from PIL import Image

from rewards import RewardError, RewardUnavailable, load_rewards, score
from rewards.calling import score_all, score_one
from rewards.remote.timed import Timed
from rewards.threads import in_thread

IMAGES = [Image.new("RGB", (4, 4), color) for color in ("red", "green", "blue")]
PROMPTS = ["a", "b", "c"]
NAN = math.nan


def returning(value, name="returning"):
    def reward(images, prompts):
        return value

    reward.__name__ = name
    return reward


def scores_of(*functions, columns=None, images=IMAGES, prompts=PROMPTS):
    return score(load_rewards(list(functions)), images, prompts, columns or {})


# --- What is a score ---


@pytest.mark.parametrize(
    ("result", "expected"),
    [
        ([0.5, 1, -2.0], [0.5, 1.0, -2.0]),
        ((0.5, 1, 2), [0.5, 1.0, 2.0]),
        (range(3), [0.0, 1.0, 2.0]),
        ([None, NAN, 1.0], [NAN, NAN, 1.0]),
        ([math.inf, -math.inf, 1.0], [NAN, NAN, 1.0]),
        ([True, False, True], [1.0, 0.0, 1.0]),
        ([10**400, 1, 2], [NAN, 1.0, 2.0]),
        ([Fraction(1, 2), np.float16(0.25), np.int8(3)], [0.5, 0.25, 3.0]),
        (np.array([0.5, np.nan, np.inf]), [0.5, NAN, NAN]),
        (np.array([1, 2, 3]), [1.0, 2.0, 3.0]),
        (np.array([True, False, True]), [1.0, 0.0, 1.0]),
        (np.array([None, 1.0, 2.0], dtype=object), [NAN, 1.0, 2.0]),
        (np.zeros((3, 1)), [0.0, 0.0, 0.0]),
        ([np.array(0.5), np.array([1.0]), np.float64(2)], [0.5, 1.0, 2.0]),
        (torch.tensor([0.5, math.inf, 2.0]), [0.5, NAN, 2.0]),
        (torch.tensor([1.0, 2.0, 3.0], dtype=torch.bfloat16), [1.0, 2.0, 3.0]),
        (torch.ones(3, requires_grad=True), [1.0, 1.0, 1.0]),
        ([torch.tensor(0.5), torch.tensor([1.5]), torch.tensor(2)], [0.5, 1.5, 2.0]),
    ],
)
def test_numbers_are_scores_and_what_is_no_finite_number_is_not_scored(result, expected):
    scores, failures = scores_of(returning(result))
    assert not failures and all(type(value) is float for value in scores[0])
    assert scores == [pytest.approx(expected, nan_ok=True)]


@pytest.mark.parametrize("result", [[1.0, 2.0], [1.0] * 4, [], np.zeros(2), torch.zeros(1), ()])
def test_a_wrong_number_of_scores_is_refused(result):
    with pytest.raises(RewardError, match=rf"'mine' returned {len(result)} scores for 3 images"):
        scores_of(returning(result, "mine"))


@pytest.mark.parametrize(
    ("result", "found"),
    [
        ("abc", "str"),
        (b"abc", "bytes"),
        (None, "NoneType"),
        (1.0, "float"),
        ((value for value in (1.0, 2.0, 3.0)), "generator"),
        (iter([1.0, 2.0, 3.0]), "list_iterator"),
        ({0: 1.0, 1: 2.0, 2: 3.0}, "dict"),
        (OrderedDict({0: 1.0, 1: 2.0, 2: 3.0}), "OrderedDict"),
        ({1.0, 2.0, 3.0}, "set"),
        (frozenset({1.0, 2.0, 3.0}), "frozenset"),
        (np.array(1.0), "ndarray"),
        (torch.tensor(1.0), "Tensor"),
    ],
)
def test_what_is_no_list_is_refused_by_its_type(result, found):
    with pytest.raises(RewardError, match=rf"'mine' returned {found}, not a list of 3 scores"):
        scores_of(returning(result, "mine"))


@pytest.mark.parametrize(
    ("value", "found"),
    [
        ("0.5", "str"),
        (1j, "complex"),
        (np.complex64(1j), "complex"),
        (Decimal("0.5"), "Decimal"),
        ([0.5], "list"),
        ({}, "dict"),
        (np.zeros(3), "ndarray"),
        (np.zeros(0), "ndarray"),
        (torch.zeros(3), "Tensor"),
        (torch.zeros(0), "Tensor"),
        (np.str_("a"), "str"),
    ],
)
def test_what_is_no_number_is_refused_with_its_image(value, found):
    with pytest.raises(RewardError, match=rf"(?s)'mine' returned .*{found}.* for image 1, not a number or None"):
        scores_of(returning([0.0, value, 0.0], "mine"))


# --- What a reward is given ---


def test_a_reward_gets_images_prompts_and_the_columns_it_names():
    seen = {}

    def named(images, prompts, target, absent=5):
        seen["named"] = (images, prompts, target, absent)
        return [0.0] * len(images)

    def everything(images, prompts, **columns):
        seen["everything"] = columns
        return [0.0] * len(images)

    def nothing(images, prompts):
        return [0.0] * len(images)

    columns = {"target": [1, 2, 3], "other": [None, {}, "x"]}
    _, failures = scores_of(named, everything, nothing, columns=columns)
    assert not failures
    assert seen == {"named": (IMAGES, PROMPTS, [1, 2, 3], 5), "everything": columns}


def test_a_keyword_only_column_is_given_by_name():
    def keyword_only(images, prompts, *, target, scale=2.0):
        return [scale * value for value in target]

    assert scores_of(keyword_only, columns={"target": [1, 2, 3]}) == ([[2.0, 4.0, 6.0]], {})
    assert scores_of(keyword_only, columns={"target": [1, 2, 3], "scale": 3}) == ([[3.0, 6.0, 9.0]], {})


def test_instances_and_partials_are_called():
    class Instance:
        def __call__(self, images, prompts, target):
            return target

    partial = functools.partial(lambda images, prompts, scale: [scale for _ in images], scale=4)
    scores, failures = scores_of(Instance(), partial, columns={"target": [1, 2, 3]})
    assert (scores, failures) == ([[1.0, 2.0, 3.0], [4.0, 4.0, 4.0]], {})


def test_no_images_are_no_scores():
    assert scores_of(lambda images, prompts: [], images=[], prompts=[]) == ([[]], {})


# --- Failures ---


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_reward_that_raises_is_reported_and_the_others_are_scored(asynchronous):
    def failing(images, prompts):
        raise ValueError("no such file: weights.bin")

    async def failing_later(images, prompts):
        await asyncio.sleep(0)
        raise ValueError("no such file: weights.bin")

    bad = failing_later if asynchronous else failing
    scores, failures = scores_of(returning([1, 2, 3], "first"), bad, returning([4, 5, 6], "last"))
    assert failures == {bad.__name__: "ValueError: no such file: weights.bin"}
    assert scores == [[1.0, 2.0, 3.0], pytest.approx([NAN] * 3, nan_ok=True), [4.0, 5.0, 6.0]]


def test_a_column_that_is_missing_after_all_is_a_failure_of_that_reward():
    def needs(images, prompts, target):
        return target

    scores, failures = scores_of(needs, returning([1, 2, 3]))
    assert list(failures) == ["needs"] and "target" in failures["needs"]
    assert scores[1] == [1.0, 2.0, 3.0]


@pytest.mark.parametrize("asynchronous", [False, True])
def test_what_a_reward_changes_reaches_no_other_and_not_the_caller(asynchronous):
    """A thumbnail made in place once made the next reward, and the saved rollouts, see 16 x 16 pixels."""

    def careless(images, prompts, spec):
        for image, of in zip(images, spec, strict=True):
            image.thumbnail((2, 2))
            of["seen"] = True
        images.pop()
        prompts.clear()
        return [0.0] * 3

    async def later(images, prompts, spec):
        return careless(images, prompts, spec)

    def careful(images, prompts, spec):
        return [image.width + len(of) for image, of in zip(images, spec, strict=True)]

    images, prompts = [Image.new("RGB", (8, 8)) for _ in range(3)], ["a", "b", "c"]
    columns = {"spec": [{} for _ in range(3)]}
    rewards = load_rewards([later if asynchronous else careless, careful])
    assert score(rewards, images, prompts, columns) == ([[0.0] * 3, [8.0] * 3], {})
    assert [image.width for image in images] == [8] * 3 and prompts == ["a", "b", "c"] and columns["spec"] == [{}] * 3


@pytest.mark.parametrize("error", [SystemExit(0), asyncio.CancelledError(), StopIteration()])
@pytest.mark.parametrize("how", ["plain", "async", "in a thread", "with a time-out"])
def test_a_reward_that_ends_the_program_has_failed(error, how):
    def ending(images, prompts):
        raise error

    async def ending_later(images, prompts):
        raise error

    (reward,) = load_rewards([ending_later if how == "async" else ending])
    if how == "with a time-out":
        reward = dataclasses.replace(reward, function=Timed("ending", ending, 10))
    if how == "in a thread":  # as the service calls it
        with pytest.raises(RuntimeError, match=type(error).__name__):
            asyncio.run(asyncio.wait_for(in_thread(score_one, reward, IMAGES, PROMPTS, {}), 10))
        return
    _, failures = score([reward], IMAGES, PROMPTS, {})
    assert type(error).__name__ in failures[reward.name]


@pytest.mark.parametrize("ends", ["module", "factory"])
def test_a_reward_that_ends_the_program_when_loaded_is_an_import_error(tmp_path, ends):
    file = tmp_path / "ends.py"
    file.write_text("import sys\n" + ("sys.exit(3)" if ends == "module" else "def make():\n    sys.exit(3)\n"))
    with pytest.raises(ImportError, match=r"reward entry .*ends\.py.* ended the program \(SystemExit: 3\)"):
        load_rewards([{"use": f"{file}:make", "args": {}}])


def test_a_plain_reward_takes_no_time_of_one_beside_it():
    def plain(images, prompts):
        time.sleep(0.6)
        return [float(threading.get_ident() != here)] * 3

    async def quick(images, prompts):
        async with asyncio.timeout(0.3):
            for _ in range(5):
                await asyncio.sleep(0.02)
        return [2.0] * 3

    here = threading.get_ident()
    assert scores_of(plain, quick) == ([[1.0] * 3, [2.0] * 3], {})
    assert scores_of(plain)[0] == [[0.0] * 3]  # alone, in the thread that asked


def test_plain_rewards_take_turns_also_beside_an_async_one():
    inside, most = [], []

    def plain(images, prompts):
        inside.append(1)
        most.append(len(inside))
        time.sleep(0.05)
        inside.pop()
        return [1.0] * 3

    async def later(images, prompts):
        return [2.0] * 3

    assert scores_of(plain, functools.partial(plain), later) == ([[1.0] * 3, [1.0] * 3, [2.0] * 3], {})
    assert most == [1, 1]


def test_an_interrupt_is_not_swallowed():
    def interrupted(images, prompts):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        scores_of(interrupted)


# --- Async ---


def meeting(mine: asyncio.Event, other: asyncio.Event, value: float, name: str):
    """A reward that answers only once another one has started."""

    async def reward(images, prompts):
        mine.set()
        await asyncio.wait_for(other.wait(), timeout=10)
        return [value for _ in images]

    reward.__name__ = name
    return reward


def test_async_rewards_wait_on_each_others_side():
    one, two = asyncio.Event(), asyncio.Event()
    scores, failures = scores_of(meeting(one, two, 1.0, "one"), meeting(two, one, 2.0, "two"))
    assert (scores, failures) == ([[1.0] * 3, [2.0] * 3], {})


class Client:
    """Like an HTTP client that is made once: it belongs to the loop of its first call, and must be closed there."""

    def __init__(self):
        self.limit, self.closed = asyncio.Semaphore(1), False

    async def __call__(self, images, prompts):
        async def one():
            async with self.limit:
                await asyncio.sleep(0.001)
                return 1.0

        return await asyncio.gather(*(one() for _ in images))

    async def close(self):
        async with self.limit:
            self.closed = True


@pytest.mark.parametrize("timeout", [None, 10])
def test_what_an_async_reward_makes_once_serves_every_call(timeout):
    client = Client()
    (reward,) = load_rewards([client])
    if timeout:
        reward = dataclasses.replace(reward, function=Timed("client", client, timeout))
    for _ in range(3):
        assert score([reward], IMAGES, PROMPTS, {}) == ([[1.0] * 3], {})
    reward.close()
    assert client.closed


def test_a_task_of_an_async_reward_that_ends_the_program_has_failed_and_the_next_call_works():
    async def ending(images, prompts):
        async def end():
            raise SystemExit(3)

        await asyncio.create_task(end())

    async def fine(images, prompts):
        return [1.0] * 3

    assert "SystemExit" in scores_of(ending)[1]["ending"]
    assert scores_of(fine) == ([[1.0] * 3], {})


def test_scores_keep_the_order_of_the_rewards_whichever_answers_first():
    async def slow(images, prompts):
        for _ in range(10):
            await asyncio.sleep(0)
        return [1.0 for _ in images]

    async def quick(images, prompts):
        return [2.0 for _ in images]

    assert scores_of(slow, returning([3, 3, 3], "plain"), quick) == ([[1.0] * 3, [3.0] * 3, [2.0] * 3], {})


def test_a_plain_function_does_not_keep_rewards_that_run_elsewhere_from_starting():
    started = threading.Event()

    def plain(images, prompts):
        return [float(started.wait(timeout=10)) for _ in images]

    async def elsewhere(images, prompts):
        await in_thread(started.set)
        return [2.0 for _ in images]

    assert scores_of(plain, elsewhere) == ([[1.0] * 3, [2.0] * 3], {})


def test_what_was_given_up_is_told_without_the_name_of_our_class():
    def lost(images, prompts):
        raise RewardUnavailable("given up after 3 tries: http://host: ConnectError")

    def broken(images, prompts):
        raise RewardError("reward 'there' returned 2 scores for 3 images")

    assert scores_of(lost)[1] == {"lost": "given up after 3 tries: http://host: ConnectError"}
    with pytest.raises(RewardError, match="'there' returned 2 scores"):
        scores_of(returning([1, 2, 3]), broken)


def test_a_callable_that_returns_an_awaitable_is_awaited():
    async def answer(images):
        return [1.0 for _ in images]

    assert scores_of(lambda images, prompts: answer(images)) == ([[1.0] * 3], {})


@pytest.mark.parametrize("asynchronous", [False, True])
def test_scoring_works_inside_a_running_event_loop(asynchronous):
    """A notebook's cells run inside one."""

    async def answer(images, prompts):
        await asyncio.sleep(0)
        return [1.0 for _ in images]

    async def cell():
        return scores_of(answer if asynchronous else returning([1.0, 1.0, 1.0]))

    assert asyncio.run(cell()) == ([[1.0] * 3], {})


# --- What a reward returns beside its scores ---


@pytest.mark.parametrize("asynchronous", [False, True])
def test_further_numbers_come_back_by_name(asynchronous):
    def plain(images, prompts):
        return [1.0] * len(images), {"length": [len(prompt) for prompt in prompts], "calls": 7, "unknown": [None, 2.0]}

    async def later(images, prompts):
        return plain(images, prompts)

    found = score_all(load_rewards([later if asynchronous else plain]), IMAGES, PROMPTS, {})
    name = "later" if asynchronous else "plain"
    assert found.scores == [[1.0] * len(IMAGES)] and not found.failures
    assert found.extras[f"{name}/length"] == [len(prompt) for prompt in PROMPTS]
    assert found.extras[f"{name}/calls"] == [7.0] and math.isnan(found.extras[f"{name}/unknown"][0])
    answer = score_one(*load_rewards([plain]), IMAGES, PROMPTS, {})
    assert answer.scores == [1.0] * len(IMAGES) and answer.extras["unknown"] == [None, 2.0]


@pytest.mark.parametrize("extra", ["text", b"x", {"a": 1}, ["x"], object(), 1j])
def test_an_extra_that_is_no_number_is_refused_by_its_name(extra):
    with pytest.raises(
        RewardError, match=r"'returning' returned an extra 'odd' that is \w+, not a number or a list of them"
    ):
        scores_of(returning(([0.0] * len(IMAGES), {"odd": extra})))


@pytest.mark.parametrize("name", ["mean", "std", "unscored", "truncated"])
def test_an_extra_does_not_take_the_name_of_what_is_logged_of_the_scores(name):
    with pytest.raises(RewardError, match="which the log has of its scores: rename it"):
        scores_of(returning(([0.0] * len(IMAGES), {name: 1.0})))


def test_two_scores_in_a_tuple_are_two_scores():
    assert scores_of(returning((0.25, 0.5)), images=IMAGES[:2], prompts=PROMPTS[:2])[0] == [[0.25, 0.5]]
