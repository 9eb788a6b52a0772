"""A time limit for a reward in this process."""

import asyncio
import inspect
import threading
from collections.abc import Awaitable, Callable
from typing import Any

from rewards.contract import RewardUnavailable, close_callable
from rewards.threads import EventLoop, in_thread


class Timed:
    """A reward in this process whose calls may take ``timeout`` seconds.

    It is called in a thread, whether async or not. A thread that hangs cannot be killed: the call is given up
    (RewardUnavailable), and so is every later one until that thread returns. A reward with its own ``environment`` can
    be killed and started again.
    """

    def __init__(self, name: str, function: Callable[..., Any], timeout: float) -> None:
        self.name, self.function, self.timeout = name, function, timeout
        self._busy = threading.Event()
        # Its own, so that an async reward that blocks delays no other.
        self._loop = EventLoop()

    async def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self._busy.is_set():
            raise RewardUnavailable(
                f"still busy with a call that was given up after {self.timeout:g} s; with its own `environment` it would "
                "be killed and started again"
            )
        return await self._limit(in_thread(self._call, args, kwargs))

    def _call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self._busy.set()
        try:
            result = self.function(*args, **kwargs)
            return self._loop.wait_for(self._limit(result)) if inspect.isawaitable(result) else result
        finally:
            self._busy.clear()

    async def _limit(self, result: Awaitable[Any]) -> Any:
        """Await a result for ``timeout`` seconds, then cancel it and raise RewardUnavailable."""
        call = asyncio.ensure_future(result)
        await asyncio.wait({call}, timeout=self.timeout)  # a result counts, even if this thread learns of it late
        if call.done():
            return call.result()
        call.cancel()
        raise RewardUnavailable(f"took longer than {self.timeout:g} s")

    @property
    def truncated(self) -> int | None:
        """How many prompts the reward has cut; None if it does not count them."""
        return getattr(self.function, "truncated", None)

    def close(self) -> None:
        """Close the reward, if it can be closed."""
        close_callable(self.function, self._loop)
