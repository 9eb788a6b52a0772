"""A reward that is scored by a service (`rewards.serve`), here or on other machines.

In a config: ``{use: ocr, endpoints: http://host:8000}``, or a list of them, which are asked in turn; one that cannot be
reached is left out for a while. One call is one request, so that the reward sees what it would see in this process;
``images_per_request`` divides it, for several endpoints to share, where the reward looks at each image by itself.
The token that a service asks for is in the environment variable FLOW_ALIGN_TOKEN.
"""

import asyncio
import itertools
import logging
import os
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any
from urllib.parse import quote, urlsplit

import httpx
import tenacity
from PIL import Image

from rewards.contract import CALL_SECONDS, RewardError, RewardFailed, RewardUnavailable
from rewards.hints import nearest
from rewards.remote import wire
from rewards.remote.threads import in_thread

logger = logging.getLogger(__name__)

#: Seconds to reach an endpoint; how long one that failed is left out; how long one that loads is waited for at the start.
CONNECT_SECONDS, LEFT_OUT_SECONDS, LOADING_SECONDS = 3.0, 10.0, 600.0
#: First and longest pause between tries, doubled from one to the next, and what is added at random.
BACKOFF_SECONDS, LONGEST_SECONDS, JITTER_SECONDS = 0.5, 30.0, 0.5
_COME_AGAIN = (408, 429, 502, 503, 504)


class _Again(Exception):
    """Nobody could score it now; perhaps later. ``seconds``: not before."""

    def __init__(self, message: str, seconds: float = 0.0) -> None:
        super().__init__(message)
        self.seconds = seconds


