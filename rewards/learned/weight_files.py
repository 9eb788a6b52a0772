"""Finding the weights of a reward (a local path, the local cache of the hub, or the hub) and loading them safely.

The isolated environments use this module too, with other versions of torch and of the hub's client.
"""

from __future__ import annotations

import logging
import math
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from pickle import UnpicklingError  # only to name the refusal; torch.load does the reading
from typing import TYPE_CHECKING, Any

from rewards.redaction import foreign

if TYPE_CHECKING:
    from torch import Tensor, nn

logger = logging.getLogger(__name__)

#: Files that a folder must contain, by purpose; one match for each tuple of globs is enough.
MODEL_FILES = {"config": ("config.json",), "weights": ("model*.safetensors", "pytorch_model*.bin")}
TOKENIZER_FILES = {"tokenizer": ("tokenizer.json", "vocab.json", "vocab.txt")}
IMAGE_PROCESSOR_FILES = {"image processor": ("preprocessor_config.json", "processor_config.json")}
_SMALL_FILES = ["*.json", "merges.txt", "vocab.txt"]


def find_file(name: str | Path, *, reward: str, arg: str, file: str = "") -> Path:
    """Return the local path of a file.

    Args:
        name: a file, a folder that contains `file`, or ``owner/name:file`` on the hub, whose local cache is searched
            first.
        reward, arg: the reward and its arg that names the file, for errors.

    Raises:
        FileNotFoundError: saying which file to get, how, and where to put it.
    """
    path, (repository, _, remote) = Path(name).expanduser(), str(name).partition(":")
    if path.is_file():
        return path
    if path.is_dir() and (path / file).is_file():
        return path / file
    if path.is_dir() or not remote or repository.count("/") != 1 or path.is_absolute() or repository[0] in ".~":
        problem = f"is a folder without {file}" if path.is_dir() else "is not a file"
        folder = path if path.is_dir() else path.parent
        raise FileNotFoundError(
            f"reward {reward!r}: {arg} {str(name)!r} {problem}; {_list_files(folder)}. "
            "Give a file, or owner/name:file on the hub."
        )
    from huggingface_hub import hf_hub_download

    try:
        return Path(_cached_first(hf_hub_download, repository, remote))
    except Exception as error:  # when the hub cannot be reached, several libraries raise many unrelated types
        local = f"{Path(repository).name}/{remote}"
        raise FileNotFoundError(
            f"reward {reward!r} needs the file {remote} from {repository}, which is not in the local hub cache, and could "
            f"not be downloaded ({type(error).__name__}). On a machine with a network run `hf download {repository} "
            f"{remote} --local-dir {Path(repository).name}`, copy {local} here, and pass its path: "
            f"`args: {{{arg}: {local}}}`."
        ) from error


def find_folder(name: str | Path, needs: Mapping[str, tuple[str, ...]], *, reward: str, arg: str) -> Path:
    """Return the local folder of a model, tokenizer or image processor: a path, or ``owner/name`` on the hub.

    Args:
        needs: files it must contain: :data:`MODEL_FILES`, :data:`TOKENIZER_FILES`, :data:`IMAGE_PROCESSOR_FILES` or a
            union of them. Only such files are downloaded, weights as safetensors if the hub has them.
        reward, arg: the reward and its arg that names the folder, for errors.

    Raises:
        FileNotFoundError: naming what is missing, or which files to get, how, and where to put them.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        _check_complete(path, str(path), needs, reward, arg)
        return path
    if str(name).count("/") != 1 or path.is_absolute() or str(name)[0] in ".~":
        raise FileNotFoundError(
            f"reward {reward!r}: {arg} {str(name)!r} is not a folder. Give a folder, or owner/name on the hub."
        )
    patterns = [*_SMALL_FILES, *(["model*.safetensors"] if "weights" in needs else [])]
    try:
        folder = _download(str(name), needs, patterns)
    except Exception as error:  # as in find_file
        raise FileNotFoundError(_how_to_get(str(name), patterns, reward, arg, type(error).__name__)) from error
    _check_complete(folder, str(name), needs, reward, arg)
    return folder


def has_files(name: str | Path, needs: Mapping[str, tuple[str, ...]]) -> bool:
    """Whether a local folder, or the local cache of a hub name, contains all files that are needed."""
    path = Path(name).expanduser()
    if not path.is_dir():
        from huggingface_hub import snapshot_download

        try:
            path = Path(snapshot_download(str(name), local_files_only=True))
        except (FileNotFoundError, ValueError):  # not in the cache, or not a valid hub name
            return False
    return _first_missing(path, needs) is None


def _download(name: str, needs: Mapping[str, tuple[str, ...]], patterns: list[str]) -> Path:
    """Return a snapshot of a repository, from the local cache if it has all files, else from the hub."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils import LocalEntryNotFoundError

    try:
        folder = Path(snapshot_download(name, local_files_only=True))
        if _first_missing(folder, needs) is None:
            return folder
    except LocalEntryNotFoundError:
        logger.debug("%s is not in the local hub cache", name)
    folder = Path(snapshot_download(name, allow_patterns=patterns))
    if _first_missing(folder, needs) == "weights":
        folder = Path(snapshot_download(name, allow_patterns=[*_SMALL_FILES, "pytorch_model*.bin"]))
    return folder


