"""Where files may lie: a data set names files in its own folder, not any of the machine."""

import os
import unicodedata
from functools import lru_cache
from pathlib import Path


def lies_in(path: str | Path, folder: str | Path) -> bool:
    """Whether a file, links followed, lies in a folder; of a snapshot in the hub's cache its repository's blobs count too."""
    real, root = os.path.realpath(path), _real(os.path.abspath(folder))
    if os.path.commonpath([real, root]) == root:
        return True
    repository, snapshots, _ = root.rpartition(f"{os.sep}snapshots{os.sep}")
    of_hub = bool(snapshots) and os.path.basename(repository).startswith(("datasets--", "models--"))
    return of_hub and real.startswith(os.path.join(repository, "blobs") + os.sep)


@lru_cache(maxsize=256)
def _real(folder: str) -> str:
    return os.path.realpath(folder)


def printable(text: str) -> str:
    """Return a text of data as it may be sent to a terminal: control characters, and halves of a character, escaped."""
    return "".join(
        letter if letter.isprintable() or unicodedata.category(letter) == "Zs" else ascii(letter)[1:-1]
        for letter in text
    )


def shortened(text: object, length: int = 120) -> str:
    """Return the beginning of a text that a message shows, on one line, and how long it is where that is not all."""
    shown = printable(" ".join(str(text)[: 2 * length].split()))
    return shown if len(str(text)) <= length else f"{shown[:length]}... ({len(str(text))} characters)"
