"""A cache of tensors on disk: latents of images, embeddings of prompts.

The key of an entry is a hash of everything that decides its content (the model's weights, the image's bytes, the size).
An entry of another model, or of an image that has changed since, is therefore never found. Each entry is a file of its
own, written under a temporary name and then renamed: a crash leaves no incomplete entry, and two processes that make
the same entry write the same file.
"""

import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

logger = logging.getLogger(__name__)


def cache_key(**made_of: Any) -> str:
    """Hash everything that decides an entry's content, given as JSON values, to a hexadecimal key."""
    return hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()


class CacheUnusable(ValueError):
    """The cache's folder cannot be written or read."""


class TensorCache:
    """A folder of tensors, one file per key, which several users may share."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder).expanduser()

    def check(self) -> None:
        """Raise CacheUnusable if nothing can be written there."""
        with self._usable("written"):
            self.folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.folder) as file:
                file.write(b"\0" * 4096)

    @contextmanager
    def _usable(self, what: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise CacheUnusable(
                f"the cache {self.folder} cannot be {what} ({error.strerror or error}): pass another folder with --cache_dir, "
                "or --cache_dir none"
            ) from error

    def path(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}.safetensors"

    def __contains__(self, key: str) -> bool:
        return self.path(key).is_file()

    def get(self, key: str) -> Tensor | None:
        """Return the tensor stored under ``key``, on the CPU, or None.

        None means that there is no such entry, or that its file is damaged, which is logged as a warning.
        """
        path = self.path(key)
        if not path.is_file():
            return None
        try:
            with self._usable("read"):
                return load_file(path)["tensor"]
        except (SafetensorError, KeyError) as error:
            logger.warning("cache entry %s is damaged (%s): it will be made again", path, error)
            return None

    def put(self, key: str, tensor: Tensor) -> None:
        """Store a tensor under ``key``, replacing an existing entry; raise CacheUnusable where that cannot be done."""
        path = self.path(key)
        with self._usable("written"):
            path.parent.mkdir(parents=True, exist_ok=True)
            handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".tmp-")
            os.close(handle)
            try:
                _save(tensor, temporary)
                os.chmod(
                    temporary, 0o666 & ~_umask()
                )  # mkstemp's is for its owner alone, and others may share the cache
                os.replace(temporary, path)
            except BaseException:
                Path(temporary).unlink(missing_ok=True)
                raise


def _save(tensor: Tensor, file: str) -> None:
    try:
        save_file({"tensor": tensor.detach().cpu().contiguous()}, file)
    except SafetensorError as error:  # how it tells of a full disk
        raise OSError(str(error)) from error


def _umask() -> int:
    umask = os.umask(0o077)
    os.umask(umask)
    return umask
