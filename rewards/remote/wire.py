"""The format in which images are sent to a reward, over a pipe or as the body of an HTTP request.

A frame consists of the 4 bytes ``FAR1``, the lengths of the header (4 bytes) and the body (8 bytes), both little
endian, the header (JSON, UTF-8) and the body. A request's header is ``{"prompts": [...], "columns": {...}, "images":
[...]}`` with one entry for each image: ``{"mode": "RGB", "size": [w, h]}`` for raw pixels or ``{"png": N}`` for a PNG
of N bytes. The body holds the images' bytes one after the other. Both are lossless. This library sends raw pixels: on
one core it takes 0.3 ms to pack and unpack a 512x512 image, and 24 to 58 ms as a PNG with compression 1, which has 0.07
to 1 times the bytes.

This module also runs in the isolated environments: it uses only the standard library and Pillow, with Python 3.10 or
later.
"""

import base64
import binascii
import io
import json
import struct
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image

from rewards.remote.limits import (
    UNLIMITED,
    Budget,
    ContentError,
    FrameError,
    Limits,
    TooLarge,
    for_a_while,
    json_memory,
    memory,
)

MAGIC = b"FAR1"
_PREFIX = struct.Struct("<4sIQ")
PREFIX_BYTES = _PREFIX.size
#: Bits of a pixel, for the modes in which an image is fully described by its pixels (unlike one with a palette).
_BITS = {"1": 1, "L": 8, "LA": 16, "RGB": 24, "RGBA": 32, "CMYK": 32, "YCbCr": 24, "LAB": 24, "HSV": 24, "I": 32}
_BITS |= {"F": 32, "I;16": 16}
#: Limit for a header, and for a body of JSON.
_MAX_JSON_BYTES = 64 * 2**20
#: Header of an HTTP answer with the reward's digest, see `rewards.remote.service.digest_of`.
DIGEST_HEADER = "X-Reward-Digest"


@dataclass
class Request:
    """N images, N prompts, and N values of each column."""

    images: list[Image.Image]
    prompts: list[str]
    columns: dict[str, list[Any]]


# --- Writing ---


def frame(header: Mapping[str, Any], body: Sequence[bytes] = ()) -> list[bytes]:
    """Return a frame, in pieces to be written one after the other."""
    text = json.dumps(header).encode()
    return [_PREFIX.pack(MAGIC, len(text), sum(map(len, body))) + text, *body]


def encode_request(
    images: Sequence[Image.Image], prompts: Sequence[str], columns: Mapping[str, Sequence[Any]], **more: Any
) -> list[bytes]:
    """Return the frame of a request; ``more`` is added to its header.

    Raises:
        ValueError: something would not arrive unchanged: a column's value that JSON cannot hold, an image with a
            palette, something that is not an image.
    """
    check_json_values(columns)
    entries, body = [], []
    for row, image in enumerate(images):
        if not isinstance(image, Image.Image):
            raise ValueError(f"image {row} is {type(image).__name__}, not a PIL image")
        if image.mode not in _BITS:
            raise ValueError(f"image {row} has mode {image.mode!r}, which cannot be sent: convert it to RGB or RGBA")
        if 0 in image.size:
            raise ValueError(f"image {row} is empty: {image.width}x{image.height}")
        entries.append({"mode": image.mode, "size": image.size})
        body.append(image.tobytes())
    lists = {name: list(values) for name, values in columns.items()}
    return frame({"prompts": list(prompts), "columns": lists, "images": entries, **more}, body)


def check_json_values(columns: Mapping[str, Sequence[Any]]) -> None:
    """Raise ValueError, naming column and row, for a value that JSON would lose or change."""
    for name, values in columns.items():
        for row, value in enumerate(values):
            problem = _not_json(value)
            if problem is not None:
                raise ValueError(
                    f"column {name!r}, row {row}: {problem} cannot be sent to a reward that runs elsewhere "
                    "(only None, bool, int, float, str, and lists and str-keyed dicts of these)"
                )


def _not_json(value: Any) -> str | None:
    """Return what in a value JSON would lose or change, or None."""
    if value is None or type(value) in (bool, int, float, str):
        return None
    if type(value) is list:
        return next((problem for problem in map(_not_json, value) if problem is not None), None)
    if type(value) is dict:
        other_key = next((key for key in value if type(key) is not str), None)
        return f"the key {other_key!r}" if other_key is not None else _not_json(list(value.values()))
    return type(value).__name__


# --- Reading ---


