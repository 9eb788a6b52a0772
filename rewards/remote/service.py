"""The HTTP application behind `rewards.serve`: its pages, its checks, and the status of every error."""

import asyncio
import contextlib
import hmac
import importlib.metadata
import logging
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from typing import Any

from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from rewards.contract import Reward, RewardError, RewardUnavailable, describe
from rewards.hints import nearest
from rewards.registry import load_rewards
from rewards.remote import wire
from rewards.remote.lanes import Busy, Lane, Metrics
from rewards.threads import in_thread

logger = logging.getLogger(__name__)

#: Seconds without a byte after which a request's body is given up, and seconds for all of it.
IDLE_SECONDS, BODY_SECONDS = 30.0, 600.0
#: Seconds between two checks of the workers.
WATCH_SECONDS = 1.0
#: Memory for the bodies and decoded images of all requests in progress, as a multiple of the limit of one request.
REQUESTS_IN_MEMORY = 8

#: Statuses of requests whose body may still be arriving, and will not be read.
_BODY_UNREAD = (401, 404, 408, 413, 503)


class Refused(Exception):
    """A request is answered with an error: status, message, kind, and seconds after which to try again, if at all."""

    def __init__(self, status: int, message: str, kind: str = "refused", retry_after: int | None = None) -> None:
        super().__init__(message)
        self.status, self.kind = status, kind
        self.headers = {} if retry_after is None else {"Retry-After": str(retry_after)}
        if status in _BODY_UNREAD:
            self.headers["Connection"] = "close"


class Service:
    """An HTTP application with a :class:`rewards.remote.lanes.Lane` for each reward.

    Args:
        specs: as for :func:`rewards.load_rewards`; they are loaded after the server has started. limits: of a request.
        token: what clients must send; None requires none. lane_options: arguments of every lane.
    """

    def __init__(
        self,
        specs: Sequence[Any],
        limits: wire.Limits = wire.Limits(),  # noqa: B008  # frozen
        token: str | None = None,
        **lane_options: Any,
    ) -> None:
        self.specs, self.limits, self._token, self._options = specs, limits, token, lane_options
        self.lanes: dict[str, Lane] = {}
        self.digests: dict[str, str] = {}
        self.error: str | None = None
        self.metrics = Metrics()
        self._memory = _Memory(limits.bytes * REQUESTS_IN_MEMORY)
        self.stop = lambda: None
        self.app = Starlette(
            routes=[
                Route("/score/{name:path}", self.score, methods=["POST"]),
                Route("/rewards", self.rewards),
                Route("/health", self.health),
                Route("/metrics", self.show_metrics),
            ],
            exception_handlers={Refused: self._answer_refusal, Exception: self._answer_fault},
            lifespan=self._lifespan,
        )

    @contextlib.asynccontextmanager
    async def _lifespan(self, app: Starlette) -> AsyncIterator[None]:
        work = asyncio.create_task(self._load_and_run())
        try:
            yield
        finally:
            work.cancel()
            for lane in self.lanes.values():
                lane.close()

    async def _load_and_run(self) -> None:
        """Load the rewards and run their lanes. The server listens already, so that a supervisor sees it loading."""
        try:
            rewards: list[Reward] = await in_thread(load_rewards, self.specs)
            self.digests = {reward.name: reward.digest for reward in rewards}
        except Exception as error:  # the service cannot run without its rewards, and ends with this message
            self.error = describe(error)
            self.stop()
            return
        self.lanes = {reward.name: Lane(reward, self.metrics, **self._options) for reward in rewards}
        logger.warning("ready: %s", ", ".join(self.lanes))
        try:
            async with asyncio.TaskGroup() as tasks:
                for lane in self.lanes.values():
                    tasks.create_task(lane.run())
                tasks.create_task(self._watch())
        except* Exception as group:  # no lane would answer any more; a supervisor can start the service again
            self.error = "; ".join(map(describe, group.exceptions))
            self.stop()

    async def _watch(self) -> None:
        """Start workers again that died between calls, so that the service recovers by itself."""
        while True:
            await asyncio.sleep(WATCH_SECONDS)
            for lane in self.lanes.values():
                try:
                    await lane.revive()
                except Exception as error:  # it is tried again; until then the health page shows the problem
                    logger.warning("reward %r: %s", lane.reward.name, describe(error))

    # --- Pages ---

    async def score(self, request: Request) -> Response:
        """Answer a request with its scores."""
        name, status = request.path_params["name"], 500
        try:
            self._check_token(request)
            lane = self._lane(name)
            with self._memory.account() as reserve:
                body = await self._read_body(request, reserve)
                parsed = await asyncio.to_thread(_parse, body, self.limits, reserve)
                reserve(-len(body))
                del body
                lane.check(parsed)
                answer = await lane.submit(parsed, _client_is_gone(request))
            status = 200
            content = {key: value for key, value in answer._asdict().items() if value or key == "scores"}
            return JSONResponse(content, headers={wire.DIGEST_HEADER: self.digests[name]})
        except Exception as error:  # every error has an answer
            refusal = _as_refusal(error)
            status = refusal.status
            raise refusal from error
        finally:
            self.metrics.requests.labels(name if name in self.lanes else "unknown", status).inc()

    async def rewards(self, request: Request) -> Response:
        """Answer with the rewards that are served, the limits and the version."""
        self._check_token(request)
        self._check_loaded()
        served = {
            name: {"columns": lane.reward.columns, "required": lane.reward.required, "digest": self.digests[name]}
            for name, lane in self.lanes.items()
        }
        limits = {"bytes": self.limits.bytes, "images": self.limits.images, "pixels": self.limits.pixels}
        return JSONResponse({"rewards": served, "limits": limits, "version": _library_version()})

    async def health(self, request: Request) -> Response:
        """Answer whether everything is loaded and well, with details for clients that have the token."""
        # In a thread, because it waits for the last lines of a dead worker.
        states = await in_thread(lambda: {name: lane.state() for name, lane in self.lanes.items()})
        status = "loading"
        if states:
            status = "ok" if all(state["ready"] for state in states.values()) else "degraded"
        answer: dict[str, Any] = {"status": status}
        if self._has_token(request):
            answer["rewards"] = states
        return JSONResponse(answer, 200 if status == "ok" else 503)

    async def show_metrics(self, request: Request) -> Response:
        """Answer with the metrics for Prometheus."""
        self._check_token(request)
        return Response(generate_latest(self.metrics.registry), media_type=CONTENT_TYPE_LATEST)

    # --- Checks ---

    def _has_token(self, request: Request) -> bool:
        given = request.headers.get("authorization", "").encode()
        return self._token is None or hmac.compare_digest(given, f"Bearer {self._token}".encode())

    def _check_token(self, request: Request) -> None:
        if not self._has_token(request):
            raise Refused(401, "wrong or missing token: send `Authorization: Bearer TOKEN`")

    def _check_loaded(self) -> None:
        if not self.lanes:
            raise Refused(503, "the rewards are still being loaded", "loading", retry_after=2)

    def _lane(self, name: str) -> Lane:
        self._check_loaded()
        if name not in self.lanes:
            raise Refused(404, f"there is no reward {name!r} here." + nearest(name, self.lanes), "unknown")
        return self.lanes[name]

    async def _read_body(self, request: Request, reserve: Callable[[int], None]) -> bytearray:
        """Read the request's body, and refuse it as soon as it is known to be too large."""
        length = request.headers.get("content-length", "0")
        too_large = Refused(413, f"a request may have at most {self.limits.bytes} bytes")
        if length.isdigit() and int(length) > self.limits.bytes:
            raise too_large
        body, clock = bytearray(), asyncio.get_running_loop().time
        end = clock() + BODY_SECONDS
        try:
            async with asyncio.timeout(IDLE_SECONDS) as limit:
                async for piece in request.stream():
                    limit.reschedule(min(clock() + IDLE_SECONDS, end))
                    reserve(len(piece))
                    body += piece
                    if len(body) > self.limits.bytes:
                        raise too_large
        except TimeoutError:
            raise Refused(
                408, f"no byte of the body arrived for {IDLE_SECONDS:g} s, or not all of it in {BODY_SECONDS:g} s"
            ) from None
        return body

    async def _answer_refusal(self, request: Request, error: Exception) -> Response:
        assert isinstance(error, Refused)
        return JSONResponse({"error": str(error), "kind": error.kind}, error.status, error.headers)

    async def _answer_fault(self, request: Request, error: Exception) -> Response:
        return JSONResponse({"error": describe(error), "kind": "fault"}, 500)


