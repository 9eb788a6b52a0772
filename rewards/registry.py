"""From a name in a config to a callable: lazily, and with an error that says what would have worked."""

import hashlib
import importlib
import importlib.util
import inspect
import math
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from rewards.contract import GIVEN, Reward
from rewards.hints import nearest
from rewards.table import BUILTINS
from rewards.weights import Weight, parse_weight

_KEYS = ("use", "weight", "args", "name", "environment", "endpoints", "timeout", "retries", "images_per_request")
#: Seconds that a call may take, and how often it is tried again, where a reward runs elsewhere and nothing is said.
#: With the client's pauses 8 tries take a minute and a half: a service that is restarted loads its models again.
TIMEOUT, ENVIRONMENT_RETRIES, ENDPOINT_RETRIES = 300.0, 2, 8
#: The weighted sum of all rewards is logged under this name.
TOTAL = "reward"


Spec = str | Mapping[str, Any] | Callable[..., Any] | Reward


def load_rewards(specs: Spec | Iterable[Spec]) -> list[Reward]:
    """Load every reward of a config.

    Args:
        specs: each a name, a mapping ``{use, weight, args, name}``, a callable, or a Reward; one of them may stand
            without a list. ``use`` is a built-in name, ``module:attr`` or ``file.py:attr``; with ``args`` the attr is a
            factory called with them. Further keys say where it runs: ``environment`` (a process with packages of its own,
            `rewards.remote.isolated`) or ``endpoints`` (a service, `rewards.remote.client`; ``images_per_request``), ``timeout``
            (seconds a call may take, in this process too) and ``retries`` of a call that was lost.

    Raises:
        ValueError, FileNotFoundError, ImportError: naming the entry, what was found and what would do.
    """
    if isinstance(specs, (str, Mapping, Reward)) or callable(specs):
        specs = [specs]
    rewards = []
    for spec in specs or ():
        try:
            rewards.append(_load(spec))
        except SystemExit as error:  # of a module or a factory, and not the end of the run
            raise ImportError(f"reward entry {spec!r} ended the program (SystemExit: {error}) when loaded") from error
    if not rewards:
        raise ValueError("no reward was given: pass --rewards NAME, or `rewards:` in the config")
    names = [reward.name for reward in rewards]
    for name in names:
        if name == TOTAL:
            raise ValueError(f"no reward may be called {TOTAL!r}, which is their weighted sum: give it another `name`")
        if names.count(name) > 1:
            raise ValueError(f"two rewards are both called {name!r}: give one of them another `name`")
    return rewards


def read_rewards(file: Path) -> list[Any]:
    """The entries of a YAML config's list ``rewards``; raises ValueError when there is none."""
    import yaml

    try:
        content = yaml.safe_load(file.read_text())
    except yaml.YAMLError as error:
        raise ValueError(f"{file} is no YAML: {error}") from None
    listed = content.get("rewards") if isinstance(content, Mapping) else None
    if not isinstance(listed, list):
        raise ValueError(f"{file} has no list `rewards:`")
    return listed


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
        raise ValueError(found + nearest(str(unknown[0]), _KEYS))
    if not isinstance(spec.get("use"), str):
        raise ValueError(f"reward entry {dict(spec)} needs `use`: a built-in name, module:attr or file.py:attr")
    use = spec["use"]
    for key, kind, what in (("args", Mapping, "a mapping"), ("name", str, "text")):
        if spec.get(key) is not None and not isinstance(spec[key], kind):
            raise ValueError(f"`{key}` of reward {use!r} must be {what}, found {spec[key]!r}")
    share = parse_weight(use, spec.get("weight", 1.0))
    _check_running(spec)
    module, _, name = use.rpartition(":")  # of a built-in, its name
    if name == TOTAL:
        name = f"{Path(module).stem.rpartition('.')[2]}_{TOTAL}"
    name = spec.get("name") or name
    if use in BUILTINS and (spec.get("args") or {}).get("backend") == "package":
        from rewards.learned.packages import package_spec

        made, own = package_spec(use, spec["args"]), spec.get("environment") or {}
        if not isinstance(own, Mapping):
            raise ValueError(f"the environment of reward {use!r} must be a mapping, found {own!r}")
        spec = {**spec, **made, "environment": made["environment"] | dict(own)}
    if "endpoints" in spec or "environment" in spec:
        return _elsewhere(name, spec, share)
    reward = _reward(name, _make(use, spec.get("args")), share)
    if "timeout" not in spec:
        return reward
    from rewards.remote.timed import Timed

    return replace(reward, function=Timed(name, reward.function, float(spec["timeout"])))


