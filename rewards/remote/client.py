"""A reward that a service (`rewards.serve`) scores, on this or other machines.

In a config: ``{use: ocr, endpoints: http://host:8000}``, or a list of endpoints, which are used in turn; one that
cannot be reached is left out for a while. A call is one request, so that the reward sees the same images together as in
this process. If it looks at each image by itself, ``images_per_request`` can divide a call among several endpoints. The
token for the service is read from the environment variable FLOW_ALIGN_TOKEN.
"""

import asyncio
import itertools
import logging
import os
import threading
import time
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from typing import Any
from urllib.parse import quote, urlsplit

import httpx
import tenacity
from PIL import Image

from rewards.contract import CALL_SECONDS, Answer, RewardError, RewardFailed, RewardUnavailable, RunsElsewhere
from rewards.hints import nearest
from rewards.redaction import foreign, redacted
from rewards.remote import wire
from rewards.remote.answers import are_numbers, fetch, json_object, parsed
from rewards.remote.headers import retry_after
from rewards.threads import EventLoop, in_thread

logger = logging.getLogger(__name__)

#: Seconds to connect to an endpoint; to leave out one that failed; to wait at the start for one that is loading.
CONNECT_SECONDS, LEFT_OUT_SECONDS, LOADING_SECONDS = 3.0, 10.0, 600.0
#: First and longest pause between tries, which doubles from one to the next, and the largest random addition.
BACKOFF_SECONDS, LONGEST_SECONDS, JITTER_SECONDS = 0.5, 30.0, 0.5
_RETRIED = (408, 429, 502, 503, 504)


class _TryAgain(Exception):
    """A request failed for a reason that may pass, and should be tried again after ``seconds``."""

    def __init__(self, message: str, seconds: float = 0.0) -> None:
        super().__init__(message)
        self.seconds = seconds


