"""Calls in threads that do not keep a program from ending."""

import asyncio
import contextlib
import sys
import threading
from collections.abc import Callable
from typing import Any


async def in_thread(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call a function in a daemon thread and return its result.

    An interrupted run ends without waiting for the thread, while threads of `asyncio.to_thread` are waited for at the
    end of the loop and of the program.
    """
    loop = asyncio.get_running_loop()
    future: asyncio.Future[Any] = loop.create_future()
    set_device = _set_current_device()

    def settle(result: Any, error: BaseException | None) -> None:
        if future.done():  # cancelled in the meantime
            return
        if error is None:
            future.set_result(result)
        else:
            future.set_exception(error)

    def work() -> None:
        result, raised = None, None
        try:
            set_device()
            result = function(*args, **kwargs)
        except BaseException as error:  # raised by the await, as a type that every loop and future accepts
            is_accepted = isinstance(error, Exception) and not isinstance(error, StopIteration)
            raised = error if is_accepted else RuntimeError(f"{type(error).__name__}: {error}")
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody awaits the result
            loop.call_soon_threadsafe(settle, result, raised)

    threading.Thread(target=work, daemon=True, name="reward").start()
    return await future


def _set_current_device() -> Callable[[], None]:
    """Return a function that sets CUDA's current device, which belongs to a thread, to the one of this thread."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return lambda: None
    device = torch.cuda.current_device()
    return lambda: torch.cuda.set_device(device)
