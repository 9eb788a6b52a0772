"""Find a model's folder, say early, before anything is loaded, what is missing from it, and tell models apart."""

import hashlib
import json
from difflib import get_close_matches
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import nn

from align.tiny import CHECKPOINT

#: Names that travel with the package.
EMBEDDED = {"tiny": CHECKPOINT}
#: What a folder in the layout of Qwen/Qwen-Image holds.
PARTS = ("scheduler", "text_encoder", "tokenizer", "transformer", "vae")


def nearest(word: str, choices: "set[str] | list[str] | tuple[str, ...]") -> str:
    """ " Did you mean 'x'?" or the choices there are: the end of an error message."""
    close = get_close_matches(word, list(choices), n=1, cutoff=0.5)
    return f" Did you mean {close[0]!r}?" if close else f" There are: {', '.join(sorted(choices))}."


def resolve_folder(name: str | Path) -> Path:
    """The local folder of a model: an embedded name, a path, or a hub name that is, or can be, downloaded.

    Raises:
        FileNotFoundError: for a path that does not exist, a folder without a part, or a hub name out of reach.
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

    patterns = ["model_index.json", *(f"{part}/*" for part in PARTS)]
    try:
        try:  # what is in the cache serves without asking the hub
            return Path(snapshot_download(name, allow_patterns=patterns, local_files_only=True))
        except LocalEntryNotFoundError:
            return Path(snapshot_download(name, allow_patterns=patterns))
    except Exception as error:  # a hub out of reach raises a dozen unrelated types, from several libraries
        raise FileNotFoundError(
            f"model {name!r} is not in the local cache and the hub did not give it ({type(error).__name__}). On a "
            f"machine with a network run `hf download {name} --local-dir {Path(name).name}`, copy that folder here, "
            f"and pass its path as --model."
        ) from error


def _checked(folder: Path) -> Path:
    index = folder / "model_index.json"
    if not index.is_file():
        raise FileNotFoundError(f"{folder} holds no model_index.json: it is not a diffusers pipeline folder")
    for part in PARTS:
        if not (folder / part).is_dir() or not any((folder / part).iterdir()):
            raise FileNotFoundError(f"model folder {folder} has no {part!r} (needs: {', '.join(PARTS)})")
    return folder


def latent_cell(folder: Path) -> int:
    """Pixels per latent token side, read from the VAE's config without loading it."""
    config = json.loads((folder / "vae" / "config.json").read_text())
    return 2 ** len(config["temperal_downsample"]) * 2


def check_resolution(folder: Path, height: int, width: int) -> None:
    """Raise ValueError, naming the nearest sizes that would do, when a resolution does not divide."""
    cell = latent_cell(folder)
    for key, value in (("height", height), ("width", width)):
        if value < cell or value % cell:
            below = max(cell, value // cell * cell)
            raise ValueError(
                f"{key} {value} must be a positive multiple of {cell}: the nearest are {below} and {below + cell}"
            )


#: Bytes of a weight file that are looked at to tell a model by: this many, at as many places.
_LOOKED_AT = (4096, 64)


def describe_transformer(name: str, folder: Path) -> dict[str, Any]:
    """What tells a model's transformer from another: its name, its config, and a digest of some of its weights."""
    part, digest = folder / "transformer", hashlib.sha256()
    for file in sorted(part.glob("*.safetensors")):
        with file.open("rb") as stored:
            _digest_some(stored, file.stat().st_size, digest)
    config = json.loads((part / "config.json").read_text())
    return {"name": name, "weights": digest.hexdigest()[:16]} | {k: v for k, v in config.items() if k[0] != "_"}


def _digest_some(stored: BinaryIO, size: int, digest: Any) -> None:
    length, places = _LOOKED_AT
    header = stored.read(8)
    digest.update(header + stored.read(int.from_bytes(header, "little")))  # names, shapes and types of all tensors
    start = stored.tell()
    for place in range(places):
        stored.seek(max(start, start + (size - start - length) * place // (places - 1)))
        digest.update(stored.read(length))


def digest_adapter(folder: str | Path) -> str:
    """What tells a LoRA's folder from another: a digest of its weights."""
    digest = hashlib.sha256()
    for file in sorted(Path(folder).glob("*.safetensors")):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def digest_module(module: nn.Module, about: list[Any]) -> str:
    """What tells a part of a model from another: a digest of all its weights, and of what else is said ``about`` it."""
    digest = hashlib.sha256()
    for said in about:
        digest.update(json.dumps(said, default=str, sort_keys=True).encode())
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
