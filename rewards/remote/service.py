"""The application behind `rewards.serve`: rewards as HTTP pages, and what is refused with which status."""

import asyncio
import contextlib
import hashlib
import hmac
import importlib.metadata
import json
import logging
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from pathlib import Path
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
from rewards.remote.threads import in_thread

logger = logging.getLogger(__name__)

#: Seconds without a byte after which a request's body is given up.
IDLE_SECONDS = 30.0
#: Seconds between two looks at the workers.
WATCH_SECONDS = 1.0
#: Bytes of all requests at one time, of their bodies and then of their decoded images, as a multiple of one's limit.
HELD_AT_ONCE = 8

#: Statuses of requests whose body may still be on its way: nobody will read it.
_UNREAD = (401, 404, 408, 413, 503)


class Refused(Exception):
    """An answer other than scores: status, sentence, and how often to come again if so."""

    def __init__(self, status: int, message: str, kind: str = "refused", retry_after: int | None = None) -> None:
        super().__init__(message)
        self.status, self.kind = status, kind
        self.headers = {} if retry_after is None else {"Retry-After": str(retry_after)}
        if status in _UNREAD:
            self.headers["Connection"] = "close"


class Service:
    """The application: lanes of rewards behind HTTP.

    Args:
        specs: as for :func:`rewards.load_rewards`, loaded when the server has started. limits: of a request.
        token: what clients must send, if anything. lane_options: of :class:`rewards.remote.lanes.Lane`.
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
        self._memory = _Memory(limits.bytes * HELD_AT_ONCE)
        self.stop = lambda: None
        self.app = Starlette(
            routes=[
                Route("/score/{name:path}", self.score, methods=["POST"]),
                Route("/rewards", self.rewards),
                Route("/health", self.health),
                Route("/metrics", self.show_metrics),
            ],
            exception_handlers={Refused: self._refusal, Exception: self._fault},
            lifespan=self._lifespan,
        )

    @contextlib.asynccontextmanager
    async def _lifespan(self, app: Starlette) -> AsyncIterator[None]:
        work = asyncio.create_task(self._work())
        try:
            yield
        finally:
            work.cancel()
            for lane in self.lanes.values():
                lane.reward.close()

    async def _work(self) -> None:
        """Load, then serve: to listen first lets a supervisor see that something is coming."""
        try:
            rewards: list[Reward] = await in_thread(load_rewards, self.specs)
            self.digests = {reward.name: digest_of(spec) for reward, spec in zip(rewards, self.specs, strict=True)}
        except Exception as error:  # the service cannot do without: it ends with this sentence
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
        except* Exception as group:  # nobody would answer any more: a supervisor starts it again
            self.error = "; ".join(map(describe, group.exceptions))
            self.stop()

    async def _watch(self) -> None:
        """Workers that died while nobody asked are started again, so that the service becomes well by itself."""
        while True:
            await asyncio.sleep(WATCH_SECONDS)
            for lane in self.lanes.values():
                try:
                    await lane.revive()
                except Exception as error:  # it is tried again, and meanwhile the health page says what is wrong
                    logger.warning("reward %r: %s", lane.reward.name, describe(error))

    # --- Pages ---

    async def score(self, request: Request) -> Response:
        """Scores of one request."""
        name, status = request.path_params["name"], 500
        try:
            self._check_token(request)
            lane = self._lane(name)
            with self._memory.account() as hold:
                body = await self._body(request, hold)
                parsed = await asyncio.to_thread(_parse, body, self.limits, hold)
                hold(-len(body))
                del body
                lane.check(parsed)
                scores = await lane.submit(parsed, request.is_disconnected)
            status = 200
            return JSONResponse({"scores": scores}, headers={wire.DIGEST_HEADER: self.digests[name]})
        except Exception as error:  # every one of them has an answer
            refusal = _as_refusal(error)
            status = refusal.status
            raise refusal from error
        finally:
            self.metrics.requests.labels(name if name in self.lanes else "unknown", status).inc()

    async def rewards(self, request: Request) -> Response:
        """What is served here."""
        self._check_token(request)
        self._check_loaded()
        served = {
            name: {"columns": lane.reward.columns, "required": lane.reward.required, "digest": self.digests[name]}
            for name, lane in self.lanes.items()
        }
        limits = {"bytes": self.limits.bytes, "images": self.limits.images, "pixels": self.limits.pixels}
        return JSONResponse({"rewards": served, "limits": limits, "version": _version()})

    async def health(self, request: Request) -> Response:
        """Whether all is loaded and well; details only for who has the token."""
        # In a thread: a worker's last words are waited for.
        states = await in_thread(lambda: {name: lane.state() for name, lane in self.lanes.items()})
        status = "loading" if not states else "ok" if all(s["ready"] for s in states.values()) else "degraded"
        answer: dict[str, Any] = {"status": status}
        if self._has_token(request):
            answer["rewards"] = states
        return JSONResponse(answer, 200 if status == "ok" else 503)

    async def show_metrics(self, request: Request) -> Response:
        """Counters for Prometheus."""
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

    async def _body(self, request: Request, hold: Callable[[int], None]) -> bytearray:
        """The request's body, refused as soon as it is known to be too large."""
        claimed = request.headers.get("content-length", "0")
        too_large = Refused(413, f"at most {self.limits.bytes} bytes are taken in one request")
        if claimed.isdigit() and int(claimed) > self.limits.bytes:
            raise too_large
        body = bytearray()
        try:
            async with asyncio.timeout(IDLE_SECONDS) as idle:
                async for piece in request.stream():
                    idle.reschedule(asyncio.get_running_loop().time() + IDLE_SECONDS)
                    hold(len(piece))
                    body += piece
                    if len(body) > self.limits.bytes:
                        raise too_large
        except TimeoutError:
            raise Refused(408, f"no byte of the body came for {IDLE_SECONDS:g} s") from None
        return body

    async def _refusal(self, request: Request, error: Exception) -> Response:
        assert isinstance(error, Refused)
        return JSONResponse({"error": str(error), "kind": error.kind}, error.status, error.headers)

    async def _fault(self, request: Request, error: Exception) -> Response:
        return JSONResponse({"error": describe(error), "kind": "fault"}, 500)


