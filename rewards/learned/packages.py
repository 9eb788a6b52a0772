"""The original PyPI packages of two rewards, which run in their own environments because their pins clash with ours."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rewards.hints import nearest

REQUIREMENTS = Path(__file__).parents[1] / "requirements"
#: For each built-in, the factory that runs in that environment and the args that it takes.
FACTORIES = {
    "hpsv2": ("rewards.learned.package_hpsv2:hpsv2", ("version", "checkpoint", "device", "allow_pickle")),
    "imagereward": (
        "rewards.learned.package_imagereward:imagereward",
        ("checkpoint", "med_config", "tokenizer", "device", "allow_pickle"),
    ),
}


def package_spec(name: str, args: Mapping[str, Any]) -> dict[str, Any]:
    """Return the config entry that runs a reward by its package: ``{use, args, environment}``.

    Args:
        args: those of the config's entry, with or without ``backend``.

    Raises:
        ValueError: the reward has no package, or the package does not take an arg.
    """
    if name not in FACTORIES:
        raise ValueError(f"reward {name!r} has no backend 'package'. Rewards with one: {', '.join(FACTORIES)}.")
    use, known = FACTORIES[name]
    package_args = {key: value for key, value in args.items() if key != "backend"}
    for key in package_args:
        if key not in known:
            raise ValueError(f"the backend 'package' of {name} takes no arg {key!r}. It takes: {', '.join(known)}.")
    return {"use": use, "args": package_args, "environment": {"requirements": str(REQUIREMENTS / f"{name}.txt")}}


def check_native(name: str, backend: str) -> None:
    """Raise ValueError unless `backend` is "native", the one that runs in this process."""
    if backend == "package":
        raise ValueError(
            f"the backend 'package' of {name} runs in its own environment: use the config entry that "
            f"rewards.learned.packages.package_spec({name!r}, args) returns"
        )
    if backend != "native":
        raise ValueError(f"unknown backend {backend!r} of {name}.{nearest(str(backend), ('native', 'package'))}")