class Remote:
    """A reward as a callable whose work is done by a service.

    Args:
        use: its name there. endpoints: base URLs. timeout: seconds until an answer must have begun. retries: how often
            a request is tried again after a lost connection or an overloaded or restarting service, with pauses that
            double; not where the service refuses or the reward raises, and not once a call has taken
            `rewards.calling.CALL_SECONDS` (or one ``timeout``, if that is longer). images_per_request: see above.

    Raises (when made): ValueError when the name is unknown there, no endpoint answers, or they disagree. What answers
    later than the others is compared then: RewardError.
    """

    def __init__(
        self,
        use: str,
        endpoints: str | Iterable[str],
        timeout: float = 300.0,
        retries: int = 8,
        images_per_request: int | None = None,
    ) -> None:
        self.use, self.timeout, self.retries, self.images_per_request = use, timeout, retries, images_per_request
        self.endpoints = _checked_endpoints(use, endpoints)
        token = wire.checked_token(os.environ.get("FLOW_ALIGN_TOKEN"), "FLOW_ALIGN_TOKEN")
        self._http = httpx.Client(
            headers={"Authorization": f"Bearer {token}"} if token else {},
            limits=httpx.Limits(max_connections=None),
            trust_env=False,  # no proxy between a run and its rewards, and no password from a file
        )
        self._turn = itertools.count()
        self._out: dict[str, float] = {}
        self._lock = threading.Lock()
        self._most_bytes = wire.UNLIMITED.bytes
        self._first, found = self._ask_all()
        self._digest: str | None = found["digest"]
        self.columns: tuple[str, ...] | None = None if found["columns"] is None else tuple(found["columns"])
        self.required: tuple[str, ...] = tuple(found["required"])

    async def __call__(self, images: list[Image.Image], prompts: list[str], **columns: list[Any]) -> list[float | None]:
        """Scores, from threads of its own; raises RewardFailed, RewardUnavailable or RewardError."""
        deadline = time.monotonic() + max(CALL_SECONDS, self.timeout)
        size = self.images_per_request or max(1, len(images))
        turn = asyncio.Semaphore(2 * len(self.endpoints))  # one travels while the other is scored

        async def part(start: int) -> list[float | None]:
            here = slice(start, start + size)
            mine = {name: values[here] for name, values in columns.items()}
            async with turn:
                return await in_thread(self._request, images[here], prompts[here], mine, deadline)

        parts = await asyncio.gather(*map(part, range(0, max(1, len(images)), size)))
        return [score for scores in parts for score in scores]

    def problem(self) -> str | None:
        """Which endpoints are left out now, if all of them are."""
        now = time.monotonic()
        out = [endpoint for endpoint in self.endpoints if self._out.get(endpoint, 0.0) > now]
        return f"not reached: {', '.join(out)}" if len(out) == len(self.endpoints) else None

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    # --- Scoring ---

    def _request(
        self,
        images: Sequence[Image.Image],
        prompts: Sequence[str],
        columns: Mapping[str, Sequence[Any]],
        deadline: float,
    ) -> list[float | None]:
        frame = wire.encode_request(images, prompts, columns)
        length = max(sum(map(len, frame)), sum(wire.memory(image.mode, image.size) for image in images))
        if length > self._most_bytes:  # refused there before it is read, which looks like a fault
            raise RewardFailed(
                f"a request of {len(images)} images takes {length} bytes there, and the service allows "
                f"{self._most_bytes}: set `images_per_request`, or start it with a larger --max_body_mb"
            )
        tries = tenacity.Retrying(
            retry=tenacity.retry_if_exception_type(_Again),
            stop=lambda state: state.attempt_number > self.retries or time.monotonic() + self._pause(state) >= deadline,
            wait=self._pause,
            before_sleep=lambda state: logger.warning("reward %r: %s; trying again", self.use, _error(state)),
        )
        try:
            return tries(self._round, frame, len(images), deadline)
        except tenacity.RetryError as error:
            last = error.last_attempt
            raise RewardUnavailable(f"given up after {last.attempt_number} tries: {last.exception()}") from None

    @staticmethod
    def _pause(state: tenacity.RetryCallState) -> float:
        """Exponential with jitter, and never before the service wants to be asked again."""
        drawn = tenacity.wait_exponential_jitter(BACKOFF_SECONDS, LONGEST_SECONDS, 2, JITTER_SECONDS)(state)
        return max(drawn, min(LONGEST_SECONDS, getattr(_error(state), "seconds", 0.0)))

    def _round(self, frame: list[bytes], images: int, deadline: float) -> list[float | None]:
        """One try at each endpoint, as long as it is one that another endpoint may do better and there is time."""
        failed: list[_Again | RewardUnavailable] = []
        for endpoint in self._in_turn():
            seconds = min(self.timeout, deadline - time.monotonic())
            if seconds <= 0:
                failed.append(_Again("no time is left for it"))
                break
            try:
                return self._post(endpoint, frame, images, seconds)
            except (_Again, RewardUnavailable) as error:
                with self._lock:
                    self._out[endpoint] = time.monotonic() + LEFT_OUT_SECONDS
                failed.append(error)
        # A service that gave the call up for good has retried it with its own worker: not all over again.
        raise next((error for error in failed if isinstance(error, _Again)), failed[-1])

    def _in_turn(self) -> list[str]:
        """Endpoints in the order to ask them: each call begins with the next; those left out only if there are no others."""
        with self._lock:
            first, now = next(self._turn) % len(self.endpoints), time.monotonic()
            turned = self.endpoints[first:] + self.endpoints[:first]
            live = [endpoint for endpoint in turned if self._out.get(endpoint, 0.0) <= now]
        return live or turned

    def _post(self, endpoint: str, frame: list[bytes], images: int, seconds: float) -> list[float | None]:
        headers = {"Content-Length": str(sum(map(len, frame))), "Content-Type": "application/octet-stream"}
        page = f"/score/{quote(self.use)}"
        answer = self._send("POST", endpoint, page, seconds, content=iter(frame), headers=headers)
        # A 500 that does not say why is no reward's: the server was ended in the middle.
        if answer.status_code in _COME_AGAIN or (answer.status_code == 500 and "kind" not in _page(answer)):
            raise _Again(f"{endpoint}: {answer.status_code}: {_said(answer)}", _retry_after(answer))
        if answer.status_code != 200:
            raise _failure(endpoint, answer)
        try:
            scores = answer.json()["scores"]
        except (ValueError, KeyError, TypeError):
            raise _Again(f"{endpoint} answered something else than scores: {answer.text[:200]!r}") from None
        if not isinstance(scores, list) or len(scores) != images:
            raise RewardError(f"{endpoint} answered {str(scores)[:100]} for {images} images")
        if answer.headers.get(wire.DIGEST_HEADER) != self._digest:
            raise RewardError(
                f"reward {self.use!r} is not the same at {endpoint} as it was at {self._first} at the start (another "
                "`use`, `args` or file): their scores cannot be mixed"
            )
        return scores

    def _send(self, method: str, endpoint: str, page: str, seconds: float, **more: Any) -> httpx.Response:
        timeout = httpx.Timeout(seconds, connect=min(seconds, CONNECT_SECONDS))
        try:
            return self._http.request(method, endpoint + page, timeout=timeout, **more)
        except httpx.LocalProtocolError:  # our own fault, next time too; what it says may hold the token
            raise RewardFailed(f"{endpoint}: this is no request that HTTP can carry") from None
        except httpx.TransportError as error:
            raise _Again(f"{endpoint}: {type(error).__name__}: {error}") from None

    # --- The start ---

    def _ask_all(self) -> tuple[str, dict[str, Any]]:
        """The first endpoint that answers, and what all of those say of this reward; the others are left out for now."""
        said, silent = {}, {}
        for endpoint in self.endpoints:
            try:
                said[endpoint] = self._ask(endpoint)
            except _Again as error:
                silent[endpoint] = str(error)
                self._out[endpoint] = time.monotonic() + LEFT_OUT_SECONDS
        if not said:
            raise ValueError(f"no endpoint of reward {self.use!r} answers: {'; '.join(silent.values())}")
        for message in silent.values():
            logger.warning("reward %r: %s; it is left out for now", self.use, message)
        (first, found), *others = said.items()
        for endpoint, other in others:
            if other != found:
                raise ValueError(f"reward {self.use!r} is not the same at {first} ({found}) and {endpoint} ({other})")
        return first, found

    def _ask(self, endpoint: str) -> dict[str, Any]:
        """Columns of the reward at an endpoint; one that is loading is waited for."""
        until, told = time.monotonic() + LOADING_SECONDS, False
        while True:
            answer = self._send("GET", endpoint, "/rewards", 10.0)
            page = _page(answer)
            if page.get("kind") != "loading" or time.monotonic() > until:
                break
            if not told:
                logger.warning("reward %r: %s is still loading; waiting for it", self.use, endpoint)
            told = True
            time.sleep(1.0)
        if answer.status_code == 401:
            raise ValueError(
                f"{endpoint} wants a token: set the environment variable FLOW_ALIGN_TOKEN to the right one"
            )
        if answer.status_code in _COME_AGAIN:  # a proxy before it, say
            raise _Again(f"{endpoint}: {answer.status_code} at /rewards: {_said(answer)}")
        served = page.get("rewards")
        if answer.status_code != 200 or not isinstance(served, dict):
            raise ValueError(f"{endpoint} is no reward service: {answer.status_code} at /rewards: {_said(answer)}")
        if self.use not in served:
            raise ValueError(f"there is no reward {self.use!r} at {endpoint}." + nearest(self.use, served))
        self._most_bytes = min(self._most_bytes, int(page["limits"]["bytes"]))
        return {key: served[self.use].get(key) for key in ("columns", "required", "digest")}