class Remote(RunsElsewhere):
    """A reward whose work is done by a service.

    Args:
        use: the reward's name at the service. endpoints: base URLs. timeout: seconds for a request and its answer.
            retries: how often a request is tried again, with pauses that double, after a lost connection or at an
            overloaded or restarting service; not if the service refuses it or the reward raises, and not once a call
            has taken `rewards.contract.CALL_SECONDS` (or one ``timeout``, if that is longer). images_per_request: most
            images of a request; None sends a call as one.

    Raises:
        ValueError: the name is unknown there, no endpoint answers, or the endpoints disagree about the reward. An
            endpoint that answers only later is compared then, and raises RewardError when it disagrees.
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
        self._token = wire.checked_token(os.environ.get("FLOW_ALIGN_TOKEN"), "FLOW_ALIGN_TOKEN")
        self._loop = EventLoop()  # on which a request can be given up at any moment, not only between two bytes
        self._http = httpx.AsyncClient(
            headers={"Authorization": f"Bearer {self._token}"} if self._token else {},
            limits=httpx.Limits(max_connections=None),
            trust_env=False,  # no proxy from the environment, and no password from a file
        )
        self._call_numbers = itertools.count()
        self._left_out_until: dict[str, float] = {}
        self._lock = threading.Lock()
        self._max_bytes = wire.UNLIMITED.bytes
        self._first_endpoint, description = self._describe_reward()
        self.digest: str | None = description["digest"]
        self.columns = None if description["columns"] is None else tuple(description["columns"])
        self.required = tuple(description["required"])

    async def __call__(self, images: list[Image.Image], prompts: list[str], **columns: list[Any]) -> Answer:
        """Score images, in threads; raise RewardFailed, RewardUnavailable or RewardError."""
        deadline = time.monotonic() + max(CALL_SECONDS, self.timeout)
        size = self.images_per_request or max(1, len(images))
        # Two requests for each endpoint: one is sent while the other is scored.
        limit = asyncio.Semaphore(2 * len(self.endpoints))

        async def score_from(start: int) -> Answer:
            rows = slice(start, start + size)
            columns_of_rows = {name: values[rows] for name, values in columns.items()}
            async with limit:
                return await in_thread(self._request, images[rows], prompts[rows], columns_of_rows, deadline)

        answers = await asyncio.gather(*map(score_from, range(0, max(1, len(images)), size)))
        extras: dict[str, list[float | None]] = {}
        for name, values in (item for answer in answers for item in answer.extras.items()):
            extras.setdefault(name, []).extend(values)
        return Answer([score for answer in answers for score in answer.scores], extras)

    def check_values(self, row: Mapping[str, Any]) -> None:
        """Raise ValueError, naming the column, for a value of a data row that JSON would lose or change."""
        wire.check_json_values({name: [value] for name, value in row.items()})

    def problem(self) -> str | None:
        """Return that no endpoint can be reached, if all of them are left out now."""
        clock = time.monotonic()
        if all(self._left_out_until.get(endpoint, 0.0) > clock for endpoint in self.endpoints):
            return f"not reached: {', '.join(self.endpoints)}"
        return None

    def revive(self) -> None:
        """Do nothing: a service starts its own workers again."""

    def close(self) -> None:
        """Close the connections."""
        self._loop.wait_for(self._http.aclose())

    # --- Scoring ---

    def _request(
        self,
        images: Sequence[Image.Image],
        prompts: Sequence[str],
        columns: Mapping[str, Sequence[Any]],
        deadline: float,
    ) -> Answer:
        frame = wire.encode_request(images, prompts, columns)
        length = max(sum(map(len, frame)), sum(wire.memory(image.mode, image.size) for image in images))
        if length > self._max_bytes:  # the service refuses it before reading it, which looks like a lost connection
            raise RewardFailed(
                f"a request of {len(images)} images takes {length} bytes at the service, which allows "
                f"{self._max_bytes}: set `images_per_request`, or start the service with a larger --max_body_mb"
            )
        tries = tenacity.Retrying(
            retry=tenacity.retry_if_exception_type(_TryAgain),
            stop=lambda state: state.attempt_number > self.retries or time.monotonic() + self._pause(state) >= deadline,
            wait=self._pause,
            before_sleep=lambda state: logger.warning("reward %r: %s; trying again", self.use, _error(state)),
        )
        try:
            return tries(self._try_endpoints, frame, len(images), deadline)
        except tenacity.RetryError as error:
            last = error.last_attempt
            raise RewardUnavailable(f"given up after {last.attempt_number} tries: {last.exception()}") from None

    @staticmethod
    def _pause(state: tenacity.RetryCallState) -> float:
        """Return the seconds until the next try: exponential with jitter, at least what the service asks for."""
        drawn = tenacity.wait_exponential_jitter(BACKOFF_SECONDS, LONGEST_SECONDS, 2, JITTER_SECONDS)(state)
        return max(drawn, getattr(_error(state), "seconds", 0.0))

    def _try_endpoints(self, frame: list[bytes], images: int, deadline: float) -> Answer:
        """Send a request to one endpoint after the other until one answers, an error is final, or the time is up."""
        errors: list[_TryAgain | RewardUnavailable] = []
        for endpoint in self._endpoints_in_turn():
            seconds = min(self.timeout, deadline - time.monotonic())
            if seconds <= 0:
                errors.append(_TryAgain("there is no time left for it"))
                break
            try:
                return self._post(endpoint, frame, images, seconds)
            except (_TryAgain, RewardUnavailable) as error:
                with self._lock:
                    self._left_out_until[endpoint] = time.monotonic() + LEFT_OUT_SECONDS
                errors.append(error)
        # RewardUnavailable is final: that service has already retried the call with its own worker.
        raise next((error for error in errors if isinstance(error, _TryAgain)), errors[-1])

    def _endpoints_in_turn(self) -> list[str]:
        """Return the endpoints in the order to try them, without those left out unless all are.

        Each call begins with the next one.
        """
        with self._lock:
            first, clock = next(self._call_numbers) % len(self.endpoints), time.monotonic()
            rotated = self.endpoints[first:] + self.endpoints[:first]
            available = [endpoint for endpoint in rotated if self._left_out_until.get(endpoint, 0.0) <= clock]
        return available or rotated

    def _post(self, endpoint: str, frame: list[bytes], images: int, seconds: float) -> Answer:
        headers = {"Content-Length": str(sum(map(len, frame))), "Content-Type": "application/octet-stream"}
        path = f"/score/{quote(self.use)}"
        answer = self._send("POST", endpoint, path, seconds, content=_pieces(frame), headers=headers)
        # A 500 without a kind is not from the reward: the server was stopped in the middle of a request.
        if answer.status_code in _RETRIED or (answer.status_code == 500 and "kind" not in json_object(answer)):
            seconds = retry_after(answer.headers.get("Retry-After"), LONGEST_SECONDS) or 0.0
            raise _TryAgain(f"{endpoint}: {answer.status_code}: {self._error_text(answer)}", seconds)
        if answer.status_code != 200:
            raise self._failure(endpoint, answer)
        try:
            content = parsed(answer, parse_int=float)
            scores, extras = content["scores"], content.get("extras", {})
        except (ValueError, KeyError, TypeError, AttributeError):
            shown = foreign(answer.text, self._token, longest=200)
            raise _TryAgain(f"{endpoint} answered something other than scores: {shown}") from None
        if not are_numbers(scores) or len(scores) != images:
            raise RewardError(
                f"{endpoint} answered {foreign(str(scores), self._token, longest=100)} for {images} images"
            )
        if not isinstance(extras, dict) or not all(map(are_numbers, extras.values())):
            raise RewardError(f"{endpoint} answered the extras {foreign(str(extras), self._token, longest=100)}")
        if answer.headers.get(wire.DIGEST_HEADER) != self.digest:
            raise RewardError(
                f"reward {self.use!r} is not the same at {endpoint} as it was at {self._first_endpoint} at the start "
                "(another `use`, `args` or file): their scores cannot be mixed"
            )
        return Answer(scores, extras)

    def _failure(self, endpoint: str, answer: httpx.Response) -> RewardFailed | RewardError:
        """Return the error for an answer that a retry would not change."""
        kind, message = json_object(answer).get("kind"), self._error_text(answer)
        if kind == "raised":
            return RewardFailed(message)
        if kind == "contract":
            return RewardError(message)
        text = f"{endpoint}: {answer.status_code}: {message}"
        return RewardUnavailable(text) if kind == "unavailable" else RewardFailed(text)

    def _error_text(self, answer: httpx.Response) -> str:
        """Return the error in an answer, or else the beginning of its text."""
        error = json_object(answer).get("error")
        return foreign(answer.text, self._token, longest=200) if error is None else foreign(str(error), self._token)

    def _send(self, method: str, endpoint: str, path: str, seconds: float, **more: Any) -> httpx.Response:
        timeout = httpx.Timeout(None, connect=min(seconds, CONNECT_SECONDS))
        try:
            return self._loop.wait_for(fetch(self._http, method, endpoint + path, seconds, timeout=timeout, **more))
        except httpx.LocalProtocolError:  # would happen again; its message may contain the token
            raise RewardFailed(f"{endpoint}: HTTP cannot carry this request") from None
        except httpx.TransportError as error:
            raise _TryAgain(f"{endpoint}: {type(error).__name__}: {error}") from None

    # --- The start ---

    def _describe_reward(self) -> tuple[str, dict[str, Any]]:
        """Return the first endpoint that answers and its description of the reward; the silent ones are left out."""
        descriptions: dict[str, dict[str, Any]] = {}
        errors: dict[str, str] = {}
        for endpoint in self.endpoints:
            try:
                descriptions[endpoint] = self._ask(endpoint)
            except _TryAgain as error:
                errors[endpoint] = str(error)
                self._left_out_until[endpoint] = time.monotonic() + LEFT_OUT_SECONDS
        if not descriptions:
            raise ValueError(f"no endpoint of reward {self.use!r} answers: {'; '.join(errors.values())}")
        for message in errors.values():
            logger.warning("reward %r: %s; it is left out for now", self.use, message)
        (first, expected), *others = descriptions.items()
        for endpoint, found in others:
            if found != expected:
                raise ValueError(
                    f"reward {self.use!r} is not the same at {first} ({foreign(str(expected), self._token)}) and "
                    f"{endpoint} ({foreign(str(found), self._token)})"
                )
        return first, expected

    def _ask(self, endpoint: str) -> dict[str, Any]:
        """Return an endpoint's description of the reward, after waiting for it to load."""
        deadline, is_logged = time.monotonic() + LOADING_SECONDS, False
        while True:
            answer = self._send("GET", endpoint, "/rewards", 10.0)
            page = json_object(answer)
            if page.get("kind") != "loading" or time.monotonic() > deadline:
                break
            if not is_logged:
                logger.warning("reward %r: %s is still loading; waiting for it", self.use, endpoint)
            is_logged = True
            time.sleep(1.0)
        if answer.status_code == 401:
            raise ValueError(
                f"{endpoint} requires a token: set the environment variable FLOW_ALIGN_TOKEN to the right one"
            )
        if answer.status_code in _RETRIED:  # for instance from a proxy in front of the service
            raise _TryAgain(f"{endpoint}: {answer.status_code} at /rewards: {self._error_text(answer)}")
        served = page.get("rewards")
        if answer.status_code != 200 or not isinstance(served, dict) or not _are_described(served, page.get("limits")):
            raise ValueError(
                f"{endpoint} is not a reward service: {answer.status_code} at /rewards: {self._error_text(answer)}"
            )
        if self.use not in served:
            raise ValueError(
                f"there is no reward {self.use!r} at {endpoint}." + foreign(nearest(self.use, served), self._token)
            )
        self._max_bytes = min(self._max_bytes, page["limits"]["bytes"])
        return {key: served[self.use].get(key) for key in ("columns", "required", "digest")}