def lengths(prefix: bytes | bytearray, limits: Limits) -> tuple[int, int]:
    """Read the lengths of the header and of the body from the first PREFIX_BYTES of a frame."""
    if len(prefix) < PREFIX_BYTES or prefix[:4] != MAGIC:
        raise FrameError(f"not a frame: it starts with {bytes(prefix[:4])!r}, not {MAGIC!r} and two lengths")
    _, header, body = _PREFIX.unpack(prefix[:PREFIX_BYTES])
    if header > _MAX_JSON_BYTES or header + body > limits.bytes:
        raise TooLarge(f"the frame claims {header + body} bytes; at most {limits.bytes} are allowed")
    return header, body


def read_frame(fill: Callable[[memoryview], None], limits: Limits = UNLIMITED) -> tuple[dict[str, Any], bytearray]:
    """Read a frame from a stream and return its header and body; ``fill`` fills a buffer with the next bytes."""

    def read(count: int) -> bytearray:
        data = bytearray(count)
        if count:
            fill(memoryview(data))
        return data

    header, body = lengths(read(PREFIX_BYTES), limits)
    return parse_object(read(header)), read(body)


def split(
    data: bytes | bytearray, limits: Limits, reserve: Callable[[int], None] | None = None
) -> tuple[dict[str, Any], memoryview]:
    """Split a complete frame into header and body."""
    header, body = lengths(data, limits)
    if len(data) != PREFIX_BYTES + header + body:
        raise FrameError(f"the frame claims {PREFIX_BYTES + header + body} bytes and has {len(data)}")
    start = PREFIX_BYTES + header
    return parse_object(bytes(memoryview(data)[PREFIX_BYTES:start]), limits, reserve), memoryview(data)[start:]


def parse_object(
    text: bytes | bytearray, limits: Limits = UNLIMITED, reserve: Callable[[int], None] | None = None
) -> dict[str, Any]:
    """Parse a JSON object; raise TooLarge before it takes too much memory, and FrameError for anything else.

    Args:
        reserve: as for :func:`decode_request`, called with the bytes of the objects.
    """
    if len(text) > _MAX_JSON_BYTES:
        raise TooLarge(
            f"JSON of {len(text)} bytes; at most {_MAX_JSON_BYTES} are allowed: send larger images in a frame"
        )
    count = json_memory(text)
    if count > limits.bytes:
        raise TooLarge(f"JSON that takes {count} bytes of memory; at most {limits.bytes} are allowed")
    try:
        with for_a_while(reserve, count):  # the text as characters
            value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise FrameError(f"not JSON: {type(error).__name__}: {error}") from None
    if reserve is not None:
        reserve(count)
    if not isinstance(value, dict):
        raise FrameError(f"JSON {type(value).__name__}, not an object")
    return value


def decode_request(
    header: Mapping[str, Any],
    body: bytes | bytearray | memoryview,
    limits: Limits,
    reserve: Callable[[int], None] | None = None,
) -> Request:
    """Return the request in a frame.

    Args:
        reserve: called with the bytes that each image takes in memory, before it is decoded.

    Raises:
        FrameError, TooLarge, ContentError, or what ``reserve`` raises.
    """
    entries = header.get("images")
    prompts, columns = _decode_columns(header, entries, limits)
    view, position, images, budget = memoryview(body), 0, [], Budget(limits, reserve)
    for row, entry in enumerate(entries or ()):
        where = f"image {row}"
        if isinstance(entry, Mapping) and _is_positive_int(entry.get("png")):
            end = position + entry["png"]
            _check_frame(end <= len(view), where, "its PNG extends beyond the body")
            images.append(_decode_png(view[position:end], where, budget))
        else:
            mode, size = _raw_entry(entry, where)
            budget.spend(where, mode, size)
            end = position + _pixel_bytes(mode, size)
            _check_frame(end <= len(view), where, f"{size[0]}x{size[1]} {mode} pixels extend beyond the body")
            images.append(Image.frombytes(mode, size, view[position:end]))
        position = end
    _check_frame(position == len(view), "images", f"they take {position} bytes of a body of {len(view)}")
    return Request(images, prompts, columns)


def decode_json(data: Mapping[str, Any], limits: Limits, reserve: Callable[[int], None] | None = None) -> Request:
    """Return the request in plain JSON: ``prompts``, optional ``columns``, and ``images``, each a PNG in base64.

    Arguments and errors are those of :func:`decode_request`.
    """
    entries = data.get("images")
    prompts, columns = _decode_columns(data, entries, limits)
    images, budget = [], Budget(limits, reserve)
    for row, text in enumerate(entries or ()):
        if not isinstance(text, str):
            raise ContentError(f"image {row} is not base64 text")
        with for_a_while(reserve, 2 * len(text)):  # its bytes, and those of the PNG
            try:
                png = base64.b64decode(text.encode(), validate=True)
            except (binascii.Error, UnicodeEncodeError):
                raise ContentError(f"image {row} is not base64 text") from None
            images.append(_decode_png(memoryview(png), f"image {row}", budget))
    return Request(images, prompts, columns)


