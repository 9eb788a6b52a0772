"""What a request to a reward may take, in bytes of memory, counted before it is read.

Like `rewards.remote.wire` it also runs in the isolated environments.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

#: Bytes of a JSON value as a Python object, with its place in the list or dict around it, beside those of its text; at
#: most 82 were measured. Bytes of a row of an image's pixels beside those of its pixels: Pillow's pointer to it.
_VALUE_BYTES, _ROW_BYTES = 100, 8


@dataclass(frozen=True)
class Limits:
    """Limits of a frame.

    bytes: of the frame, of its JSON as objects (see :func:`json_memory`), and of its decoded images (see
    :func:`memory`). images: in it. pixels: of an image.
    """

    bytes: int = 256 * 2**20
    images: int = 1024
    pixels: int = 2**26


#: Between a run and its own worker no limits are needed.
UNLIMITED = Limits(bytes=2**48, images=2**31, pixels=2**40)


class FrameError(ValueError):
    """Not a frame: other bytes, a wrong length, a header that is not JSON."""


class TooLarge(FrameError):
    """A frame with more bytes than allowed."""


class ContentError(FrameError):
    """A valid frame whose content cannot be scored: its lengths, columns or images are wrong."""


def json_memory(text: bytes | bytearray) -> int:
    """Return the bytes that JSON takes as Python objects, at most: 60 MiB of ``{}`` are 1.45 GiB.

    Every value follows one of ``[ { , :``. A character takes up to four bytes, unless all are ASCII.
    """
    values = sum(map(text.count, (b"[", b"{", b",", b":"))) + 1
    width = 1 if text.isascii() and b"\\u" not in text else 4
    return len(text) * width + values * _VALUE_BYTES


def memory(mode: str, size: tuple[int, int]) -> int:
    """Return the bytes that an image takes in Pillow: four a pixel in most modes, including RGB, and eight a row."""
    return size[1] * (size[0] * {"1": 1, "L": 1, "P": 1, "I;16": 2}.get(mode, 4) + _ROW_BYTES)


@contextlib.contextmanager
def for_a_while(reserve: Callable[[int], None] | None, count: int) -> Iterator[None]:
    """Reserve bytes that are free again at the end of the context."""
    if reserve is not None:
        reserve(count)
    yield
    if reserve is not None:
        reserve(-count)


class Budget:
    """The memory that the images of a request may take; ``reserve`` is told the bytes of each before it is decoded."""

    def __init__(self, limits: Limits, reserve: Callable[[int], None] | None) -> None:
        self.limits, self.bytes_left, self.reserve = limits, limits.bytes, reserve

    def spend(self, where: str, mode: str, size: tuple[int, int]) -> None:
        """Count an image; raise ContentError if it is too large."""
        if size[0] * size[1] > self.limits.pixels:
            raise ContentError(f"{where}: {size[0]}x{size[1]} is more than {self.limits.pixels} pixels")
        count = memory(mode, size)
        self.bytes_left -= count
        if self.bytes_left < 0:
            raise ContentError(f"{where}: the images of this request unpack to more than {self.limits.bytes} bytes")
        if self.reserve is not None:
            self.reserve(count)
