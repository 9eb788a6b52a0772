"""The one format in which images travel to a reward: over a pipe, and as the body of an HTTP request.

A frame is 4 bytes ``FAR1``, the header's length (4 bytes), the body's length (8 bytes, little endian both), the header
(JSON, UTF-8) and the body. A request's header is ``{"prompts": [...], "columns": {...}, "images": [...]}`` with one entry
for each image, whose bytes lie in the body one after the other: ``{"mode": "RGB", "size": [w, h]}`` for raw pixels
or ``{"png": N}`` for a PNG of N bytes. Both are lossless. What this library sends is raw: on one core a 512x512 image
takes 0.3 ms to pack and unpack, as a PNG of compression 1 24 to 58 ms for 0.07 to 1 times the bytes.

Standard library and Pillow only, Python 3.10 or later: this runs in the isolated environments as well.
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

MAGIC = b"FAR1"
_PREFIX = struct.Struct("<4sIQ")
PREFIX_BYTES = _PREFIX.size
#: Bits of a pixel in the modes whose pixels are all there is to an image (a palette is not).
_BITS = {"1": 1, "L": 8, "LA": 16, "RGB": 24, "RGBA": 32, "CMYK": 32, "YCbCr": 24, "LAB": 24, "HSV": 24, "I": 32}
_BITS |= {"F": 32, "I;16": 16}
#: Of a header, and of a body that is JSON as a whole: as Python objects a hostile one takes many times its bytes.
_JSON_BYTES = 64 * 2**20
#: Of an HTTP answer: what the service says of its reward, see `rewards.remote.service`.
DIGEST_HEADER = "X-Reward-Digest"


@dataclass(frozen=True)
class Limits:
    """What a frame may hold: bytes of the whole and of its decoded images (see :func:`memory`), images, pixels of an image."""

    bytes: int = 256 * 2**20
    images: int = 1024
    pixels: int = 2**26


#: Between a run and its own worker nobody is hostile.
UNLIMITED = Limits(bytes=2**48, images=2**31, pixels=2**40)


class FrameError(ValueError):
    """Not a frame: other bytes, a lie about a length, no JSON."""


class TooLarge(FrameError):
    """More bytes than allowed."""


class ContentError(FrameError):
    """A frame as it should be, with content that cannot be scored: lengths, columns, images."""


@dataclass
class Request:
    """N images, N prompts, and N values of each column."""

    images: list[Image.Image]
    prompts: list[str]
    columns: dict[str, list[Any]]


# --- Writing ---


def frame(header: Mapping[str, Any], parts: Sequence[bytes] = ()) -> list[bytes]:
    """A frame, in pieces to be written one after the other."""
    text = json.dumps(header).encode()
    return [_PREFIX.pack(MAGIC, len(text), sum(map(len, parts))) + text, *parts]


def encode_request(
    images: Sequence[Image.Image], prompts: Sequence[str], columns: Mapping[str, Sequence[Any]], **more: Any
) -> list[bytes]:
    """The frame of a request; ``more`` goes into its header.

    Raises ValueError for what would not arrive as it left: a column's value that JSON has no word for, an image with a
    palette, something that is no image.
    """
    check_columns(columns)
    entries, parts = [], []
    for row, image in enumerate(images):
        if not isinstance(image, Image.Image):
            raise ValueError(f"image {row} is {type(image).__name__}, not a PIL image")
        if image.mode not in _BITS:
            raise ValueError(f"image {row} has mode {image.mode!r}, which is not sent: convert it to RGB or RGBA")
        if 0 in image.size:
            raise ValueError(f"image {row} is empty: {image.width}x{image.height}")
        entries.append({"mode": image.mode, "size": image.size})
        parts.append(image.tobytes())
    listed = {name: list(values) for name, values in columns.items()}
    return frame({"prompts": list(prompts), "columns": listed, "images": entries, **more}, parts)


def check_columns(columns: Mapping[str, Sequence[Any]]) -> None:
    """Raise ValueError naming column and row of a value that JSON would lose or change."""
    for name, values in columns.items():
        for row, value in enumerate(values):
            found = _not_json(value)
            if found is not None:
                raise ValueError(
                    f"column {name!r}, row {row}: {found} cannot be sent to a reward that runs elsewhere "
                    "(only None, bool, int, float, str, and lists and str-keyed dicts of these)"
                )


def _not_json(value: Any) -> str | None:
    """What in a value JSON would lose or change, if anything."""
    if value is None or type(value) in (bool, int, float, str):
        return None
    if type(value) is list:
        return next((found for found in map(_not_json, value) if found is not None), None)
    if type(value) is dict:
        odd = next((key for key in value if type(key) is not str), None)
        return f"the key {odd!r}" if odd is not None else _not_json(list(value.values()))
    return type(value).__name__


# --- Reading ---


def lengths(prefix: bytes | bytearray, limits: Limits) -> tuple[int, int]:
    """Bytes of the header and of the body, from the first PREFIX_BYTES of a frame."""
    if len(prefix) < PREFIX_BYTES or prefix[:4] != MAGIC:
        raise FrameError(f"not a frame: it starts with {bytes(prefix[:4])!r}, not {MAGIC!r} and two lengths")
    _, header, body = _PREFIX.unpack(prefix[:PREFIX_BYTES])
    if header > _JSON_BYTES or header + body > limits.bytes:
        raise TooLarge(f"the frame claims {header + body} bytes; at most {limits.bytes} are taken")
    return header, body


def read_frame(fill: Callable[[memoryview], None], limits: Limits = UNLIMITED) -> tuple[dict[str, Any], bytearray]:
    """Header and body; ``fill`` writes the next bytes of the stream into a buffer, as many as it has room for."""

    def read(count: int) -> bytearray:
        data = bytearray(count)
        if count:
            fill(memoryview(data))
        return data

    header, body = lengths(read(PREFIX_BYTES), limits)
    return parse_object(read(header)), read(body)


def split(data: bytes | bytearray, limits: Limits) -> tuple[dict[str, Any], memoryview]:
    """Header and body of a frame that is there as a whole."""
    header, body = lengths(data, limits)
    if len(data) != PREFIX_BYTES + header + body:
        raise FrameError(f"the frame claims {PREFIX_BYTES + header + body} bytes and has {len(data)}")
    start = PREFIX_BYTES + header
    return parse_object(bytes(memoryview(data)[PREFIX_BYTES:start])), memoryview(data)[start:]


def parse_object(text: bytes | bytearray) -> dict[str, Any]:
    """A JSON object from its text; TooLarge beyond 64 MiB."""
    if len(text) > _JSON_BYTES:
        raise TooLarge(f"JSON of {len(text)} bytes; at most {_JSON_BYTES} are taken: larger images travel in a frame")
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise FrameError(f"not JSON: {type(error).__name__}: {error}") from None
    if not isinstance(value, dict):
        raise FrameError(f"JSON {type(value).__name__}, not an object")
    return value


def memory(mode: str, size: tuple[int, int]) -> int:
    """Bytes that Pillow holds an image in: four a pixel in most modes, RGB too."""
    return size[0] * size[1] * {"1": 1, "L": 1, "P": 1, "I;16": 2}.get(mode, 4)


class _Room:
    """What the images of a request may still take; ``hold`` hears of each one's bytes before it is decoded."""

    def __init__(self, limits: Limits, hold: Callable[[int], None] | None) -> None:
        self.limits, self.left, self.hold = limits, limits.bytes, hold

    def take(self, where: str, mode: str, size: tuple[int, int]) -> None:
        if size[0] * size[1] > self.limits.pixels:
            raise ContentError(f"{where}: {size[0]}x{size[1]} is more than {self.limits.pixels} pixels")
        count = memory(mode, size)
        self.left -= count
        if self.left < 0:
            raise ContentError(f"{where}: the images of this request unpack to more than {self.limits.bytes} bytes")
        if self.hold is not None:
            self.hold(count)


