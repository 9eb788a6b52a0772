"""Loading rewards by the names in a config. Only what a config names is imported."""

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

from rewards.contract import GIVEN, Reward, RunsElsewhere
from rewards.digests import digest_of, digest_of_callable
from rewards.hints import nearest
from rewards.redaction import HIDDEN, located, redacted, remember_secrets
from rewards.table import BUILTINS
from rewards.weights import Weight, parse_weight

_KEYS = ("use", "weight", "args", "name", "environment", "endpoints", "timeout", "retries", "images_per_request")
#: Defaults for rewards that run elsewhere: seconds a call may take, and how often a lost call is tried again. With the
#: client's pauses 8 tries take a minute and a half, in which a restarted service loads its models again.
TIMEOUT, ENVIRONMENT_RETRIES, ENDPOINT_RETRIES = 300.0, 2, 8
#: The weighted sum of all rewards is logged under this name.
TOTAL = "reward"


Spec = str | Mapping[str, Any] | Callable[..., Any] | Reward


def load_rewards(specs: Spec | Iterable[Spec]) -> list[Reward]:
    """Load every reward of a config.

    Args:
        specs: each a name, a mapping ``{use, weight, args, name}``, a callable, or a Reward; a single one needs no
            list. ``use`` is a built-in name, ``module:attr`` or ``file.py:attr``; with ``args`` the attr is a factory
            that is called with them. More keys say where the reward runs: ``environment`` (a process with its own
            packages, see :mod:`rewards.remote.isolated`) or ``endpoints`` (a service, see :mod:`rewards.remote.client`,
            with ``images_per_request``), ``timeout`` (seconds a call may take, in this process too) and ``retries`` of
            a lost call.

    Raises:
        ValueError, FileNotFoundError, ImportError: naming the entry, what was found and what would be valid.
    """
    if isinstance(specs, (str, Mapping, Reward)) or callable(specs):
        specs = [specs]
    rewards = []
    for spec in specs or ():
        try:
            rewards.append(_load(spec))
        except SystemExit as error:  # raised by a module or factory, and should not end the run silently
            problem = (
                f"reward entry {redacted(spec)!r} ended the program (SystemExit: {redacted(str(error))}) when loaded"
            )
            raise ImportError(problem) from error
    if not rewards:
        raise ValueError("no reward was given: pass --rewards NAME, or `rewards:` in the config")
    names = [reward.name for reward in rewards]
    for name in names:
        if name == TOTAL:
            raise ValueError(f"no reward may be called {TOTAL!r}, the name of the weighted sum: set another `name`")
        if names.count(name) > 1:
            raise ValueError(f"two rewards are both called {name!r}: give one of them another `name`")
    return rewards


def read_rewards(file: Path) -> list[Any]:
    """Read the list ``rewards`` of a YAML config; raise ValueError if there is none."""
    import yaml

    try:
        content = yaml.safe_load(file.read_text())
    except yaml.YAMLError as error:
        raise ValueError(f"{file} is not YAML: {located(error)}") from None
    entries = content.get("rewards") if isinstance(content, Mapping) else None
    if not isinstance(entries, list):
        raise ValueError(f"{file} has no list `rewards:`")
    return entries


def _load(spec: Spec) -> Reward:
    if isinstance(spec, Reward):
        return spec
    if isinstance(spec, str):
        spec = {"use": spec}
    elif callable(spec):
        name = getattr(spec, "__name__", type(spec).__name__)
        reward = _reward(f"custom_{TOTAL}" if name in (TOTAL, "<lambda>") else name, spec, 1.0)
        return replace(reward, digest=digest_of_callable(spec))
    remember_secrets(spec)
    _check_entry(spec)
    use = spec["use"]
    weight = parse_weight(use, spec.get("weight", 1.0))
    _check_run_settings(spec)
    name, digest = spec.get("name") or _default_name(use), digest_of(spec)
    if use in BUILTINS and (spec.get("args") or {}).get("backend") == "package":
        spec = _run_by_package(spec)
    if "endpoints" in spec or "environment" in spec:
        reward = _load_elsewhere(name, spec, weight)
        return replace(reward, digest=getattr(reward.function, "digest", None) or digest)
    reward = replace(_reward(name, _make(use, spec.get("args")), weight), digest=digest)
    if "timeout" not in spec:
        return reward
    from rewards.remote.timed import Timed

    return replace(reward, function=Timed(name, reward.function, float(spec["timeout"])))


