"""The original PyPI packages of two rewards, which run in their own environments because their pins clash with ours."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rewards.hints import nearest
from rewards.remote.environments import locked, private_cache_folder

REQUIREMENTS = Path(__file__).parents[1] / "requirements"
#: For each built-in, the factory that runs in that environment and the args that it takes.
FACTORIES = {
    "hpsv2": ("rewards.learned.package_hpsv2:hpsv2", ("version", "checkpoint", "device")),
    "imagereward": (
        "rewards.learned.package_imagereward:imagereward",
        ("checkpoint", "med_config", "tokenizer", "device"),
    ),
}


def package_spec(name: str, args: Mapping[str, Any]) -> dict[str, Any]:
    """Return the config entry that runs a reward by its package: ``{use, args, environment}``.

    Its checkpoint must be safetensors: see :func:`package_checkpoint`.

    Args:
        args: those of the config's entry, with or without ``backend`` and ``allow_pickle``.

    Raises:
        ValueError: the reward has no package, or the package does not take an arg.
    """
    if name not in FACTORIES:
        raise ValueError(f"reward {name!r} has no backend 'package'. Rewards with one: {', '.join(FACTORIES)}.")
    use, known = FACTORIES[name]
    package_args = {key: value for key, value in args.items() if key not in ("backend", "allow_pickle")}
    for key in package_args:
        if key not in known:
            raise ValueError(f"the backend 'package' of {name} takes no arg {key!r}. It takes: {', '.join(known)}.")
    return {"use": use, "args": package_args, "environment": {"requirements": str(REQUIREMENTS / f"{name}.txt")}}


def package_checkpoint(name: str, args: Mapping[str, Any]) -> Path:
    """Return a package's checkpoint as safetensors; any other file is read here and written so, once.

    The packages need torch 2.2.2, in which a pickle can run code although ``weights_only`` forbids it (CVE-2025-32434).

    Args:
        args: as for :func:`package_spec`; of them ``checkpoint``, ``version`` and ``allow_pickle`` are read.

    Raises:
        FileNotFoundError, ValueError: as for :func:`rewards.learned.weight_files.read_state_dict`.
    """
    from rewards.learned.weight_files import find_file, read_state_dict, write_safetensors

    repository, file = _default_checkpoint(name, args)
    path = find_file(args.get("checkpoint") or f"{repository}:{file}", reward=name, arg="checkpoint", file=file)
    if path.suffix == ".safetensors":
        return path.absolute()
    of_file = path.stat()
    content = f"{path.resolve()}\0{of_file.st_size}\0{of_file.st_mtime_ns}"
    target = private_cache_folder() / f"{hashlib.sha256(content.encode()).hexdigest()[:16]}.safetensors"
    with locked(target.with_suffix(".lock")):  # of several processes only one writes it
        if not target.exists():
            state = read_state_dict(path, reward=name, allow_pickle=bool(args.get("allow_pickle")))
            write_safetensors(state, target)
    return target


def _default_checkpoint(name: str, args: Mapping[str, Any]) -> tuple[str, str]:
    """Return the repository and the file of a reward's checkpoint."""
    if name == "imagereward":
        return "THUDM/ImageReward", "ImageReward.pt"
    from rewards.learned.package_hpsv2 import FILES

    version = args.get("version", "v2.1")
    if version not in FILES:
        raise ValueError(f"unknown version {version!r} of hpsv2.{nearest(str(version), FILES)}")
    return "xswu/HPSv2", FILES[version]


def check_native(name: str, backend: str) -> None:
    """Raise ValueError unless `backend` is "native", the one that runs in this process."""
    if backend == "package":
        raise ValueError(
            f"the backend 'package' of {name} runs in its own environment: load it with "
            f"rewards.load_rewards({{'use': {name!r}, 'args': {{'backend': 'package'}}}})"
        )
    if backend != "native":
        raise ValueError(f"unknown backend {backend!r} of {name}.{nearest(str(backend), ('native', 'package'))}")
