"""Images that are not read yet, and the error for a row that cannot be used."""

import base64
import binascii
import hashlib
import io
import os
import struct
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from PIL import Image, UnidentifiedImageError

from preference_data.pictures import FORMATS, ORIENTED_PNG, upright_rgb, upright_size
from preference_data.places import lies_in, printable, shortened

#: What Pillow's decoders raise for bytes that are not a complete image; they have no error type in common.
_DECODING = (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error, IndexError, KeyError, TypeError)
_BOMB = Image.DecompressionBombError
_LONGEST_PATH = 4096
#: Bytes that are looked at of a file, and at how many places; one that is no longer is read whole.
_LOOKED_AT = (2048, 8)


class BadRow(ValueError):
    """A row, or an image in it, that cannot be used. The message begins with ``where``: file, row, column."""

    def __init__(self, where: str, problem: str) -> None:
        where, problem = printable(where), printable(problem)  # both show names and values of the data
        super().__init__(where, problem)  # both in args, so that the error can be pickled by a worker process
        self.where = where
        self.problem = problem

    def __str__(self) -> str:
        return f"{self.where}: {self.problem}"


@dataclass(frozen=True, eq=False)
class ImageSource:
    """An image that is not read yet; make one with :meth:`of`. Exactly one of the last three fields is set.

    where: its place for messages, such as "file.parquet, row 3, column 'jpg_0'". path: the encoded file. data: the
    encoded bytes. picture: an image already decoded. within: the folder that the file must lie in, links followed; None
    for any.
    """

    where: str
    path: Path | None = None
    data: bytes | None = field(default=None, repr=False)
    picture: Image.Image | None = field(default=None, repr=False)
    within: Path | None = None

    @classmethod
    def of(cls, value: Any, where: str, folder: Path | None = None, within: Path | None = None) -> "ImageSource":
        """Make a source of whatever a data set holds as an image, without reading it.

        Args:
            value: a path (relative to ``folder``), encoded bytes, a ``data:`` URL with them, ``{"bytes": ..., "path": ...}``
                whose bytes take precedence, a PIL image, or an ImageSource, which is returned unchanged.
            where: the image's place, with which every error begins.
            folder: the data file's folder; None for the working folder.
            within: see the class.

        Raises:
            BadRow: there is no image, or it is a URL or of another type.
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
        if isinstance(value, str) and value.startswith("data:"):
            return cls(where, data=_decode_url(value, where))
        if isinstance(value, str) and value.startswith(("http://", "https://")):
            raise BadRow(
                where, f"{shortened(value)} is a URL: images are read from files and bytes, so download it first"
            )
        if isinstance(value, str) and len(value) > _LONGEST_PATH:
            raise BadRow(where, f"expected an image's path, found {shortened(value, 40)}: base64 must begin with data:")
        if not isinstance(value, (str, os.PathLike)):
            raise BadRow(where, f"expected an image (a path, bytes or a PIL image), found {type(value).__name__}")
        path = Path(value)
        return cls(where, path=path if folder is None else folder / path, within=within)  # an absolute path stays

    def check(self) -> None:
        """Raise BadRow if the file is missing, empty or outside of its folder, without reading it."""
        self._file_size()

    def _file_size(self) -> int:
        """Return the size of the file in bytes, or -1 without a file; raise BadRow as :meth:`check` does."""
        if self.path is None:
            return -1
        try:
            if self.within is not None and not lies_in(self.path, self.within):
                raise BadRow(
                    self.where,
                    f"the image {shortened(self.path)} lies outside of the data's folder {self.within}: set --image_folder to a "
                    "folder that it lies in",
                )
            size = self.path.stat().st_size
        except BadRow:
            raise
        except (OSError, ValueError) as error:  # ValueError: a zero byte in the name
            raise BadRow(self.where, self._unreadable(error)) from None
        if not self.path.is_file():
            raise BadRow(self.where, f"the image {self.path} is not a file")
        if not size:
            raise BadRow(self.where, f"the image {self.path} has no bytes")
        return size

    def _unreadable(self, error: Exception) -> str:
        if isinstance(error, FileNotFoundError):
            return f"the image {self.path} does not exist"
        return f"the image {self.path} cannot be read: {error}"

    def read(self) -> bytes:
        """Return the encoded bytes, as PNG for a picture in memory; raise BadRow if the file cannot be read."""
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
        """Decode the image as :func:`preference_data.pictures.upright_rgb` does.

        Raises:
            BadRow: missing, broken, cut short, of a format that is not read, or with more pixels than
                ``PIL.Image.MAX_IMAGE_PIXELS``.
        """
        encoded = self.picture if self.picture is not None else io.BytesIO(self.read())
        with self._broken():
            image = encoded if isinstance(encoded, Image.Image) else Image.open(encoded, formats=FORMATS)
            self._check_pixels(image)
            return upright_rgb(image)

    def size(self) -> tuple[int, int]:
        """Return the (width, height) that :meth:`open` would give, from the header alone; raise BadRow without one."""
        if self.picture is not None:
            return upright_size(self.picture)
        with self._header() as image:
            # Pillow looks for the orientation after a PNG's pixels too, and decodes all of them to get there: only if
            # there is one.
            if image.format == "PNG":
                content = self.read()
                if not any(name in content for name in ORIENTED_PNG):
                    return image.size
            return upright_size(image)

    def check_header(self) -> None:
        """Raise BadRow if the file is missing, empty or has no image's header. Only the header is read."""
        if self.picture is None:
            with self._header():
                return

    @contextmanager
    def _header(self) -> Iterator[Image.Image]:
        """Open the encoded image, of which only the header is read."""
        self.check()
        file = self.path if self.path is not None else io.BytesIO(self.read())
        with self._broken(), Image.open(file, formats=FORMATS) as image:
            self._check_pixels(image)
            yield image

    @contextmanager
    def _broken(self) -> Iterator[None]:
        """Turn what Pillow raises for a broken image into BadRow."""
        try:
            yield
        except BadRow:
            raise
        except UnidentifiedImageError:  # its message shows an object in memory
            known = ", ".join(FORMATS)
            raise BadRow(
                self.where, f"the image{self._path_for_message()} is broken: cannot identify it as {known}"
            ) from None
        except (*_DECODING, _BOMB) as error:
            raise BadRow(self.where, f"the image{self._path_for_message()} is broken: {error}") from None

    def _check_pixels(self, image: Image.Image) -> None:
        # Pillow itself only warns above this limit, and raises above twice the limit.
        limit = Image.MAX_IMAGE_PIXELS
        if limit is not None and image.width * image.height > limit:
            raise BadRow(
                self.where,
                f"the image{self._path_for_message()} has {image.width}x{image.height} pixels, more than {limit}",
            )

    def _path_for_message(self) -> str:
        return "" if self.path is None else f" {self.path}"

    def digest(self) -> str:
        """Return the SHA-256 of the encoded bytes, or of a decoded picture's mode, size and pixels."""
        if self.picture is None:
            return hashlib.sha256(self.read()).hexdigest()
        try:
            pixels = self.picture.tobytes()
        except _DECODING as error:
            raise BadRow(self.where, f"the image is broken: {error}") from None
        return hashlib.sha256(f"{self.picture.mode} {self.picture.size} ".encode() + pixels).hexdigest()

    def looked_at(self) -> bytes:
        """Return what tells this image from most others at the cost of a look: its length and bytes at a few places."""
        if self.picture is not None:
            return self.digest().encode()
        digest, size = hashlib.sha256(), self._length()
        if self.data is not None:
            look_at(io.BytesIO(self.data), size, digest)
            return digest.digest()
        assert self.path is not None
        try:
            with self.path.open("rb") as stored:
                look_at(stored, size, digest)
        except OSError as error:
            raise BadRow(self.where, self._unreadable(error)) from None
        return digest.digest()

    def same_as(self, other: "ImageSource") -> bool:
        """Whether both have the same :meth:`digest`; lengths are compared first, so that most pairs are not read."""
        if self is other or (self.path is not None and self.path == other.path):
            return True
        if (self.picture is None) is not (other.picture is None):
            return False
        if self.picture is None and self._length() != other._length():
            return False
        return self.digest() == other.digest()

    def _length(self) -> int:
        return len(self.data) if self.data is not None else self._file_size()


def _decode_url(url: str, where: str) -> bytes:
    """Return the bytes of a ``data:`` URL; raise BadRow for one that is not base64."""
    about, comma, text = url.partition(",")
    try:
        if not comma or not about.endswith(";base64"):
            raise ValueError("it has no `;base64,`")
        return base64.b64decode(text, validate=True) or b"\0"
    except (ValueError, binascii.Error) as error:
        raise BadRow(where, f"the data URL {shortened(url, 40)} cannot be read: {error}") from None


def look_at(stored: BinaryIO, size: int, digest: Any) -> None:
    """Add the length of a file, and its bytes at a few places, to a digest."""
    length, places = _LOOKED_AT
    digest.update(f"{size} ".encode())
    if size <= length * places:
        digest.update(stored.read())
        return
    for place in range(places):
        stored.seek((size - length) * place // (places - 1))
        digest.update(stored.read(length))