def _check_entry(spec: Any) -> None:
    """Raise ValueError unless an entry is a mapping with known keys of the right types."""
    if not isinstance(spec, Mapping):
        raise ValueError(
            f"reward entry {redacted(spec)!r} is {type(spec).__name__}: give a name, or a mapping with `use`"
        )
    unknown = [key for key in spec if key not in _KEYS]
    if unknown:
        # A mistyped key may be `environment` or another one that holds secrets.
        entry = {key: redacted({key: value})[key] if key in _KEYS else HIDDEN for key, value in spec.items()}
        problem = f"reward entry {entry} has an unknown key {unknown[0]!r}."
        raise ValueError(problem + nearest(str(unknown[0]), _KEYS))
    if not isinstance(spec.get("use"), str):
        raise ValueError(f"reward entry {redacted(spec)} needs `use`: a built-in name, module:attr or file.py:attr")
    for key, kind, expected in (("args", Mapping, "a mapping"), ("name", str, "text")):
        if spec.get(key) is not None and not isinstance(spec[key], kind):
            raise ValueError(f"`{key}` of reward {spec['use']!r} must be {expected}, found {redacted(spec[key])!r}")


def _default_name(use: str) -> str:
    """Return the name of a reward without ``name``: a built-in's, or that of its attr."""
    module, _, attribute = use.rpartition(":")
    return f"{Path(module).stem.rpartition('.')[2]}_{TOTAL}" if attribute == TOTAL else attribute


def _run_by_package(spec: Mapping[str, Any]) -> dict[str, Any]:
    """Return an entry with ``backend: package`` as the entry that runs the package in its own environment."""
    from rewards.learned.packages import package_checkpoint, package_spec

    environment = spec.get("environment") or {}
    if not isinstance(environment, Mapping):
        raise ValueError(
            f"the environment of reward {spec['use']!r} must be a mapping, found {type(environment).__name__}"
        )
    by_package = package_spec(spec["use"], spec["args"])
    args = by_package["args"] | {"checkpoint": str(package_checkpoint(spec["use"], spec["args"]))}
    return {**spec, **by_package, "args": args, "environment": by_package["environment"] | dict(environment)}


def _make(use: str, args: Mapping[str, Any] | None) -> Any:
    """Return the callable that an entry names; a factory is called with ``args``."""
    function = resolve(use)
    if use in BUILTINS and BUILTINS[use].factory:
        args = args or {}
    if args is None:
        return function
    try:
        inspect.signature(function).bind(**args)
    except TypeError as error:
        # Without the values: a mistyped name does not tell that its value is a secret.
        problem = f"args {list(args)} of reward {use!r} do not fit: {error}."
        raise ValueError(f"{problem} It takes {inspect.signature(function)}") from None
    try:
        return function(**args)
    except (TypeError, AttributeError, re.error) as error:
        if use not in BUILTINS:
            raise  # a user's code keeps its traceback
        raise ValueError(
            f"args {redacted(args)!r} of reward {use!r} do not fit: {type(error).__name__}: {redacted(str(error))}"
        ) from error


def _check_run_settings(spec: Mapping[str, Any]) -> None:
    """Raise ValueError for keys about where and how a reward runs that are invalid, alone or together."""
    use = spec["use"]
    if "endpoints" in spec:
        for key in ("environment", "args"):
            if spec.get(key) is not None:
                raise ValueError(
                    f"reward {use!r} has `endpoints` and `{key}`: the service's own config decides what runs at the "
                    f"endpoints, so `{key}` belongs there"
                )
    elif "images_per_request" in spec:
        raise ValueError(f"reward {use!r} has `images_per_request` without `endpoints`, to whose requests it applies")
    elif "retries" in spec and "environment" not in spec:
        raise ValueError(
            f"reward {use!r} has `retries` but runs in this process, where a call that failed would fail again: use "
            "them with `environment` or `endpoints`"
        )
    timeout = spec.get("timeout", 1.0)
    if isinstance(timeout, bool) or not isinstance(timeout, (int, float)) or not 0 < timeout < math.inf:
        raise ValueError(f"the timeout of reward {use!r} must be a positive number of seconds, found {timeout!r}")
    for key, least in (("retries", 0), ("images_per_request", 1)):
        value = spec.get(key, least)
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"the {key} of reward {use!r} must be an integer, at least {least}, found {value!r}")


