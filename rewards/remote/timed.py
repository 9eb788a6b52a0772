"""A reward in this process that may take so long and no longer."""

import asyncio
import inspect
import threading
from collections.abc import Awaitable, Callable
from typing import Any

from rewards.contract import RewardUnavailable
from rewards.remote.threads import in_thread


class Timed:
    """A reward in this process, whose calls may take ``timeout`` seconds.

    It is called in a thread, async or not. A thread that hangs cannot be killed: the call is given up
    (RewardUnavailable), and so is every later one until that thread comes back. A reward with an ``environment`` of its
    own is killed and goes on.
    """

    def __init__(self, name: str, function: Callable[..., Any], timeout: float) -> None:
        self.name, self.function, self.timeout = name, function, timeout
        self._busy = threading.Event()

    async def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self._busy.is_set():
            raise RewardUnavailable(
                f"still busy with a call that was given up after {self.timeout:g} s; with an `environment` of its own "
                "it would be killed and started again"
            )
        return await self._in_time(in_thread(self._finish, args, kwargs))

    def _finish(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self._busy.set()
        try:
            result = self.function(*args, **kwargs)
            # A loop of its own: an async reward that blocks keeps no other waiting, and one that only waits is cancelled.
            return asyncio.run(self._in_time(result)) if inspect.isawaitable(result) else result
        finally:
            self._busy.clear()

    async def _in_time(self, result: Awaitable[Any]) -> Any:
        call = asyncio.ensure_future(result)
        await asyncio.wait({call}, timeout=self.timeout)  # what is there counts, however late this is told
        if call.done():
            return call.result()
        call.cancel()
        raise RewardUnavailable(f"took longer than {self.timeout:g} s")

    def close(self) -> None:
        """Close the reward, if it knows how to."""
        close = getattr(self.function, "close", None)
        if callable(close):
            close()