def _decode_columns(header: Mapping[str, Any], entries: Any, limits: Limits) -> tuple[list[str], dict[str, list[Any]]]:
    """Return prompts and columns; raise ContentError unless there are as many values as images."""
    unknown = [key for key in header if key not in ("prompts", "columns", "images")]
    if unknown:
        raise ContentError(f"unknown key {unknown[0]!r}: a request has prompts, images and columns")
    if not isinstance(entries, list):
        raise ContentError(f"`images` must be a list, found {type(entries).__name__}")
    if len(entries) > limits.images:
        raise ContentError(f"{len(entries)} images; at most {limits.images} are allowed in one request")
    prompts, columns = header.get("prompts"), header.get("columns", {})
    if not isinstance(prompts, list) or not all(isinstance(prompt, str) for prompt in prompts):
        raise ContentError("`prompts` must be a list of texts")
    if not isinstance(columns, dict):
        raise ContentError(f"`columns` must be an object of lists, found {type(columns).__name__}")
    all_columns = {"prompts": prompts, **{f"column {name!r}": values for name, values in columns.items()}}
    for name, values in all_columns.items():
        if not isinstance(values, list) or len(values) != len(entries):
            found = len(values) if isinstance(values, list) else type(values).__name__
            raise ContentError(f"{name}: {found} for {len(entries)} images")
    return prompts, columns


def _raw_entry(entry: Any, where: str) -> tuple[str, tuple[int, int]]:
    mode, size = (entry.get("mode"), entry.get("size")) if isinstance(entry, Mapping) else (None, None)
    is_size = isinstance(size, list) and len(size) == 2 and all(map(_is_positive_int, size))
    if not isinstance(mode, str) or mode not in _BITS or size is None or not is_size:
        raise ContentError(f"{where}: {str(entry)[:100]} is neither a PNG nor a known mode with a size of at least 1x1")
    return mode, (size[0], size[1])


def _decode_png(data: memoryview, where: str, budget: Budget) -> Image.Image:
    """Decode a PNG, after checking the size that its header gives."""
    if _is_animated(data):  # some versions of Pillow make the frame's background before the size can be checked
        raise ContentError(f"{where} is an animated PNG")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our own limit is checked below
            image = Image.open(io.BytesIO(data), formats=["PNG"])
        budget.spend(where, image.mode, image.size)
        # A copy has neither a file nor text chunks, like an image from raw pixels. Meanwhile there are two, and the
        # decoder has two rows, in which a pixel takes up to eight bytes.
        with for_a_while(budget.reserve, memory(image.mode, image.size) + 16 * image.width):
            image.load()
            return image.copy()
    except FrameError:
        raise
    except Image.DecompressionBombError as error:
        raise ContentError(f"{where}: {error}") from None
    except (OSError, SyntaxError, ValueError, struct.error) as error:
        raise ContentError(f"{where} is not a readable PNG: {error}") from None


def _is_animated(data: memoryview) -> bool:
    """Whether a PNG has a chunk ``acTL`` before its pixels."""
    position = 8
    while position + 8 <= len(data):
        length, kind = struct.unpack(">I4s", data[position : position + 8])
        if kind in (b"acTL", b"IDAT"):
            return kind == b"acTL"
        position += length + 12
    return False


def _check_frame(condition: bool, where: str, message: str) -> None:
    if not condition:
        raise FrameError(f"{where}: {message}")


def _is_positive_int(value: Any) -> bool:
    return type(value) is int and value > 0


def _pixel_bytes(mode: str, size: tuple[int, int]) -> int:
    """Return the bytes of raw pixels, in which every row takes whole bytes."""
    return (size[0] * _BITS[mode] + 7) // 8 * size[1]


# --- The token ---


def checked_token(text: str | None, source: str) -> str | None:
    """Return a service's token without white space around it; None stays None.

    Raises:
        ValueError: it is blank, or a header cannot hold it. The message does not show the token.
    """
    if text is None:
        return None
    token = text.strip()
    if not token:  # an empty variable of a script would open the service to all
        raise ValueError(f"the token in {source} is blank, which is no token: give it a value, or leave it out")
    if not (token.isascii() and token.isprintable()):  # otherwise the HTTP library's error would show the whole header
        raise ValueError(f"the token in {source} contains characters other than printable ASCII ones")
    return token
