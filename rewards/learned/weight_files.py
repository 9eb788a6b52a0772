"""Find a reward's checkpoint and read it: a local path, else the hub's cache, else the hub; no code in it is run.

Nothing here is tied to one version of torch or of the hub's client: the isolated environments use it too.
"""

from __future__ import annotations

import logging
import math
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from pickle import UnpicklingError  # only to name the refusal; torch.load does the reading
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, nn

_log = logging.getLogger(__name__)

#: What a folder must hold, by what it is needed for; any one file of each tuple will do.
MODEL = {"config": ("config.json",), "weights": ("model*.safetensors", "pytorch_model*.bin")}
TOKENIZER = {"tokenizer": ("tokenizer.json", "vocab.json", "vocab.txt")}
IMAGES = {"image processor": ("preprocessor_config.json", "processor_config.json")}
_SMALL = ["*.json", "merges.txt", "vocab.txt"]


def find_file(name: str | Path, *, reward: str, arg: str, file: str = "") -> Path:
    """The local path of one file.

    Args:
        name: a file; a folder that holds `file`; or ``owner/name:file`` on the hub, which is looked for in the local
            cache first.
        reward, arg: whose file it is, and which of its args names it: for the errors.

    Raises:
        FileNotFoundError: saying which file to get, how, and where to put it.
    """
    path, (repository, _, remote) = Path(name).expanduser(), str(name).partition(":")
    if path.is_file():
        return path
    if path.is_dir() and (path / file).is_file():
        return path / file
    if path.is_dir() or not remote or repository.count("/") != 1 or path.is_absolute() or repository[0] in ".~":
        folder = path if path.is_dir() else path.parent
        beside = sorted(p.name for p in folder.iterdir() if p.is_file())[:8] if folder.is_dir() else []
        holds = f"{folder} holds {', '.join(beside) or 'no files'}" if folder.is_dir() else f"{folder} does not exist"
        raise FileNotFoundError(
            f"reward {reward!r}: {arg} {str(name)!r} is no file{f' and holds no {file}' if path.is_dir() else ''}; "
            f"{holds}. Give a file, or owner/name:file on the hub."
        )
    from huggingface_hub import hf_hub_download

    try:
        return Path(_cached_first(hf_hub_download, repository, remote))
    except Exception as error:  # a hub out of reach raises a dozen unrelated types, from several libraries
        local = f"{Path(repository).name}/{remote}"
        raise FileNotFoundError(
            f"reward {reward!r} needs the file {remote} of {repository}, which is not in the local hub cache, and the "
            f"hub did not give it ({type(error).__name__}). On a machine with a network run `hf download {repository} "
            f"{remote} --local-dir {Path(repository).name}`, copy {local} here, and pass its path: "
            f"`args: {{{arg}: {local}}}`."
        ) from error