def decode_request(
    header: Mapping[str, Any],
    body: bytes | bytearray | memoryview,
    limits: Limits,
    hold: Callable[[int], None] | None = None,
) -> Request:
    """The request of a frame; raises FrameError, TooLarge or ContentError, or what ``hold`` does.

    ``hold`` is told the bytes of each image in memory, before it is decoded.
    """
    entries = header.get("images")
    prompts, columns = _texts(header, entries, limits)
    view, at, images, room = memoryview(body), 0, [], _Room(limits, hold)
    for row, entry in enumerate(entries or ()):
        where = f"image {row}"
        if isinstance(entry, Mapping) and _count(entry.get("png")):
            data, at = view[at : at + entry["png"]], at + entry["png"]
            _fits(at <= len(view), where, "its PNG goes beyond the body")
            images.append(_png(data, where, room))
        else:
            mode, size = _raw_entry(entry, where)
            room.take(where, mode, size)
            data, at = view[at : at + (count := _pixel_bytes(mode, size))], at + count
            _fits(at <= len(view), where, f"{size[0]}x{size[1]} {mode} pixels go beyond the body")
            images.append(Image.frombytes(mode, size, data))
    _fits(at == len(view), "images", f"they take {at} bytes of a body of {len(view)}")
    return Request(images, prompts, columns)