def _checked_endpoints(use: str, given: Any) -> list[str]:
    endpoints = [given] if isinstance(given, str) else list(given) if isinstance(given, Iterable) else []
    if not endpoints:
        raise ValueError(f"the endpoints of reward {use!r} must be a URL or a list of URLs, found {given!r}")
    for endpoint in endpoints:
        parts = urlsplit(endpoint) if isinstance(endpoint, str) else None
        if parts is None or parts.scheme not in ("http", "https") or not parts.hostname or parts.query:
            raise ValueError(f"the endpoint {endpoint!r} of reward {use!r} is no URL such as http://127.0.0.1:8000")
        if parts.username or parts.password:
            raise ValueError(
                f"an endpoint of reward {use!r} ({parts.hostname}) has a user or password in it, which would be shown "
                "in logs: set FLOW_ALIGN_TOKEN instead"
            )
    if len(set(endpoints)) < len(endpoints):
        raise ValueError(f"reward {use!r} has an endpoint twice: {', '.join(endpoints)}")
    return [endpoint.rstrip("/") for endpoint in endpoints]


def _failure(endpoint: str, answer: httpx.Response) -> RewardFailed | RewardError:
    """The error for an answer that would be the same next time."""
    page = _page(answer)
    kind, message = page.get("kind"), str(page.get("error", answer.text[:200]))
    if kind == "raised":
        return RewardFailed(message)
    if kind == "contract":
        return RewardError(message)
    text = f"{endpoint}: {answer.status_code}: {message}"
    return RewardUnavailable(text) if kind == "unavailable" else RewardFailed(text)


def _said(answer: httpx.Response) -> str:
    return str(_page(answer).get("error", answer.text[:200]))


def _page(answer: httpx.Response) -> dict[str, Any]:
    try:
        page = answer.json()
    except ValueError:
        return {}
    return page if isinstance(page, dict) else {}


def _retry_after(answer: httpx.Response) -> float:
    value = answer.headers.get("Retry-After", "")
    return float(value) if value.isdigit() else 0.0


def _error(state: tenacity.RetryCallState) -> BaseException | None:
    return state.outcome.exception() if state.outcome else None