class _Memory:
    """Bytes that requests hold until they are answered."""

    def __init__(self, most: int) -> None:
        self._most, self._held, self._lock = most, 0, threading.Lock()

    @contextlib.contextmanager
    def account(self) -> Iterator[Callable[[int], None]]:
        """A function to say what one request holds more, from any thread: Busy if there is no room. Freed at the end."""
        mine = 0

        def hold(count: int) -> None:
            nonlocal mine
            with self._lock:
                if count > 0 and self._held + count > self._most:
                    raise Busy(2)
                self._held, mine = self._held + count, mine + count

        try:
            yield hold
        finally:
            hold(-mine)


def digest_of(spec: Any) -> str:
    """What a reward is, of its config's entry, without showing it: scores of two services with the same may be mixed.

    SHA-256 of ``use`` and ``args`` as JSON; of a ``file.py:attr``, wherever it lies, the file's content.
    """
    entry = spec if isinstance(spec, Mapping) else {"use": spec}
    use, args = entry["use"], entry.get("args") or None
    file, _, attribute = str(use).rpartition(":")
    if file.endswith(".py"):
        use = [hashlib.sha256(Path(file).expanduser().read_bytes()).hexdigest(), attribute]
    text = json.dumps({"use": use, "args": args}, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def _parse(body: bytearray, limits: wire.Limits, hold: Callable[[int], None]) -> wire.Request:
    """A frame by its first bytes; anything else is taken for JSON, whatever its content type says."""
    if body[:4] == wire.MAGIC:
        return wire.decode_request(*wire.split(body, limits), limits, hold)
    return wire.decode_json(wire.parse_object(body), limits, hold)


def _as_refusal(error: Exception) -> Refused:
    """The status for whatever went wrong with a request."""
    if isinstance(error, Refused):
        return error
    if isinstance(error, wire.FrameError):
        kinds = {wire.TooLarge: 413, wire.ContentError: 422}
        return Refused(kinds.get(type(error), 400), str(error))
    if isinstance(error, Busy):
        return Refused(503, str(error), "busy", retry_after=error.seconds)
    if isinstance(error, (ClientDisconnect, ConnectionAbortedError)):
        return Refused(400, "the client went away")
    kind = "contract" if isinstance(error, RewardError) else "unavailable"
    if isinstance(error, (RewardError, RewardUnavailable)):
        return Refused(500, str(error), kind)
    return Refused(500, describe(error), "raised")


def _version() -> str | None:
    try:
        return importlib.metadata.version("flow-align")
    except importlib.metadata.PackageNotFoundError:  # used from a checkout
        return None
