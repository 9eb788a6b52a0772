"""Tensors on disk by what they were made of: an image's latents, a prompt's embeddings.

The key of an entry hashes everything that decides its content (the model's weights, the image's bytes, the size), so an
entry made by another model, or from a picture that has changed since, is never found. Entries are files of their own,
written under another name and then renamed: a crash leaves whole entries or none, and two processes that make the same
entry write the same file.
"""

import hashlib
import json
import logging
import os
import tempfile
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

logger = logging.getLogger(__name__)


def cache_key(**made_of: Any) -> str:
    """Hex key of an entry, from everything that decides its content, as JSON values."""
    return hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()


class TensorCache:
    """A folder of tensors by key."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder).expanduser()

    def path(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}.safetensors"

    def __contains__(self, key: str) -> bool:
        return self.path(key).is_file()

    def get(self, key: str) -> Tensor | None:
        """The tensor stored under ``key``, on the CPU; None when there is none, or its file is damaged (a warning)."""
        path = self.path(key)
        if not path.is_file():
            return None
        try:
            return load_file(path)["tensor"]
        except (SafetensorError, KeyError) as error:
            logger.warning("cache entry %s is damaged (%s): it is made again", path, error)
            return None

    def put(self, key: str, tensor: Tensor) -> None:
        """Store a tensor under ``key``, replacing what is there."""
        path = self.path(key)
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".tmp-")
        os.close(handle)
        try:
            save_file({"tensor": tensor.detach().cpu().contiguous()}, temporary)
            os.replace(temporary, path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
