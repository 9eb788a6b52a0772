"""Find a model's folder, say early, before anything is loaded, what is missing from it, and tell models apart."""

import hashlib
import json
from collections.abc import Collection
from difflib import get_close_matches
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import nn

from align.tiny import CHECKPOINT

#: Names that travel with the package.
EMBEDDED = {"tiny": CHECKPOINT}
#: What makes a folder one of a diffusers pipeline: it lists the pipeline's modules, each in a folder of its own.
INDEX = "model_index.json"


def nearest(word: str, choices: Collection[str]) -> str:
    """Return " Did you mean 'x'?", or the choices there are: the end of an error message."""
    close = get_close_matches(word, list(choices), n=1, cutoff=0.5)
    return f" Did you mean {close[0]!r}?" if close else f" There are: {', '.join(sorted(choices))}."


def resolve_folder(name: str | Path) -> Path:
    """Return the local folder of a model: an embedded name, a path, or a hub name that is, or can be, downloaded.

    Raises:
        FileNotFoundError: a path that does not exist, a folder that lacks a module, or a hub name out of reach.
    """
    if str(name) in EMBEDDED:
        return _checked(EMBEDDED[str(name)])
    path = Path(name).expanduser()
    if path.is_dir():
        return _checked(path)
    if path.is_absolute() or str(name).startswith((".", "~")) or str(name).count("/") != 1:
        raise FileNotFoundError(
            f"model folder {str(name)!r} does not exist. Give a folder in the layout of Qwen/Qwen-Image, a hub name "
            f"(owner/name), or one of: {', '.join(EMBEDDED)}."
            + (nearest(str(name), list(EMBEDDED)) if "/" not in str(name) else "")
        )
    return _checked(_download(str(name)))


def _download(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    def fetch(cached: bool) -> Path:
        index = Path(snapshot_download(name, allow_patterns=[INDEX], local_files_only=cached))
        patterns = [INDEX, *(f"{module}/*" for module in _modules(index))]
        return Path(snapshot_download(name, allow_patterns=patterns, local_files_only=cached))

    try:
        try:  # what is in the cache serves without asking the hub, unless a download broke off
            folder = fetch(cached=True)
            check_weights(folder)
            return folder
        except (LocalEntryNotFoundError, FileNotFoundError):
            return fetch(cached=False)
    except Exception as error:  # a hub out of reach raises a dozen unrelated types, from several libraries
        raise FileNotFoundError(
            f"model {name!r} is not in the local cache and the hub did not give it ({type(error).__name__}). On a "
            f"machine with a network run `hf download {name} --local-dir {Path(name).name}`, copy that folder here, "
            f"and pass its path as --model."
        ) from error


def _modules(folder: Path) -> list[str]:
    """Return the modules that a pipeline's folder must hold: the pairs [library, class] of its index."""
    index = json.loads((folder / INDEX).read_text())
    return [name for name, value in index.items() if isinstance(value, list) and value[0] is not None]


def _checked(folder: Path) -> Path:
    if not (folder / INDEX).is_file():
        raise FileNotFoundError(f"{folder} holds no {INDEX}: it is not a diffusers pipeline folder")
    modules = _modules(folder)
    for module in modules:
        if not (folder / module).is_dir() or not any((folder / module).iterdir()):
            raise FileNotFoundError(f"model folder {folder} has no {module!r} (needs: {', '.join(modules)})")
    return folder


def check_weights(folder: Path) -> None:
    """Raise FileNotFoundError, naming the file, for a module of a model's folder whose weights are not all there."""
    for module in _modules(folder):
        if not (folder / module / "config.json").is_file():
            continue  # a tokenizer or a scheduler
        for index in (folder / module).glob("*.safetensors.index.json"):
            for name in sorted(set(json.loads(index.read_text())["weight_map"].values())):
                if not (folder / module / name).is_file():
                    raise FileNotFoundError(f"model folder {folder} lacks {module}/{name}, which {index.name} lists")
        if not any((folder / module).glob("*.safetensors")):
            raise FileNotFoundError(f"model folder {folder} has no weights (*.safetensors) in {module}")


#: Bytes of a weight file that are looked at to tell a model by: this many, at as many places.
_LOOKED_AT = (4096, 64)


def describe_transformer(name: str, folder: Path) -> dict[str, Any]:
    """Return what tells a model's transformer from another: its name, its config, a digest of some of its weights."""
    transformer, digest = folder / "transformer", hashlib.sha256()
    for file in sorted(transformer.glob("*.safetensors")):
        with file.open("rb") as stored:
            _digest_some(stored, file.stat().st_size, digest)
    config = json.loads((transformer / "config.json").read_text())
    settings = {key: value for key, value in config.items() if key[0] != "_"}
    return {"name": name, "weights": digest.hexdigest()[:16]} | settings


def _digest_some(stored: BinaryIO, size: int, digest: Any) -> None:
    length, places = _LOOKED_AT
    header = stored.read(8)
    digest.update(header + stored.read(int.from_bytes(header, "little")))  # names, shapes and types of all tensors
    start = stored.tell()
    for place in range(places):
        stored.seek(max(start, start + (size - start - length) * place // (places - 1)))
        digest.update(stored.read(length))


def digest_file(file: Path) -> str:
    """Return a digest of a file's content."""
    return hashlib.sha256(file.read_bytes()).hexdigest()[:16]


def digest_module(module: nn.Module, about: list[Any]) -> str:
    """Return a digest of a module's weights and of ``about``, a list of JSON values."""
    digest = hashlib.sha256()
    for settings in about:
        digest.update(json.dumps(settings, default=str, sort_keys=True).encode())
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