def find_folder(name: str | Path, needs: Mapping[str, tuple[str, ...]], *, reward: str, arg: str) -> Path:
    """The local folder of a model, tokenizer or image processor: a path, or ``owner/name`` on the hub.

    Args:
        needs: parts it must hold, each with globs of which one must match: :data:`MODEL`, :data:`TOKENIZER`,
            :data:`IMAGES` or a union of them. Only files of these parts are downloaded, weights as safetensors where
            the hub has them.

    Raises:
        FileNotFoundError: naming the part that is missing, or which files to get, how, and where to put them.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        lacking = _lacking(path, needs)
        if lacking:
            raise FileNotFoundError(f"reward {reward!r}: {arg} {path} has no {lacking} ({' or '.join(needs[lacking])})")
        return path
    if str(name).count("/") != 1 or path.is_absolute() or str(name)[0] in ".~":
        raise FileNotFoundError(
            f"reward {reward!r}: {arg} {str(name)!r} is no folder. Give a folder, or owner/name on the hub."
        )
    patterns = [*_SMALL, *(["model*.safetensors"] if "weights" in needs else [])]
    try:
        folder = _downloaded(str(name), needs, patterns)
    except Exception as error:  # as above
        raise FileNotFoundError(_how_to_get(str(name), patterns, reward, arg, type(error).__name__)) from error
    lacking = _lacking(folder, needs)
    if lacking:
        raise FileNotFoundError(f"reward {reward!r}: {arg} {name} has no {lacking} ({' or '.join(needs[lacking])})")
    return folder


def holds(name: str | Path, needs: Mapping[str, tuple[str, ...]]) -> bool:
    """Whether a local folder, or the local cache of a hub name, has all parts."""
    path = Path(name).expanduser()
    if not path.is_dir():
        from huggingface_hub import snapshot_download

        try:
            path = Path(snapshot_download(str(name), local_files_only=True))
        except (FileNotFoundError, ValueError):  # not cached, or no hub name at all
            return False
    return not _lacking(path, needs)


def _downloaded(name: str, needs: Mapping[str, tuple[str, ...]], patterns: list[str]) -> Path:
    """A snapshot of a repository; the cache serves without asking the hub when it has all parts."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils import LocalEntryNotFoundError

    try:
        folder = Path(snapshot_download(name, local_files_only=True))
        if not _lacking(folder, needs):
            return folder
    except LocalEntryNotFoundError:
        _log.debug("%s is not in the local hub cache", name)
    folder = Path(snapshot_download(name, allow_patterns=patterns))
    if _lacking(folder, needs) == "weights":
        folder = Path(snapshot_download(name, allow_patterns=[*_SMALL, "pytorch_model*.bin"]))
    return folder


def _cached_first(download: Any, repository: str, file: str) -> str:
    from huggingface_hub.utils import LocalEntryNotFoundError

    try:
        return download(repository, file, local_files_only=True)
    except LocalEntryNotFoundError:
        return download(repository, file)


def _lacking(folder: Path, needs: Mapping[str, tuple[str, ...]]) -> str | None:
    return next((part for part, globs in needs.items() if not any(any(folder.glob(g)) for g in globs)), None)


def _how_to_get(name: str, patterns: Sequence[str], reward: str, arg: str, failure: str) -> str:
    folder = Path(name).name
    included = " ".join(f"--include '{pattern}'" for pattern in patterns)
    return (
        f"reward {reward!r} needs {name}, which is not in the local hub cache, and the hub did not give it ({failure}). "
        f"On a machine with a network run `hf download {name} {included} --local-dir {folder}`, copy that folder here, "
        f"and pass its path: `args: {{{arg}: {folder}}}`."
    )


def read_state_dict(path: Path, *, reward: str, allow_pickle: bool = False) -> dict[str, Tensor]:
    """Read a checkpoint's tensors by name, on the CPU; the inner one of ``{"state_dict": ..., ...}``.

    A ``.safetensors`` file can hold nothing but tensors. Any other is read by ``torch.load(weights_only=True)``, which
    refuses every pickle that would run code; `allow_pickle` lifts that, and is for files whose maker you trust.

    Raises:
        ValueError: naming the file and what it is instead of a checkpoint.
    """
    import torch

    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(path)
        except SafetensorError as error:
            raise ValueError(f"reward {reward!r}: {path} is no safetensors file: {error}") from error
    try:
        # Mapped into memory, a file of gigabytes is read once; only torch's zip format can be. Older ones ask for a str.
        found = torch.load(str(path), map_location="cpu", weights_only=not allow_pickle, mmap=zipfile.is_zipfile(path))
    except UnpicklingError as error:
        with path.open("rb") as file:
            if file.read(23) == b"version https://git-lfs":
                raise ValueError(
                    f"{path} is a git-lfs pointer, not the checkpoint: fetch it with `hf download`"
                ) from None
        reason = str(error).partition("WeightsUnpickler error:")[2].strip().split("\n")[0] or str(error).split("\n")[0]
        raise ValueError(
            f"reward {reward!r}: {path} was refused: it is a pickle of more than tensors, and loading it could run any "
            f"code ({reason}). If you trust where it comes from, pass `allow_pickle: true` in the reward's args."
        ) from error
    except (RuntimeError, EOFError, OSError) as error:  # a download cut short is any of these
        raise ValueError(f"reward {reward!r}: {path} is no checkpoint that torch can read: {error}") from error
    if isinstance(found, Mapping) and isinstance(found.get("state_dict"), Mapping):
        found = found["state_dict"]
    if not isinstance(found, Mapping) or not found or not all(torch.is_tensor(value) for value in found.values()):
        raise ValueError(f"reward {reward!r}: {path} holds {_describe(found)}, not tensors by name")
    return dict(found)


