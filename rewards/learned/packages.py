"""The original PyPI packages of two rewards, whose pins clash with ours: run in an environment of their own."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

REQUIREMENTS = Path(__file__).parents[1] / "requirements"
#: By the built-in's name, the factory that runs in that environment, and the args it takes.
FACTORIES = {
    "hpsv2": ("rewards.learned.package_hpsv2:hpsv2", ("version", "checkpoint", "device", "allow_pickle")),
    "imagereward": (
        "rewards.learned.package_imagereward:imagereward",
        ("checkpoint", "med_config", "tokenizer", "device", "allow_pickle"),
    ),
}


def package_spec(name: str, args: Mapping[str, Any]) -> dict[str, Any]:
    """The config entry that runs a reward by its package: ``{use, args, environment}``.

    args: those of the config's entry, with or without ``backend``.

    Raises:
        ValueError: for a reward that has no package, or an arg that its package does not take.
    """
    if name not in FACTORIES:
        raise ValueError(f"reward {name!r} has no backend 'package'. Those that have: {', '.join(FACTORIES)}.")
    use, taken = FACTORIES[name]
    given = {key: value for key, value in args.items() if key != "backend"}
    for key in given:
        if key not in taken:
            raise ValueError(f"the backend 'package' of {name} takes no arg {key!r}. It takes: {', '.join(taken)}.")
    return {"use": use, "args": given, "environment": {"requirements": str(REQUIREMENTS / f"{name}.txt")}}


def check_native(name: str, backend: str) -> None:
    """Raise ValueError unless `backend` is the one that runs in this process."""
    if backend == "package":
        raise ValueError(
            f"the backend 'package' of {name} runs in an environment of its own, by the config entry that "
            f"rewards.learned.packages.package_spec({name!r}, args) gives"
        )
    if backend != "native":
        raise ValueError(f"unknown backend {backend!r} of {name}. There are: native, package.")
