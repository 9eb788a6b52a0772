"""The reward `vlm_judge`: a vision-language model at an OpenAI-compatible endpoint (vLLM, SGLang, a hosted one)."""

import asyncio
import base64
import io
import logging
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from PIL import Image

from rewards.judge.templates import Template, load_template
from rewards.pictures import at_most, to_rgb
from rewards.redaction import foreign, redacted
from rewards.remote.headers import retry_after

if TYPE_CHECKING:
    import httpx

logger = logging.getLogger(__name__)

_KEY = "OPENAI_API_KEY"
_RETRIED = (408, 429, 500, 502, 503, 504)
_LONGEST_WAIT = 60.0  # seconds between two tries, whatever the server asks for
_MAX_LOGGED = 2000  # characters of an answer


class JudgeError(RuntimeError):
    """The endpoint refused a question, or its answer was not a chat completion."""


class VlmJudge:
    """A reward in [0, 1]: the mean of the marks that the model gives an image, each scaled from its template's range.

    An image is not scored (None) if the marks cannot be read from the answer, which is then logged, or if its question
    failed in every try. If more than the share ``max_unanswered`` of a call's questions failed, the first failure is
    raised, so that the run counts it.

    Args:
        model: name of the model at the endpoint. base_url: URL of the endpoint, ending in ``/v1``.
        template: "alignment" or "aesthetics" (a mark from 0 to 10), "unifiedreward" (alignment, coherence and style
            from 1 to 5, in the format of UnifiedReward's answers, arXiv 2503.05236), or the path of a YAML file with
            the keys ``text`` (in which ``{prompt}`` is replaced by the prompt), ``scores``, ``lowest``, ``highest``.
        parts: which of the template's scores count; None for all.
        api_key_env: environment variable with the key. The default one may be unset; then no key is sent.
        timeout: seconds for one try. retries: further tries after time-outs, lost connections, 429 and 5xx, with
            pauses that double or are as long as the server's Retry-After says (at most 60 s).
        concurrency: questions in progress at once. max_side: pixels; larger images are shrunk, others are sent
            unchanged (PNG). max_tokens: of an answer. request: further fields of the request's body.

    Raises:
        ValueError: an argument out of range, an unknown template, a missing or malformed key. FileNotFoundError: no
            such template file.
    """

    def __init__(
        self,
        model: str,
        base_url: str,
        template: str = "alignment",
        parts: Sequence[str] | None = None,
        api_key_env: str = _KEY,
        timeout: float = 60.0,
        retries: int = 4,
        concurrency: int = 8,
        max_side: int = 2048,
        max_tokens: int = 512,
        max_unanswered: float = 0.1,
        request: dict[str, Any] | None = None,
    ):
        self._check(base_url, timeout, retries, concurrency, max_side, max_tokens)
        if not 0 <= max_unanswered < 1:
            raise ValueError(f"vlm_judge: max_unanswered must lie in [0, 1), found {max_unanswered}")
        self.max_unanswered = max_unanswered
        self.template: Template = load_template(template)
        self.parts = list(self.template.scores) if parts is None else list(parts)
        if not self.parts or not set(self.parts) <= set(self.template.scores):
            known = ", ".join(self.template.scores)
            raise ValueError(f"vlm_judge: parts must be some of {known}, found {self.parts}")
        key = os.environ.get(api_key_env)
        if not key and api_key_env != _KEY:
            raise ValueError(f"vlm_judge: the environment variable {api_key_env} (api_key_env) is not set")
        if key and not key.strip():
            raise ValueError(f"vlm_judge: the key in {api_key_env} is blank: give it a value, or leave it out")
        key = (key or "").strip()
        if not (key.isascii() and key.isprintable()):  # otherwise the HTTP library's error would show the whole header
            raise ValueError(f"vlm_judge: {api_key_env} contains characters other than printable ASCII ones")
        self._key = key
        self.url = base_url.rstrip("/") + "/chat/completions"
        self.model, self.timeout, self.retries, self.concurrency = model, timeout, retries, concurrency
        self.max_side, self.max_tokens, self.request = max_side, max_tokens, dict(request or {})

    @staticmethod
    def _check(base_url: str, timeout: float, *counts: int) -> None:
        parsed = urlsplit(base_url)
        if parsed.scheme not in ("http", "https") or not parsed.hostname:
            raise ValueError(f"vlm_judge: base_url must be http(s)://host/v1, found {redacted(base_url)!r}")
        if parsed.username is not None or parsed.password is not None:
            raise ValueError(
                "vlm_judge: base_url contains a user name or password, which logs would show: use api_key_env"
            )
        retries, *others = counts
        if not timeout > 0 or retries < 0 or min(others) < 1:
            raise ValueError(
                "vlm_judge: timeout must be above 0, retries 0 or more, concurrency, max_side and max_tokens 1 or more"
            )

    async def __call__(self, images: list[Image.Image], prompts: list[str]) -> list[float | None]:
        import httpx

        if not images:
            return []
        limit = asyncio.Semaphore(self.concurrency)
        # A new client for each call, because the next call may come from another event loop.
        limits = httpx.Limits(max_connections=self.concurrency)
        headers = {"Authorization": f"Bearer {self._key}"} if self._key else {}
        async with httpx.AsyncClient(timeout=None, limits=limits, headers=headers) as client:

            async def ask(image: Image.Image, prompt: str) -> str:
                async with limit:
                    return await self._answer(client, await asyncio.to_thread(self._body, image, prompt))

            questions = [ask(image, prompt) for image, prompt in zip(images, prompts, strict=True)]
            answers = await asyncio.gather(*questions, return_exceptions=True)
        return self._scores(answers)

    def _scores(self, answers: Sequence[str | BaseException]) -> list[float | None]:
        failures = [answer for answer in answers if isinstance(answer, BaseException)]
        for failure in failures:
            if not isinstance(failure, _failures()):
                raise failure
        if len(failures) > self.max_unanswered * len(answers):  # counted by the run as a failure of the whole call
            raise failures[0]
        if failures:
            first = f"{type(failures[0]).__name__}: {failures[0]}"
            logger.warning("vlm_judge: %d of %d images not scored: %s", len(failures), len(answers), first)
        return [None if isinstance(answer, BaseException) else self._score(answer) for answer in answers]

    def _score(self, answer: str) -> float | None:
        marks = self.template.parse(answer)
        if marks is None:
            shown = foreign(answer, self._key, longest=_MAX_LOGGED)
            logger.warning("vlm_judge: an image is not scored, no marks can be read from the answer %r", shown)
            return None
        return sum(marks[part] for part in self.parts) / len(self.parts)

    def _body(self, image: Image.Image, prompt: str) -> dict[str, Any]:
        file = io.BytesIO()
        at_most(to_rgb(image), self.max_side).save(file, format="PNG", compress_level=1)
        url = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode("ascii")
        content = [
            {"type": "image_url", "image_url": {"url": url}},
            {"type": "text", "text": self.template.question(prompt)},
        ]
        messages = [{"role": "user", "content": content}]
        return {
            "model": self.model,
            "messages": messages,
            "temperature": 0,
            "max_tokens": self.max_tokens,
        } | self.request

    async def _answer(self, client: "httpx.AsyncClient", body: dict[str, Any]) -> str:
        """Ask the endpoint, again if necessary, and return the text of its answer."""
        import tenacity

        from rewards.remote.answers import parsed

        tries = tenacity.AsyncRetrying(
            stop=tenacity.stop_after_attempt(self.retries + 1),
            wait=_wait,
            retry=tenacity.retry_if_exception(_may_pass),
            reraise=True,
        )
        response: httpx.Response = await tries(self._post, client, body)
        try:
            answer = parsed(response)["choices"][0]["message"]["content"]
        except (ValueError, KeyError, IndexError, TypeError) as error:
            shown = foreign(response.text, self._key, longest=200)
            raise JudgeError(f"{self.url} did not answer with a chat completion: {shown!r}") from error
        return answer if isinstance(answer, str) else ""

    async def _post(self, client: "httpx.AsyncClient", body: dict[str, Any]) -> "httpx.Response":
        from rewards.remote.answers import fetch

        response = await fetch(client, "POST", self.url, self.timeout, json=body)
        if response.status_code in _RETRIED:
            response.raise_for_status()
        if response.status_code != 200:
            raise JudgeError(
                f"{self.url} answered {response.status_code}: {foreign(response.text, self._key, longest=200)!r}"
            )
        return response


def _failures() -> tuple[type[Exception], ...]:
    """Return the errors that cost an image its score but do not end the run."""
    import httpx

    return (JudgeError, httpx.TransportError, httpx.HTTPStatusError)


def _may_pass(error: BaseException) -> bool:
    import httpx

    return isinstance(error, (httpx.TransportError, httpx.HTTPStatusError))


def _wait(state: Any) -> float:
    """Return the seconds until the next try: what the server asks for, else half a second, doubled with each try."""
    import tenacity

    error = state.outcome.exception()
    if hasattr(error, "response"):
        requested = retry_after(error.response.headers.get("Retry-After"), _LONGEST_WAIT)
        if requested is not None:
            return requested
    return tenacity.wait_exponential_jitter(initial=0.5, max=_LONGEST_WAIT)(state)