def _cached_first(download: Any, repository: str, file: str) -> str:
    from huggingface_hub.utils import LocalEntryNotFoundError

    try:
        return download(repository, file, local_files_only=True)
    except LocalEntryNotFoundError:
        return download(repository, file)


def _first_missing(folder: Path, needs: Mapping[str, tuple[str, ...]]) -> str | None:
    """Return the first purpose for which a folder has no file, or None."""
    for purpose, globs in needs.items():
        if not any(any(folder.glob(glob)) for glob in globs):
            return purpose
    return None


def _check_complete(folder: Path, name: str, needs: Mapping[str, tuple[str, ...]], reward: str, arg: str) -> None:
    missing = _first_missing(folder, needs)
    if missing:
        raise FileNotFoundError(f"reward {reward!r}: {arg} {name} has no {missing} ({' or '.join(needs[missing])})")


def _list_files(folder: Path) -> str:
    if not folder.is_dir():
        return f"{folder} does not exist"
    names = sorted(path.name for path in folder.iterdir() if path.is_file())[:8]
    return f"{folder} contains {', '.join(names) or 'no files'}"


def _how_to_get(name: str, patterns: Sequence[str], reward: str, arg: str, failure: str) -> str:
    folder = Path(name).name
    included = " ".join(f"--include '{pattern}'" for pattern in patterns)
    return (
        f"reward {reward!r} needs {name}, which is not in the local hub cache, and could not be downloaded ({failure}). "
        f"On a machine with a network run `hf download {name} {included} --local-dir {folder}`, copy that folder here, "
        f"and pass its path: `args: {{{arg}: {folder}}}`."
    )


def read_state_dict(path: Path, *, reward: str, allow_pickle: bool = False) -> dict[str, Tensor]:
    """Read a checkpoint's tensors by name, on the CPU; of ``{"state_dict": ..., ...}`` the inner dictionary.

    A ``.safetensors`` file can contain only tensors. Any other file is read by ``torch.load(weights_only=True)``, which
    refuses every pickle that would run code. `allow_pickle` allows such pickles, for files whose author you trust.

    Raises:
        ValueError: naming the file and what it contains instead.
    """
    import torch

    if path.suffix == ".safetensors":
        return read_safetensors(path, reward=reward)
    try:
        # With mmap a file of gigabytes is read once; only torch's zip format allows it. Older versions need a str.
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
            f"code ({foreign(reason)}). If you trust its author, pass `allow_pickle: true` in the reward's args."
        ) from error
    except (RuntimeError, EOFError, OSError) as error:  # an incomplete download raises any of these
        raise ValueError(f"reward {reward!r}: {path} is not a checkpoint that torch can read: {error}") from error
    if isinstance(found, Mapping) and isinstance(found.get("state_dict"), Mapping):
        found = found["state_dict"]
    if not isinstance(found, Mapping) or not found or not all(torch.is_tensor(value) for value in found.values()):
        raise ValueError(f"reward {reward!r}: {path} contains {_describe_content(found)}, not tensors by name")
    return dict(found)


