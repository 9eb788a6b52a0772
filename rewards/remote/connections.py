"""The connections of a service: how many there may be, how long one may be silent, and how much is logged of them."""

import asyncio
import logging
import resource
import socket
import time
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

#: Seconds until the head of a request must have arrived, on a new connection and after each answer.
HEAD_SECONDS = 30.0
#: Lines of one kind that are logged in so many seconds.
LOGGED_LINES, LOGGED_SECONDS = 100, 60.0


def most_connections() -> int:
    """Return how many connections may be open: half of the files that this process may have open, at most 1024."""
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return 1024 if files == resource.RLIM_INFINITY else max(16, min(1024, files // 2))


def accepted_at_once() -> int:
    """Return how many connections asyncio may accept before it is seen that there are too many: its ``backlog``."""
    return most_connections() // 8


class Listening(socket.socket):
    """A listening socket whose queue in the kernel does not depend on how many connections are accepted at once."""

    def listen(self, backlog: int = 0) -> None:
        """Listen with a queue of 1024."""
        super().listen(1024)


class Connection(H11Protocol):
    """A connection that must bring a request in time, and makes room for others until it does.

    uvicorn's own limits begin where the head of a request is complete, and with it the check of the token.
    """

    idle_since = 0.0
    _end: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._expect_request()
        if len(self.connections) > most_connections():  # this one is idle, too
            idle = [other for other in self.connections if isinstance(other, Connection) and other.is_idle()]
            oldest = min(idle, key=lambda connection: connection.idle_since)
            oldest.transport.abort()
            self.connections.discard(oldest)  # at once, so that the next one in this turn of the loop ends another

    def connection_lost(self, exc: Exception | None) -> None:
        if self._end is not None:
            self._end.cancel()
        super().connection_lost(exc)

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._expect_request()

    def is_idle(self) -> bool:
        """Whether no request is being answered."""
        return self.cycle is None or self.cycle.response_complete

    def _expect_request(self) -> None:
        if self._end is not None:
            self._end.cancel()
        self.idle_since = time.monotonic()
        self._end = self.loop.call_later(HEAD_SECONDS, self._end_unless_asked, self.cycle)

    def _end_unless_asked(self, last_cycle: Any) -> None:
        if self.cycle is last_cycle and self.is_idle():
            self.transport.abort()


class Seldom(logging.Filter):
    """Keeps what others send from filling the disk: lets each line of code log LOGGED_LINES times a minute."""

    def __init__(self) -> None:
        super().__init__()
        self._counted: dict[tuple[str, int], tuple[float, int]] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether a record is logged; the first one of a new minute says how many were not."""
        place, clock = (record.pathname, record.lineno), time.monotonic()
        start, count = self._counted.get(place, (clock, 0))
        if clock - start > LOGGED_SECONDS:
            if count > LOGGED_LINES:
                record.msg = f"{record.getMessage()} (and {count - LOGGED_LINES} more like it, not logged)"
                record.args = ()
            start, count = clock, 0
        self._counted[place] = (start, count + 1)
        return count < LOGGED_LINES