def decode_json(data: Mapping[str, Any], limits: Limits, hold: Callable[[int], None] | None = None) -> Request:
    """As :func:`decode_request`, of plain JSON: ``prompts``, ``columns`` if any, and ``images``, each a PNG in base64."""
    entries = data.get("images")
    prompts, columns = _texts(data, entries, limits)
    images, room = [], _Room(limits, hold)
    for row, text in enumerate(entries or ()):
        try:
            png = base64.b64decode(text.encode() if isinstance(text, str) else b"?", validate=True)
        except (binascii.Error, UnicodeEncodeError):
            raise ContentError(f"image {row} is not base64 text") from None
        images.append(_png(memoryview(png), f"image {row}", room))
    return Request(images, prompts, columns)


def _texts(header: Mapping[str, Any], entries: Any, limits: Limits) -> tuple[list[str], dict[str, list[Any]]]:
    """Prompts and columns, once they are as many as the images."""
    unknown = [key for key in header if key not in ("prompts", "columns", "images")]
    if unknown:
        raise ContentError(f"unknown key {unknown[0]!r}: a request has prompts, images and columns")
    if not isinstance(entries, list):
        raise ContentError(f"`images` must be a list, found {type(entries).__name__}")
    if len(entries) > limits.images:
        raise ContentError(f"{len(entries)} images; at most {limits.images} are taken in one request")
    prompts, columns = header.get("prompts"), header.get("columns", {})
    if not isinstance(prompts, list) or not all(isinstance(prompt, str) for prompt in prompts):
        raise ContentError("`prompts` must be a list of texts")
    if not isinstance(columns, dict):
        raise ContentError(f"`columns` must be an object of lists, found {type(columns).__name__}")
    for name, values in {
        "prompts": prompts,
        **{f"column {name!r}": values for name, values in columns.items()},
    }.items():
        if not isinstance(values, list) or len(values) != len(entries):
            found = len(values) if isinstance(values, list) else type(values).__name__
            raise ContentError(f"{name}: {found} for {len(entries)} images")
    return prompts, columns


def _raw_entry(entry: Any, where: str) -> tuple[str, tuple[int, int]]:
    mode, size = (entry.get("mode"), entry.get("size")) if isinstance(entry, Mapping) else (None, None)
    sized = isinstance(size, list) and len(size) == 2 and all(map(_count, size))
    if not isinstance(mode, str) or mode not in _BITS or size is None or not sized:
        raise ContentError(f"{where}: {str(entry)[:100]} is neither a mode and a size from 1x1 on, nor a PNG")
    return mode, (size[0], size[1])


def _png(data: memoryview, where: str, room: _Room) -> Image.Image:
    """An image from its PNG, whose header is believed only if what it claims is allowed."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our own limit follows
            image = Image.open(io.BytesIO(data), formats=["PNG"])
        room.take(where, image.mode, image.size)
        image.load()
    except FrameError:
        raise
    except Image.DecompressionBombError as error:
        raise ContentError(f"{where}: {error}") from None
    except (OSError, SyntaxError, ValueError, struct.error) as error:
        raise ContentError(f"{where} is not a readable PNG: {error}") from None
    # A plain image, as raw pixels give: no file, no text chunks.
    return image.copy()


def _fits(condition: bool, where: str, message: str) -> None:
    if not condition:
        raise FrameError(f"{where}: {message}")


def _count(value: Any) -> bool:
    return type(value) is int and value > 0


def _pixel_bytes(mode: str, size: tuple[int, int]) -> int:
    """Of raw pixels: rows, each of whole bytes."""
    return (size[0] * _BITS[mode] + 7) // 8 * size[1]


# --- The token ---


def checked_token(text: str | None, source: str) -> str | None:
    """A service's token without the space around it; ValueError, which does not show it, where no header could hold it."""
    token = (text or "").strip()
    if not (token.isascii() and token.isprintable()):  # the HTTP library would show the whole header in its error
        raise ValueError(f"the token in {source} holds characters other than printable ASCII ones")
    return token or None
