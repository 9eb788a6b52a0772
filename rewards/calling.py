"""Calling rewards and checking what they return."""

import asyncio
import inspect
import math
import numbers
from collections.abc import Coroutine, Mapping, Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from copy import deepcopy
from typing import Any, NamedTuple

from PIL import Image

from rewards.contract import Answer, Reward, RewardError, RewardFailed, RunsElsewhere, describe
from rewards.redaction import foreign
from rewards.threads import REWARDS_LOOP, EventLoop, in_thread


class Scores(NamedTuple):
    """Result of :func:`score_all`.

    scores: one list of N floats per reward, NaN for an image that was not scored (None, NaN or infinite). failures: what
    each failing reward raised, by its name; its scores are all NaN. extras: further numbers that a reward returned, by
    ``NAME/EXTRA``.
    """

    scores: list[list[float]]
    failures: dict[str, str]
    extras: dict[str, list[float]]


def score(
    rewards: Sequence[Reward],
    images: list[Image.Image],
    prompts: list[str],
    columns: Mapping[str, list[Any]],
) -> tuple[list[list[float]], dict[str, str]]:
    """Score images with every reward; return scores and failures as :func:`score_all` does."""
    return score_all(rewards, images, prompts, columns)[:2]


def score_all(
    rewards: Sequence[Reward],
    images: list[Image.Image],
    prompts: list[str],
    columns: Mapping[str, list[Any]],
) -> Scores:
    """Score images with every reward.

    Plain rewards are called one after the other: in this thread, or in other threads if an async reward is among them.
    All async rewards of a process run on one event loop, from the first call to the last. Each reward has copies of
    images, prompts and columns of its own, so that what it changes in them reaches nobody else.

    Args:
        images, prompts: N of each. columns: the other data columns, N values each.

    Raises:
        RewardError: a reward returned the wrong number of scores, or a score or an extra that is not a number.
    """
    results = _run_coroutine(_call_all(rewards, images, prompts, columns))
    found = Scores([], {}, {})
    for reward, result in zip(rewards, results, strict=True):
        if isinstance(result, Exception):
            found.failures[reward.name] = describe(result)
            found.scores.append([math.nan] * len(images))
            continue
        scores, extras = _checked(reward, result, len(images))
        found.scores.append(scores)
        found.extras.update({f"{reward.name}/{name}": values for name, values in extras.items()})
    return found


def score_one(
    reward: Reward,
    images: list[Image.Image],
    prompts: list[str],
    columns: Mapping[str, list[Any]],
    loop: EventLoop = REWARDS_LOOP,
) -> Answer:
    """Score images with one reward, for another process, as :func:`score_all` does, but raise what the reward raises.

    ``loop``: on which an async reward runs, always the same one.
    """
    (result,) = _run_coroutine(_call_all([reward], images, prompts, columns, loop))
    if isinstance(result, Exception):
        raise result
    scores, extras = _checked(reward, result, len(images))
    return Answer(_as_json(scores), {name: _as_json(values) for name, values in extras.items()})


def _as_json(values: Sequence[float]) -> list[float | None]:
    """Replace NaN, which JSON does not have, by None."""
    return [None if math.isnan(value) else value for value in values]