class _Memory:
    """The memory of all requests in progress, with a limit in bytes."""

    def __init__(self, limit: int) -> None:
        self._limit, self._reserved, self._lock = limit, 0, threading.Lock()

    @contextlib.contextmanager
    def account(self) -> Iterator[Callable[[int], None]]:
        """Give a function that reserves bytes for one request, from any thread; all are released at the end.

        The function raises Busy if there is no room.
        """
        reserved = 0

        def reserve(count: int) -> None:
            nonlocal reserved
            with self._lock:
                if count > 0 and self._reserved + count > self._limit:
                    raise Busy(2)
                self._reserved, reserved = self._reserved + count, reserved + count

        try:
            yield reserve
        finally:
            reserve(-reserved)


async def _client_is_gone(request: Request) -> None:
    """Wait until the client of a request, whose body has been read, closes the connection."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _parse(body: bytearray, limits: wire.Limits, reserve: Callable[[int], None]) -> wire.Request:
    """Decode a frame, recognised by its first bytes, or else JSON; the content type does not matter."""
    if body[:4] == wire.MAGIC:
        return wire.decode_request(*wire.split(body, limits, reserve), limits, reserve)
    return wire.decode_json(wire.parse_object(body, limits, reserve), limits, reserve)


def _as_refusal(error: Exception) -> Refused:
    """Return the answer for any error of a request."""
    if isinstance(error, Refused):
        return error
    if isinstance(error, wire.FrameError):
        kinds = {wire.TooLarge: 413, wire.ContentError: 422}
        return Refused(kinds.get(type(error), 400), str(error))
    if isinstance(error, Busy):
        return Refused(503, str(error), "busy", retry_after=error.seconds)
    if isinstance(error, (ClientDisconnect, ConnectionAbortedError)):
        return Refused(400, "the client closed the connection")
    kind = "contract" if isinstance(error, RewardError) else "unavailable"
    if isinstance(error, (RewardError, RewardUnavailable)):
        return Refused(500, str(error), kind)
    return Refused(500, describe(error), "raised")


def _library_version() -> str | None:
    try:
        return importlib.metadata.version("flow-align")
    except importlib.metadata.PackageNotFoundError:  # used from a checkout
        return None
