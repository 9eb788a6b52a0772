"""Calls in threads that do not keep a program from ending, and the event loop of async rewards."""

import asyncio
import concurrent.futures
import contextlib
import inspect
import sys
import threading
from collections.abc import Awaitable, Callable, Coroutine
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


class EventLoop:
    """An event loop in a daemon thread of its own, which begins when it is first asked for.

    What an async reward makes once (a client, a semaphore, a lock) belongs to one loop, so that all its calls must run on
    the same one.
    """

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None
        self._starting = threading.Lock()

    async def call(self, function: Callable[[], Any]) -> Any:
        """Call a function on this loop, and await there what it returns; awaited on any other loop."""
        return await asyncio.wrap_future(self._submit(self._awaited(function)))

    def wait_for(self, result: Awaitable[Any]) -> Any:
        """Await a result on this loop, and return it to a thread that has none."""
        future = self._submit(self._awaited(lambda: result))
        try:
            return future.result()
        finally:
            future.cancel()  # of an interrupt: nobody waits for it any more

    def _submit(self, work: Coroutine[Any, Any, Any]) -> concurrent.futures.Future[Any]:
        with self._starting:
            if self._loop is None:
                self._loop = asyncio.new_event_loop()
                threading.Thread(target=self._run, daemon=True, name="async rewards").start()
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def _awaited(self, function: Callable[[], Any]) -> Coroutine[Any, Any, Any]:
        set_device = _set_current_device()

        async def work() -> Any:
            set_device()
            result = function()
            return await result if inspect.isawaitable(result) else result

        return work()

    def _run(self) -> None:
        assert self._loop is not None
        while True:
            with contextlib.suppress(SystemExit, KeyboardInterrupt):  # of a task, which whoever awaits it is told of
                self._loop.run_forever()


#: On which all rewards of this process run that are async.
REWARDS_LOOP = EventLoop()


def _set_current_device() -> Callable[[], None]:
    """Return a function that sets CUDA's current device, which belongs to a thread, to the one of this thread."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return lambda: None
    device = torch.cuda.current_device()
    return lambda: torch.cuda.set_device(device)