def _run_coroutine(calls: Coroutine[Any, Any, list[Any]]) -> list[Any]:
    """Run a coroutine to its end, also where an event loop is running already (in a notebook)."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(calls)
    with ThreadPoolExecutor(max_workers=1) as another_thread:
        return another_thread.submit(asyncio.run, calls).result()


async def _call_all(
    rewards: Sequence[Reward],
    images: list[Image.Image],
    prompts: list[str],
    columns: Mapping[str, list[Any]],
    loop: EventLoop = REWARDS_LOOP,
) -> list[Any]:
    """Call all rewards, the async ones concurrently; an error takes the place of a result."""

    # A plain reward would block the event loop, so that the timeouts of async rewards would fire too early. If there
    # are any, plain rewards therefore run in threads, one at a time.
    some_async, one_at_a_time = any(_is_async(reward.function) for reward in rewards), asyncio.Lock()

    async def call(reward: Reward) -> Any:
        try:
            if _is_async(reward.function):
                return await loop.call(lambda: _call(reward, images, prompts, columns))
            if some_async:
                async with one_at_a_time:
                    result = await in_thread(_call, reward, images, prompts, columns)
            else:
                result = _call(reward, images, prompts, columns)
            return await loop.call(lambda: result) if inspect.isawaitable(result) else result
        except RewardError:  # from a reward that runs elsewhere, where its scores were checked
            raise
        except (SystemExit, asyncio.CancelledError) as error:  # neither should end the run
            return RewardFailed(f"{type(error).__name__}: {error}")
        except (
            Exception
        ) as error:  # whatever a user's function raises is reported by name and counted, never taken for a 0
            return error

    return list(await asyncio.gather(*map(call, rewards)))


def _call(reward: Reward, images: list[Image.Image], prompts: list[str], columns: Mapping[str, list[Any]]) -> Any:
    """Call a reward with the columns that it takes, and with copies that it may change."""
    taken = {name: columns[name] for name in (columns if reward.columns is None else reward.columns) if name in columns}
    if isinstance(reward.function, RunsElsewhere):  # it sends them away
        return reward.function(images=images, prompts=prompts, **taken)
    copies = [image.copy() if isinstance(image, Image.Image) else image for image in images]
    return reward.function(images=copies, prompts=list(prompts), **deepcopy(taken))


def _is_async(function: Any) -> bool:
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__)


def _checked(reward: Reward, result: Any, expected: int) -> tuple[list[float], dict[str, list[float]]]:
    """Return the scores in what a reward returned, and the extras, if it returned both."""
    extras: Mapping[Any, Any] = {}
    if isinstance(result, tuple) and len(result) == 2 and isinstance(result[1], Mapping):
        result, extras = result
    numbers_by_name = {str(name): _check_extra(reward, name, value) for name, value in extras.items()}
    return _check_scores(reward, result, expected), numbers_by_name


def _check_scores(reward: Reward, result: Any, expected: int) -> list[float]:
    is_sequence = hasattr(result, "__len__") and hasattr(result, "__iter__") and getattr(result, "ndim", 1) > 0
    if not is_sequence or isinstance(result, (str, bytes, Mapping, Set)):
        raise RewardError(f"reward {reward.name!r} returned {type(result).__name__}, not a list of {expected} scores")
    if len(result) != expected:
        raise RewardError(f"reward {reward.name!r} returned {len(result)} scores for {expected} images")
    return [_to_float(reward, row, value) for row, value in enumerate(result)]


def _check_extra(reward: Reward, name: Any, value: Any) -> list[float]:
    """Return an extra as numbers: one, or as many as the reward likes."""
    if name in ("mean", "std", "unscored", "truncated"):
        raise RewardError(
            f"reward {reward.name!r} returned an extra {name!r}, which the log has of its scores: rename it"
        )
    several = (
        hasattr(value, "__iter__") and getattr(value, "ndim", 1) > 0 and not isinstance(value, (str, bytes, Mapping))
    )
    try:
        return [_to_float(reward, row, item) for row, item in enumerate(value if several else [value])]
    except RewardError:
        raise RewardError(
            f"reward {reward.name!r} returned an extra {name!r} that is {type(value).__name__}, not a number or a list of them"
        ) from None


def _to_float(reward: Reward, row: int, value: Any) -> float:
    """Return a score as a float, NaN for None or an infinite number; raise RewardError for anything else."""
    if value is None:
        return math.nan
    if not isinstance(value, numbers.Number) and hasattr(value, "item"):
        with suppress(ValueError, RuntimeError):  # a tensor or array with more than one element, which is refused below
            value = value.item()
    if isinstance(value, numbers.Real):
        try:
            number = float(value)
        except OverflowError:  # an integer that is larger than any float
            return math.nan
        return number if math.isfinite(number) else math.nan
    raise RewardError(
        f"reward {reward.name!r} returned {foreign(repr(value), longest=200)} ({type(value).__name__}) for image {row}, not a "
        "number or None"
    )