def _describe(found: Any) -> str:
    if isinstance(found, Mapping):
        return f"a dictionary of {', '.join(map(str, list(found)[:5])) or 'nothing'}"
    return f"a {type(found).__name__}"


def load_weights(module: nn.Module, state: Mapping[str, Tensor], *, reward: str, source: Path) -> None:
    """Load a state dict to the last key.

    Raises:
        ValueError: naming the first keys that are missing, unexpected or of another shape.
    """
    wanted = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    check_keys(
        reward=reward,
        source=source,
        missing=[name for name in wanted if name not in shapes],
        unexpected=[name for name in shapes if name not in wanted],
        reshaped=[f"{n} {shapes[n]} for {s}" for n, s in wanted.items() if n in shapes and shapes[n] != s],
    )
    module.load_state_dict(state)


def load_model(kind: Any, folder: Path, *, reward: str, dtype: Any) -> Any:
    """A model of one of transformers' classes, whole: a weight that is missing, or of another shape, is a ValueError."""
    model, info = kind.from_pretrained(
        folder,
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # they are refused below, by name
        dtype=dtype,
    )
    check_keys(
        reward=reward,
        source=folder,
        missing=info["missing_keys"],
        unexpected=[key for key in info["unexpected_keys"] if not key.endswith("position_ids")],  # a buffer, once saved
        reshaped=[f"{key} {tuple(found)} for {tuple(wanted)}" for key, found, wanted in info["mismatched_keys"]],
    )
    return model


def check_keys(
    *, reward: str, source: Path, missing: Iterable[str], unexpected: Iterable[str], reshaped: Iterable[str] = ()
) -> None:
    """Raise ValueError when any weight did not find its place."""
    found = []
    for what, names in (("missing", missing), ("unexpected", unexpected), ("of another shape", reshaped)):
        names = sorted(names)
        if names:
            rest = f" and {len(names) - 3} more" if len(names) > 3 else ""
            found.append(f"{what}: {', '.join(names[:3])}{rest}")
    if found:
        raise ValueError(f"{source} is no checkpoint of the reward {reward!r}; {'; '.join(found)}")


def need(state: Mapping[str, Tensor], key: str, *, reward: str, source: Path) -> tuple[int, ...]:
    """The shape of a tensor by whose sizes a model is built; a state dict without it belongs to another model."""
    if key not in state:
        check_keys(reward=reward, source=source, missing=[key], unexpected=list(state)[:3])
    return tuple(state[key].shape)


def count_layers(state: Iterable[str], prefix: str) -> int:
    """How many numbers follow a prefix among the keys."""
    return len({key[len(prefix) :].split(".")[0] for key in state if key.startswith(prefix)})


def square_side(patches: int, *, reward: str, source: Path) -> int:
    """Patches along the side of a square image of so many.

    Raises:
        ValueError: when it is none.
    """
    side = math.isqrt(max(patches, 0))
    if side < 1 or side**2 != patches:
        raise ValueError(f"{source} is no checkpoint of the reward {reward!r}: {patches} patches make no square")
    return side
