"""The configs that are shipped: in the wheel beside this package, in a checkout in its folder ``configs``."""

import itertools
import sys
from pathlib import Path

import align
from align.models.loading import nearest

_PACKAGE = Path(align.__file__).parent
#: The folder of the shipped configs.
CONFIGS = next(
    (folder for folder in (_PACKAGE / "configs", _PACKAGE.parent / "configs") if folder.is_dir()), _PACKAGE / "configs"
)


def shipped() -> dict[str, Path]:
    """Return the shipped configs by name: ``tiny/grpo`` is configs/tiny/grpo.yaml."""
    files = sorted(CONFIGS.glob("*/*.yaml"))
    return {f"{file.parent.name}/{file.stem}": file for file in files}


def find_config(name: str) -> Path:
    """Return the file that ``--config`` names: a path, or the name of a shipped config.

    Raises FileNotFoundError with the nearest file or name.
    """
    path, known = Path(name), shipped()
    if path.is_file():
        return path
    if name.removesuffix(".yaml") in known:
        return known[name.removesuffix(".yaml")]
    beside = [str(p) for p in path.parent.glob("*.y*ml")] if path.parent.is_dir() else []
    raise FileNotFoundError(f"config file {name} does not exist." + nearest(name, [*beside, *known]))


def first_sentence(config: Path) -> str:
    """Return the first sentence of a config's header comment."""
    lines = itertools.takewhile(lambda line: line.startswith("#"), config.read_text(encoding="utf-8").splitlines())
    return " ".join(line.strip("# ") for line in lines).split(". ")[0].rstrip(".") + "."


def main(argv: list[str]) -> int:
    """List the shipped configs, or print the path of the one that is named."""
    if argv[:1] in (["-h"], ["--help"]) or len(argv) > 1:
        print(
            "usage: flow-align configs         list the shipped configs\n       flow-align configs NAME    print its path"
        )
        return 0 if len(argv) == 1 else 2
    try:
        if argv:
            print(find_config(argv[0]))
            return 0
    except FileNotFoundError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    names = shipped()
    width = max(map(len, names))
    for name, file in names.items():
        print(f"{name:<{width}}  {first_sentence(file)}")
    return 0
