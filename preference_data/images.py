"""Images that are not read yet, and the error that names the row they stand in."""

import hashlib
import io
import os
import struct
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

#: What Pillow's decoders raise on bytes that are no whole image. They agree on no one type.
_DECODING = (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error, IndexError, KeyError, TypeError)
_BOMB = Image.DecompressionBombError
_ORIENTATION = 0x0112  # the EXIF tag
_TURNED = (5, 6, 7, 8)  # its values that exchange width and height


class BadRow(ValueError):
    """A row, or an image in it, that cannot be used. ``str()`` of it begins with where: file, row, column."""

    def __init__(self, where: str, problem: str) -> None:
        super().__init__(where, problem)  # both kept in args, so that it survives the way out of a worker process
        self.where = where
        self.problem = problem

    def __str__(self) -> str:
        return f"{self.where}: {self.problem}"


@dataclass(frozen=True, eq=False)
class ImageSource:
    """An image that is not read yet. Make one with :meth:`of`; exactly one of the last three fields is set.

    where: for messages: "file.parquet, row 3, column 'jpg_0'". path: of the encoded file. data: the encoded bytes.
    picture: an image already in memory.
    """

    where: str
    path: Path | None = None
    data: bytes | None = field(default=None, repr=False)
    picture: Image.Image | None = field(default=None, repr=False)

    @classmethod
    def of(cls, value: Any, where: str, folder: Path | None = None) -> "ImageSource":
        """Whatever a data set holds as an image, not read yet.

        Args:
            value: a path (relative to ``folder``), encoded bytes, ``{"bytes": ..., "path": ...}`` of which the bytes
                come first, a PIL image, or an ImageSource, which is returned as it is.
            where: named by every error.
            folder: the data file's folder; None for the working folder.

        Raises:
            BadRow: nothing there, a URL, or another type.
        """
        if isinstance(value, ImageSource):
            return value
        if isinstance(value, Mapping) and ("bytes" in value or "path" in value):
            value = value["bytes"] if value.get("bytes") is not None else value.get("path")
        if isinstance(value, Image.Image):
            return cls(where, picture=value)
        if isinstance(value, (bytes, bytearray, memoryview)):
            if not len(value):
                raise BadRow(where, "the image has no bytes")
            return cls(where, data=bytes(value))
        if value is None or value == "":
            raise BadRow(where, "there is no image")
        if isinstance(value, str) and value.startswith(("http://", "https://")):
            raise BadRow(where, f"{value} is a URL: images are read from files and bytes, so download it first")
        if not isinstance(value, (str, os.PathLike)):
            raise BadRow(where, f"expected an image (a path, bytes or a PIL image), found {type(value).__name__}")
        path = Path(value).expanduser()
        return cls(where, path=path if folder is None else folder / path)  # an absolute path stays what it is

    def check(self) -> None:
        """Raise BadRow if the file is missing or empty. Reads nothing."""
        self._bytes_on_disk()

    def _bytes_on_disk(self) -> int:
        if self.path is None:
            return -1
        try:
            size = self.path.stat().st_size
        except (OSError, ValueError) as error:  # ValueError: a zero byte in the name
            raise BadRow(self.where, self._unreadable(error)) from None
        if not self.path.is_file():
            raise BadRow(self.where, f"the image {self.path} is no file")
        if not size:
            raise BadRow(self.where, f"the image {self.path} has no bytes")
        return size

    def _unreadable(self, error: Exception) -> str:
        if isinstance(error, FileNotFoundError):
            return f"the image {self.path} does not exist"
        return f"the image {self.path} cannot be read: {error}"

    def read(self) -> bytes:
        """The encoded bytes; of a picture in memory those of a PNG. Raises BadRow if the file cannot be read."""
        if self.data is not None:
            return self.data
        if self.picture is not None:
            buffer = io.BytesIO()
            self.open().save(buffer, format="PNG")
            return buffer.getvalue()
        assert self.path is not None
        self.check()
        try:
            return self.path.read_bytes()
        except OSError as error:
            raise BadRow(self.where, self._unreadable(error)) from None

    def open(self) -> Image.Image:
        """The image decoded: RGB, EXIF orientation applied, transparency on white.

        Raises:
            BadRow: missing, broken or cut short, or of more pixels than ``PIL.Image.MAX_IMAGE_PIXELS``.
        """
        encoded = self.picture if self.picture is not None else io.BytesIO(self.read())
        try:
            image = encoded if isinstance(encoded, Image.Image) else Image.open(encoded)
            self._check_pixels(image)
            image.load()
            return _flat(ImageOps.exif_transpose(image))
        except BadRow:
            raise
        except (*_DECODING, _BOMB) as error:
            raise BadRow(self.where, f"the image{self._named()} is broken: {error}") from None

    def size(self) -> tuple[int, int]:
        """(width, height) as :meth:`open` would give it, from the header alone. Raises BadRow without one."""
        if self.picture is not None:
            return _turned_size(self.picture)
        with self._header() as image:
            # Pillow looks for EXIF behind a PNG's pixels, and decodes them all to get there: only if it is there.
            if image.format == "PNG" and "exif" not in image.info and b"eXIf" not in self.read():
                return image.size
            return _turned_size(image)

    def check_header(self) -> None:
        """Raise BadRow if the file is missing or empty, or begins like no image. Reads no more than its beginning."""
        if self.picture is None:
            with self._header():
                return

    @contextmanager
    def _header(self) -> Iterator[Image.Image]:
        """The encoded image, of which nothing but the header is read yet."""
        self.check()
        file = self.path if self.path is not None else io.BytesIO(self.read())
        try:
            with Image.open(file) as image:
                self._check_pixels(image)
                yield image
        except BadRow:
            raise
        except (*_DECODING, _BOMB) as error:
            raise BadRow(self.where, f"the image{self._named()} is broken: {error}") from None

    def _check_pixels(self, image: Image.Image) -> None:
        """Pillow itself only warns from this limit on, and refuses from twice of it."""
        limit = Image.MAX_IMAGE_PIXELS
        if limit is not None and image.width * image.height > limit:
            raise BadRow(
                self.where, f"the image{self._named()} has {image.width}x{image.height} pixels, more than {limit}"
            )

    def _named(self) -> str:
        return "" if self.path is None else f" {self.path}"

    def digest(self) -> str:
        """sha256 of the encoded bytes; of a picture in memory that of its mode, size and pixels."""
        if self.picture is None:
            return hashlib.sha256(self.read()).hexdigest()
        try:
            pixels = self.picture.tobytes()
        except _DECODING as error:
            raise BadRow(self.where, f"the image is broken: {error}") from None
        return hashlib.sha256(f"{self.picture.mode} {self.picture.size} ".encode() + pixels).hexdigest()

    def same_as(self, other: "ImageSource") -> bool:
        """Whether both have one :meth:`digest`; sizes are compared first, so that most pairs cost no reading."""
        if self is other or (self.path is not None and self.path == other.path):
            return True
        if (self.picture is None) is not (other.picture is None):
            return False
        if self.picture is None and self._length() != other._length():
            return False
        return self.digest() == other.digest()

    def _length(self) -> int:
        return len(self.data) if self.data is not None else self._bytes_on_disk()


def _turned_size(image: Image.Image) -> tuple[int, int]:
    width, height = image.size
    return (height, width) if image.getexif().get(_ORIENTATION) in _TURNED else (width, height)


def _flat(image: Image.Image) -> Image.Image:
    """RGB, with what is transparent on white, and 16 bits a channel brought down to 8 instead of clipped."""
    if image.mode.startswith("I"):
        values = np.asarray(image).astype(np.int64)
        scaled = values // 257 if values.size and values.max() > 255 else values
        image = Image.fromarray(np.clip(scaled, 0, 255).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")
