"""From a name in a config to a callable: lazily, and with an error that says what would have worked."""

import contextlib
import hashlib
import importlib
import importlib.util
import inspect
import math
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

#: Built-in rewards. Nothing is imported before a run asks for it.
BUILTINS = {
    "shapes_following": "rewards.shapes:shapes_following",
    "shapes_exact": "rewards.shapes:shapes_exact",
    "shapes_word": "rewards.shapes:shapes_word",
    "shapes_preference": "rewards.shapes:preference",
    "grounded": "rewards.shapes:grounded",
    "warm_background": "rewards.shapes:warm_background",
}
#: Built-ins that are factories, and so need ``args``.
FACTORIES = frozenset({"shapes_preference"})
_KEYS = ("use", "weight", "args", "name")
_GIVEN = ("images", "prompts")
#: The weighted sum of all rewards is logged under this name.
TOTAL = "reward"


@dataclass(frozen=True)
class Reward:
    """A reward ready to be called.

    name: under which it is logged. function: the callable. weight: its share in the sum; with 0 it is only measured.
    columns: data columns it takes by name; ``None`` when it takes every column (``**columns``).
    required: those of them without a default.
    """

    name: str
    function: Callable[..., Any]
    weight: float
    columns: tuple[str, ...] | None
    required: tuple[str, ...]

    def check_columns(self, available: Iterable[str]) -> None:
        """Raise ValueError when the data lacks a column that this reward needs."""
        available = [column for column in available if column != "prompt"]  # those come as `prompts`
        taken = [name for name in _GIVEN if name in available]
        if self.columns is None and taken:
            raise ValueError(
                f"reward {self.name!r} takes every data column, and {taken[0]!r} is an argument of its own: "
                "rename the column"
            )
        for column in self.required:
            if column not in available:
                raise ValueError(
                    f"reward {self.name!r} needs the data column {column!r}, which the data lacks."
                    + _nearest(column, available)
                )


def _nearest(word: str, choices: Iterable[str]) -> str:
    close = get_close_matches(word, list(choices), n=1, cutoff=0.5)
    return f" Did you mean {close[0]!r}?" if close else f" There are: {', '.join(sorted(choices)) or 'none'}."


Spec = str | Mapping[str, Any] | Callable[..., Any] | Reward


def load_rewards(specs: Spec | Iterable[Spec]) -> list[Reward]:
    """Load every reward of a config.

    Args:
        specs: each a name, a mapping ``{use, weight, args, name}``, a callable, or a Reward; one of them may stand
            without a list. ``use`` is a built-in name, ``module:attr`` or ``file.py:attr``; with ``args`` the attr is a
            factory called with them.

    Raises:
        ValueError, FileNotFoundError, ImportError: naming the entry, what was found and what would do.
    """
    if isinstance(specs, (str, Mapping, Reward)) or callable(specs):
        specs = [specs]
    rewards = [_load(spec) for spec in specs or ()]
    if not rewards:
        raise ValueError("no reward was given: pass --rewards NAME, or `rewards:` in the config")
    names = [reward.name for reward in rewards]
    for name in names:
        if name == TOTAL:
            raise ValueError(f"no reward may be called {TOTAL!r}, which is their weighted sum: give it another `name`")
        if names.count(name) > 1:
            raise ValueError(f"two rewards are both called {name!r}: give one of them another `name`")
    return rewards


def _load(spec: Spec) -> Reward:
    if isinstance(spec, Reward):
        return spec
    if isinstance(spec, str):
        spec = {"use": spec}
    elif callable(spec):
        name = getattr(spec, "__name__", type(spec).__name__)
        return _reward({TOTAL: f"custom_{TOTAL}", "<lambda>": f"custom_{TOTAL}"}.get(name, name), spec, 1.0)
    if not isinstance(spec, Mapping):
        raise ValueError(f"reward entry {spec!r} is {type(spec).__name__}: give a name, or a mapping with `use`")
    unknown = [key for key in spec if key not in _KEYS]
    if unknown:
        found = f"reward entry {dict(spec)} has an unknown key {unknown[0]!r}."
        raise ValueError(found + _nearest(str(unknown[0]), _KEYS))
    if not isinstance(spec.get("use"), str):
        raise ValueError(f"reward entry {dict(spec)} needs `use`: a built-in name, module:attr or file.py:attr")
    use, args, weight = spec["use"], spec.get("args"), spec.get("weight", 1.0)
    if isinstance(weight, str):  # YAML reads 1e-1 as text
        with contextlib.suppress(ValueError):
            weight = float(weight)
    if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not math.isfinite(weight):
        raise ValueError(f"the weight of reward {use!r} must be a finite number, found {weight!r}")
    function = _resolve(use)
    if use in FACTORIES and args is None:
        raise ValueError(f"reward {use!r} is a factory: give it `args`, {_parameters(function)}")
    if args is not None:
        try:
            inspect.signature(function).bind(**args)
        except TypeError as error:
            found = f"args {args!r} of reward {use!r} do not fit: {error}."
            raise ValueError(f"{found} It takes {_parameters(function)}") from None
        function = function(**args)
    module, _, name = use.rpartition(":")
    if name == TOTAL:
        name = f"{Path(module).stem.rpartition('.')[2]}_{TOTAL}"
    return _reward(spec.get("name") or name, function, float(weight))


