"""Calls in threads that nobody has to wait for."""

import asyncio
import contextlib
import sys
import threading
from collections.abc import Callable
from typing import Any


async def in_thread(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """The function's result, from a daemon thread: an interrupted run ends without waiting for it.

    (`asyncio.to_thread` is waited for at the end of the loop and of the program.)
    """
    loop = asyncio.get_running_loop()
    future: asyncio.Future[Any] = loop.create_future()
    prepare = _device_of_this_thread()

    def settle(result: Any, error: BaseException | None) -> None:
        if future.done():  # given up meanwhile
            return
        if error is None:
            future.set_result(result)
        else:
            future.set_exception(error)

    def work() -> None:
        result, raised = None, None
        try:
            prepare()
            result = function(*args, **kwargs)
        except BaseException as error:  # raised where it is awaited; as an error that every loop and future takes
            plain = isinstance(error, Exception) and not isinstance(error, StopIteration)
            raised = error if plain else RuntimeError(f"{type(error).__name__}: {error}")
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody awaits it any more
            loop.call_soon_threadsafe(settle, result, raised)

    threading.Thread(target=work, daemon=True, name="reward").start()
    return await future


def _device_of_this_thread() -> Callable[[], None]:
    """CUDA's current device belongs to a thread: what sets that of this one in another."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return lambda: None
    device = torch.cuda.current_device()
    return lambda: torch.cuda.set_device(device)