def _make(use: str, args: Mapping[str, Any] | None) -> Any:
    """The callable that an entry names, made by its factory if it is one."""
    function = resolve(use)
    if use in BUILTINS and BUILTINS[use].factory:
        args = args or {}
    if args is None:
        return function
    try:
        inspect.signature(function).bind(**args)
    except TypeError as error:
        found = f"args {args!r} of reward {use!r} do not fit: {error}."
        raise ValueError(f"{found} It takes {_parameters(function)}") from None
    try:
        return function(**args)
    except (TypeError, AttributeError, re.error) as error:
        if use not in BUILTINS:
            raise  # a user's own code: with its traceback
        raise ValueError(
            f"args {dict(args)!r} of reward {use!r} do not fit: {type(error).__name__}: {error}"
        ) from error


def _check_running(spec: Mapping[str, Any]) -> None:
    """Raise ValueError for keys about where and how a reward runs that make no sense, alone or together."""
    use = spec["use"]
    if "endpoints" in spec:
        for key in ("environment", "args"):
            if spec.get(key) is not None:
                raise ValueError(
                    f"reward {use!r} has `endpoints` and `{key}`: what runs at the endpoints is up to the service's "
                    f"own config, so `{key}` belongs there"
                )
    elif "images_per_request" in spec:
        raise ValueError(f"reward {use!r} has `images_per_request` without `endpoints`, whose requests it divides")
    elif "retries" in spec and "environment" not in spec:
        raise ValueError(
            f"reward {use!r} has `retries` and runs in this process, where what failed would fail again: they are for "
            "`environment` and `endpoints`"
        )
    timeout = spec.get("timeout", 1.0)
    if isinstance(timeout, bool) or not isinstance(timeout, (int, float)) or not 0 < timeout < math.inf:
        raise ValueError(f"the timeout of reward {use!r} must be a positive number of seconds, found {timeout!r}")
    for key, least in (("retries", 0), ("images_per_request", 1)):
        value = spec.get(key, least)
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"the {key} of reward {use!r} must be an integer from {least} on, found {value!r}")


def _elsewhere(name: str, spec: Mapping[str, Any], weight: Weight) -> Reward:
    """A reward in a process of its own or behind a service; which columns it takes is known there."""
    timeout = float(spec.get("timeout", TIMEOUT))
    function: Any
    if "endpoints" in spec:
        from rewards.remote.client import Remote

        retries = spec.get("retries", ENDPOINT_RETRIES)
        function = Remote(spec["use"], spec["endpoints"], timeout, retries, spec.get("images_per_request"))
    else:
        from rewards.remote.isolated import Isolated

        inner = {key: spec[key] for key in ("use", "args") if key in spec}
        function = Isolated(name, inner, spec["environment"], timeout, spec.get("retries", ENVIRONMENT_RETRIES))
    return Reward(name, function, weight, function.columns, function.required)


def _parameters(function: Callable[..., Any]) -> str:
    return str(inspect.signature(function))


def _reward(name: str, function: Callable[..., Any], weight: Weight) -> Reward:
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
    if tuple(p.name for p in named[:2]) != GIVEN:
        raise ValueError(f"reward {name!r} must take (images, prompts, ...), found {inspect.signature(function)}")
    extra = named[2:]
    return Reward(
        name=name,
        function=function,
        weight=weight,
        columns=None if takes_all else tuple(p.name for p in extra),
        required=tuple(p.name for p in extra if p.default is p.empty),
    )


def resolve(use: str) -> Callable[..., Any]:
    """What a built-in name, ``module:attr`` or ``file.py:attr`` names; imports its module."""
    target = BUILTINS[use].target if use in BUILTINS else use
    module_name, separator, attribute = target.rpartition(":")
    if not separator or not module_name or not attribute:
        raise ValueError(
            f"unknown reward {use!r}." + nearest(use, BUILTINS) + " Your own: module:attr or file.py:attr."
        )
    module = _import_file(module_name) if module_name.endswith(".py") else _import_module(module_name)
    if not hasattr(module, attribute):
        public = [name for name, value in vars(module).items() if callable(value) and not name.startswith("_")]
        raise ValueError(f"{module_name} has no {attribute!r}." + nearest(attribute, public))
    found = getattr(module, attribute)
    if not callable(found):
        raise ValueError(f"reward {use!r} is {type(found).__name__}, not callable")
    return found


def _import_file(name: str) -> Any:
    path = Path(name).expanduser().resolve()
    if not path.is_file():
        beside = [p.name for p in path.parent.glob("*.py")] if path.parent.is_dir() else []
        raise FileNotFoundError(f"reward file {name} does not exist (looked for {path})." + nearest(path.name, beside))
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