def read_safetensors(path: Path, *, reward: str) -> dict[str, Tensor]:
    """Read a safetensors file; raise ValueError for any other."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"reward {reward!r}: {path} is not a safetensors file: {foreign(str(error))}") from error


def write_safetensors(state: Mapping[str, Tensor], target: Path) -> None:
    """Write tensors as safetensors, the whole file or none."""
    import torch
    from safetensors.torch import save_file

    unfinished = target.with_suffix(".unfinished")
    # Copies: safetensors refuses tensors that share memory.
    copies = {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in state.items()}
    save_file(copies, unfinished)
    unfinished.replace(target)


def _describe_content(found: Any) -> str:
    if isinstance(found, Mapping):
        return f"a dictionary of {foreign(', '.join(map(str, list(found)[:5]))) or 'nothing'}"
    return f"a {type(found).__name__}"


def load_weights(module: nn.Module, state: Mapping[str, Tensor], *, reward: str, source: Path) -> None:
    """Load a state dict, whose keys must be exactly those of the module.

    Raises:
        ValueError: naming the first keys that are missing, unexpected or of another shape.
    """
    expected = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    check_keys(
        reward=reward,
        source=source,
        missing=[name for name in expected if name not in shapes],
        unexpected=[name for name in shapes if name not in expected],
        reshaped=[f"{n} {shapes[n]} for {s}" for n, s in expected.items() if n in shapes and shapes[n] != s],
    )
    module.load_state_dict(state)


def load_model(kind: Any, folder: Path, *, reward: str, dtype: Any) -> Any:
    """Load a model of a class of transformers; raise ValueError for a weight that is missing or has another shape."""
    model, info = kind.from_pretrained(
        folder,
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # they are refused below, with their names
        dtype=dtype,
    )
    check_keys(
        reward=reward,
        source=folder,
        missing=info["missing_keys"],
        unexpected=[
            key for key in info["unexpected_keys"] if not key.endswith("position_ids")
        ],  # a buffer that was once saved
        reshaped=[f"{key} {tuple(found)} for {tuple(expected)}" for key, found, expected in info["mismatched_keys"]],
    )
    return model


def check_keys(
    *, reward: str, source: Path, missing: Iterable[str], unexpected: Iterable[str], reshaped: Iterable[str] = ()
) -> None:
    """Raise ValueError if there is any missing, unexpected or reshaped weight."""
    problems = []
    for what, names in (("missing", missing), ("unexpected", unexpected), ("of another shape", reshaped)):
        names = sorted(names)
        if names:
            rest = f" and {len(names) - 3} more" if len(names) > 3 else ""
            problems.append(f"{what}: {', '.join(names[:3])}{rest}")
    if problems:
        raise ValueError(f"{source} is not a checkpoint of the reward {reward!r}; {foreign('; '.join(problems))}")


def shape_of(state: Mapping[str, Tensor], key: str, *, reward: str, source: Path) -> tuple[int, ...]:
    """Return the shape of a tensor; raise ValueError if the state dict, being that of another model, lacks it."""
    if key not in state:
        check_keys(reward=reward, source=source, missing=[key], unexpected=list(state)[:3])
    return tuple(state[key].shape)


def count_layers(state: Iterable[str], prefix: str) -> int:
    """Count the different numbers that follow a prefix in the keys."""
    return len({key[len(prefix) :].split(".")[0] for key in state if key.startswith(prefix)})


def square_side(patches: int, *, reward: str, source: Path) -> int:
    """Return the number of patches along the side of a square image.

    Raises:
        ValueError: the number of patches is not a square.
    """
    side = math.isqrt(max(patches, 0))
    if side < 1 or side**2 != patches:
        raise ValueError(
            f"{source} is not a checkpoint of the reward {reward!r}: {patches} patches do not form a square"
        )
    return side
