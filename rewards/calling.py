"""Calling rewards and holding them to their contract."""

import asyncio
import functools
import inspect
import math
import numbers
from collections.abc import Coroutine, Mapping, Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

from PIL import Image

from rewards.contract import Reward, RewardError, RewardFailed, describe
from rewards.remote.threads import in_thread


def score(
    rewards: Sequence[Reward],
    images: list[Image.Image],
    prompts: list[str],
    columns: Mapping[str, list[Any]],
) -> tuple[list[list[float]], dict[str, str]]:
    """Score images by every reward.

    Plain rewards are called one after the other in this thread, or in others where an async one is among them.

    Args:
        images, prompts: N of each. columns: the other data columns, N values each.

    Returns:
        scores: one list of N floats per reward, NaN where an image was not scored (None, NaN or infinite).
        failures: name of the reward to what it raised; such a reward scored nothing this time.

    Raises:
        RewardError: a reward returned the wrong number of scores, or something that is not a number.
    """
    results = _run(_call_all(rewards, images, prompts, columns))
    scores, failures = [], {}
    for reward, result in zip(rewards, results, strict=True):
        if isinstance(result, Exception):
            failures[reward.name] = describe(result)
            scores.append([math.nan] * len(images))
        else:
            scores.append(_checked(reward, result, len(images)))
    return scores, failures


def score_one(
    reward: Reward, images: list[Image.Image], prompts: list[str], columns: Mapping[str, list[Any]]
) -> list[float]:
    """As :func:`score` for a single reward, but what it raises is raised."""
    (result,) = _run(_call_all([reward], images, prompts, columns))
    if isinstance(result, Exception):
        raise result
    return _checked(reward, result, len(images))


def as_json(scores: Sequence[float]) -> list[float | None]:
    """NaN, which JSON does not know, as None: not scored."""
    return [None if math.isnan(value) else value for value in scores]


def _run(calls: Coroutine[Any, Any, list[Any]]) -> list[Any]:
    """``asyncio.run``, from within a running event loop (a notebook) too."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(calls)
    with ThreadPoolExecutor(max_workers=1) as another_thread:
        return another_thread.submit(asyncio.run, calls).result()


async def _call_all(
    rewards: Sequence[Reward], images: list[Image.Image], prompts: list[str], columns: Mapping[str, list[Any]]
) -> list[Any]:
    """Async rewards wait on each other's side; what a reward raises is returned in its place."""

    # Beside an async reward a plain one must not keep the event loop, whose timers would find that reward too slow.
    # It has a thread then, and with others of its kind takes turns; otherwise it has this one.
    waiting, turn = any(_is_async(reward.function) for reward in rewards), asyncio.Lock()

    async def call(reward: Reward) -> Any:
        wanted = columns if reward.columns is None else {k: columns[k] for k in reward.columns if k in columns}
        run = functools.partial(reward.function, images=images, prompts=prompts, **wanted)
        try:
            if waiting and not _is_async(reward.function):
                async with turn:
                    result = await in_thread(run)
            else:
                result = run()
            return await result if inspect.isawaitable(result) else result
        except RewardError:  # of a reward that runs elsewhere, where its scores were checked
            raise
        except (SystemExit, asyncio.CancelledError) as error:  # neither is the end of the run
            return RewardFailed(f"{type(error).__name__}: {error}")
        except Exception as error:  # whatever a user's function raises: reported by name, counted, never a 0
            return error

    return list(await asyncio.gather(*map(call, rewards)))


def _is_async(function: Any) -> bool:
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__)


def _checked(reward: Reward, result: Any, expected: int) -> list[float]:
    listed = hasattr(result, "__len__") and hasattr(result, "__iter__") and getattr(result, "ndim", 1) > 0
    if not listed or isinstance(result, (str, bytes, Mapping, Set)):
        raise RewardError(f"reward {reward.name!r} returned {type(result).__name__}, not a list of {expected} scores")
    if len(result) != expected:
        raise RewardError(f"reward {reward.name!r} returned {len(result)} scores for {expected} images")
    return [_number(reward, row, value) for row, value in enumerate(result)]


def _number(reward: Reward, row: int, value: Any) -> float:
    if value is None:
        return math.nan
    if not isinstance(value, numbers.Number) and hasattr(value, "item"):
        with suppress(ValueError, RuntimeError):  # a tensor or array of another size than one: refused below
            value = value.item()
    if isinstance(value, numbers.Real):
        try:
            number = float(value)
        except OverflowError:  # a whole number beyond all floats
            return math.nan
        return number if math.isfinite(number) else math.nan
    raise RewardError(
        f"reward {reward.name!r} returned {value!r} ({type(value).__name__}) for image {row}, not a number or None"
    )