def _checked_endpoints(use: str, given: Any) -> list[str]:
    """Return a list of valid URLs, from one URL or several; raise ValueError otherwise."""
    if isinstance(given, str):
        given = [given]
    endpoints = list(given) if isinstance(given, Iterable) else []
    if not endpoints:
        raise ValueError(f"the endpoints of reward {use!r} must be a URL or a list of URLs, found {redacted(given)!r}")
    for endpoint in endpoints:
        url = urlsplit(endpoint) if isinstance(endpoint, str) else None
        if url is None or url.scheme not in ("http", "https") or not url.hostname or url.query:
            shown = redacted(endpoint)
            raise ValueError(f"the endpoint {shown!r} of reward {use!r} is not a URL such as http://127.0.0.1:8000")
        if url.username or url.password:
            raise ValueError(
                f"an endpoint of reward {use!r} ({url.hostname}) contains a user or password, which logs would show: "
                "set FLOW_ALIGN_TOKEN instead"
            )
    if len(set(endpoints)) < len(endpoints):
        raise ValueError(f"reward {use!r} has an endpoint twice: {', '.join(endpoints)}")
    return [endpoint.rstrip("/") for endpoint in endpoints]


def _are_described(served: Mapping[str, Any], limits: Any) -> bool:
    """Whether what a server says of its rewards and limits has the types of a reward service."""

    def is_entry(entry: Any) -> bool:
        if not isinstance(entry, dict):
            return False
        names = [entry.get("required"), [] if entry.get("columns") is None else entry["columns"]]
        are_names = all(isinstance(part, list) and all(isinstance(name, str) for name in part) for part in names)
        return are_names and isinstance(entry.get("digest"), str | None)

    return all(map(is_entry, served.values())) and isinstance(limits, dict) and isinstance(limits.get("bytes"), int)


async def _pieces(frame: list[bytes]) -> AsyncIterator[bytes]:
    for piece in frame:
        for start in range(0, len(piece), 2**18):  # asyncio moves what it has not sent yet, after every send
            yield piece[start : start + 2**18]


def _error(state: tenacity.RetryCallState) -> BaseException | None:
    return state.outcome.exception() if state.outcome else None
