"""Asking an HTTP server that is not trusted: its answer has a deadline, a largest size, and is not unpacked."""

import asyncio
import logging
from typing import Any

import httpx

from rewards.redaction import foreign

#: Bytes of an answer. A score takes 25; parsed, hostile JSON of this size takes 100 MiB.
ANSWER_BYTES = 4 * 2**20


def _leave_out_reason(record: logging.LogRecord) -> bool:
    """Put the usual words for a status into httpx's line about an answer, which quotes those that the server sent."""
    if isinstance(record.args, tuple) and len(record.args) == 5 and isinstance(record.args[3], int):
        record.args = (*record.args[:4], httpx.codes.get_reason_phrase(record.args[3]))
    return True


logging.getLogger("httpx").addFilter(_leave_out_reason)


async def fetch(client: httpx.AsyncClient, method: str, url: str, seconds: float, **request: Any) -> httpx.Response:
    """Send a request and return the whole answer, whose text is UTF-8 whatever its header says.

    Args:
        seconds: for all of it; httpx's own timeouts start again with every byte.

    Raises:
        httpx.TransportError: the connection failed, the time is up (ReadTimeout), or the answer is too large or
            compressed (RemoteProtocolError): a few kilobytes could unpack to gigabytes.
    """
    headers = {**request.pop("headers", {}), "Accept-Encoding": "identity"}
    body = bytearray()
    try:
        async with asyncio.timeout(seconds), client.stream(method, url, headers=headers, **request) as answer:
            encoding = answer.headers.get("Content-Encoding", "identity")
            if encoding.strip().lower() != "identity":
                raise httpx.RemoteProtocolError(f"the answer is packed with {encoding}, which was not asked for")
            async for piece in answer.aiter_raw():
                body += piece
                if len(body) > ANSWER_BYTES:
                    raise httpx.RemoteProtocolError(f"the answer has more than {ANSWER_BYTES} bytes")
    except TimeoutError:
        raise httpx.ReadTimeout(f"{url} did not answer within {seconds:g} s") from None
    except httpx.TransportError as error:  # its message may quote what the server sent
        secret = client.headers.get("Authorization", "").removeprefix("Bearer ")
        raise type(error)(foreign(str(error), secret, longest=200)) from None
    kept = [(name, value) for name, value in answer.headers.multi_items() if name != "content-type"]
    return httpx.Response(answer.status_code, headers=kept, content=bytes(body), request=answer.request)


def parsed(answer: httpx.Response, **options: Any) -> Any:
    """Return the JSON of an answer; raise ValueError if it is none."""
    try:
        return answer.json(**options)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def json_object(answer: httpx.Response) -> dict[str, Any]:
    """Return the JSON object in an answer, empty if there is none."""
    try:
        content = parsed(answer)
    except ValueError:
        return {}
    return content if isinstance(content, dict) else {}


def are_numbers(values: Any) -> bool:
    """Whether a part of an answer, its integers read as floats, is a list of numbers and null."""
    return isinstance(values, list) and all(isinstance(value, float | None) for value in values)
