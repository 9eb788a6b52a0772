"""Digests of rewards: whether scores may be compared with those of before, or of another service."""

import hashlib
import importlib.util
import inspect
import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from rewards.table import BUILTINS


def digest_of(spec: Mapping[str, Any]) -> str:
    """Return the SHA-256 of an entry's ``use`` and ``args`` as JSON, with the content of a user's file for its path.

    Where it runs does not matter, nor its weight. Of a module it is the content of the module's own file.
    """
    use: Any = spec["use"]
    target, _, attribute = use.rpartition(":")
    file = _file_of(target) if target and use not in BUILTINS else None
    if file is not None:
        use = [hashlib.sha256(file.read_bytes()).hexdigest(), attribute]
    text = json.dumps({"use": use, "args": spec.get("args") or None}, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def digest_of_callable(function: Callable[..., Any]) -> str:
    """Return the SHA-256 of a function's source text, or of its class's; "" where there is none."""
    try:
        source = inspect.getsource(function if inspect.isroutine(function) else type(function))
    except (OSError, TypeError):  # typed at a prompt, or written in C
        return ""
    return hashlib.sha256(source.encode()).hexdigest()


def _file_of(target: str) -> Path | None:
    """Return the file of ``file.py`` or of a module, which is not imported for it; None where it is not here."""
    if target.endswith(".py"):
        file = Path(target).expanduser()
        return file if file.is_file() else None
    inside = Path(
        *target.split(".")
    )  # where a module of the working folder lies, whether the path has the folder or not
    for file in (inside.with_suffix(".py"), inside / "__init__.py"):
        if file.is_file():
            return file
    try:
        found = sys.modules[target].__spec__ if target in sys.modules else importlib.util.find_spec(target)
    except (ImportError, ValueError, AttributeError):
        return None
    return Path(found.origin) if found is not None and found.has_location and found.origin else None