def _load_elsewhere(name: str, spec: Mapping[str, Any], weight: Weight) -> Reward:
    """Load a reward in another process or at a service, which tells the columns that it takes."""
    timeout = float(spec.get("timeout", TIMEOUT))
    function: RunsElsewhere
    if "endpoints" in spec:
        from rewards.remote.client import Remote

        retries = spec.get("retries", ENDPOINT_RETRIES)
        function = Remote(spec["use"], spec["endpoints"], timeout, retries, spec.get("images_per_request"))
    else:
        from rewards.remote.isolated import Isolated

        inner = {key: spec[key] for key in ("use", "args") if key in spec}
        function = Isolated(name, inner, spec["environment"], timeout, spec.get("retries", ENVIRONMENT_RETRIES))
    return Reward(name, function, weight, function.columns, function.required)


def _reward(name: str, function: Callable[..., Any], weight: Weight) -> Reward:
    """Make a Reward of a callable, with the columns that its signature names."""
    if not callable(function):
        raise ValueError(
            f"reward {name!r} is {type(function).__name__}, not callable: with `args`, the factory must return a function"
        )
    try:
        parameters = inspect.signature(function).parameters
    except ValueError:  # a function written in C
        raise ValueError(f"reward {name!r} must take (images, prompts, ...), and its parameters are unknown") from None
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
    """Import what a built-in name, ``module:attr`` or ``file.py:attr`` refers to."""
    target = BUILTINS[use].target if use in BUILTINS else use
    module_name, separator, attribute = target.rpartition(":")
    if not separator or not module_name or not attribute:
        raise ValueError(
            f"unknown reward {use!r}." + nearest(use, BUILTINS) + " For your own: module:attr or file.py:attr."
        )
    module = _import_file(module_name) if module_name.endswith(".py") else _import_module(module_name)
    if not hasattr(module, attribute):
        public = [name for name, value in vars(module).items() if callable(value) and not name.startswith("_")]
        raise ValueError(f"{module_name} has no {attribute!r}." + nearest(attribute, public))
    function = getattr(module, attribute)
    if not callable(function):
        raise ValueError(f"reward {use!r} is {type(function).__name__}, not callable")
    return function


def _import_file(name: str) -> Any:
    path = Path(name).expanduser().resolve()
    if not path.is_file():
        siblings = [p.name for p in path.parent.glob("*.py")] if path.parent.is_dir() else []
        raise FileNotFoundError(
            f"reward file {name} does not exist (looked for {path})." + nearest(path.name, siblings)
        )
    alias = f"reward_file_{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
    if alias in sys.modules:  # two rewards in one file share the module
        return sys.modules[alias]
    spec = importlib.util.spec_from_file_location(alias, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses and pickling look for a class's module
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
        # For neighbours that are imported when it is called; last, so that they hide no other module.
        sys.path.append(str(path.parent))
    return module


def _import_module(name: str) -> Any:
    if name.startswith(".") or "/" in name:
        raise ImportError(f"{name!r} is not a module name: for a reward in a file write {name}.py:attr")
    if str(Path.cwd()) not in sys.path:
        # `accelerate launch align/grpo.py` puts align/ on the path, not the user's folder.
        sys.path.insert(0, str(Path.cwd()))
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not (name == error.name or name.startswith(error.name + ".")):
            raise ImportError(f"reward module {name!r} could not be imported: {error}") from error
        raise ImportError(f"reward module {name!r} was not found on the Python path or in {Path.cwd()}") from None
    except ImportError as error:
        raise ImportError(f"reward module {name!r} could not be imported: {error}") from error