def _parameters(function: Callable[..., Any]) -> str:
    return str(inspect.signature(function))


def _reward(name: str, function: Callable[..., Any], weight: float) -> Reward:
    if not callable(function):
        raise ValueError(
            f"reward {name!r} is {type(function).__name__}, not callable: with `args`, the factory must return a function"
        )
    try:
        parameters = inspect.signature(function).parameters
    except ValueError:  # written in C
        raise ValueError(f"reward {name!r} must take (images, prompts, ...), and does not say what it takes") from None
    takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    named = [p for p in parameters.values() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    if tuple(p.name for p in named[:2]) != _GIVEN:
        raise ValueError(f"reward {name!r} must take (images, prompts, ...), found {inspect.signature(function)}")
    extra = named[2:]
    return Reward(
        name=name,
        function=function,
        weight=weight,
        columns=None if takes_all else tuple(p.name for p in extra),
        required=tuple(p.name for p in extra if p.default is p.empty),
    )


def _resolve(use: str) -> Callable[..., Any]:
    target = BUILTINS.get(use, use)
    module_name, separator, attribute = target.rpartition(":")
    if not separator or not module_name or not attribute:
        raise ValueError(
            f"unknown reward {use!r}." + _nearest(use, BUILTINS) + " Your own: module:attr or file.py:attr."
        )
    module = _import_file(module_name) if module_name.endswith(".py") else _import_module(module_name)
    if not hasattr(module, attribute):
        public = [name for name, value in vars(module).items() if callable(value) and not name.startswith("_")]
        raise ValueError(f"{module_name} has no {attribute!r}." + _nearest(attribute, public))
    found = getattr(module, attribute)
    if not callable(found):
        raise ValueError(f"reward {use!r} is {type(found).__name__}, not callable")
    return found


def _import_file(name: str) -> Any:
    path = Path(name).expanduser().resolve()
    if not path.is_file():
        beside = [p.name for p in path.parent.glob("*.py")] if path.parent.is_dir() else []
        raise FileNotFoundError(f"reward file {name} does not exist (looked for {path})." + _nearest(path.name, beside))
    alias = f"reward_file_{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
    if alias in sys.modules:  # two rewards of one file share what it loads
        return sys.modules[alias]
    spec = importlib.util.spec_from_file_location(alias, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses and pickling look a class's module up here
    sys.path.insert(0, str(path.parent))  # so that the file can import its neighbours
    try:
        spec.loader.exec_module(module)
    except BaseException as error:
        del sys.modules[alias]
        if not isinstance(error, ImportError):
            raise
        raise ImportError(f"reward file {name} could not be imported: {error}") from error
    finally:
        sys.path.remove(str(path.parent))
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))  # neighbours imported only when it is called; last, so that they hide nothing
    return module


def _import_module(name: str) -> Any:
    if name.startswith(".") or "/" in name:
        raise ImportError(f"{name!r} is no module name: a reward in a file is {name}.py:attr")
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(
            0, str(Path.cwd())
        )  # `accelerate launch align/grpo.py` puts align/ there, not the user's folder
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not (name == error.name or name.startswith(error.name + ".")):
            raise ImportError(f"reward module {name!r} could not be imported: {error}") from error
        raise ImportError(f"reward module {name!r} was not found on the Python path or in {Path.cwd()}") from None
    except ImportError as error:
        raise ImportError(f"reward module {name!r} could not be imported: {error}") from error
