"""The Python of a reward's own environment: an existing one, or a virtual environment made once from requirements."""

import collections
import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rewards.hints import nearest
from rewards.redaction import foreign, redacted
from rewards.remote.variables import variables_for_pip

_KEYS = ("python", "requirements", "variables")
#: A file that is written last: an environment without it was interrupted and is made again.
_DONE = ".complete"


def check_environment(name: str, environment: Any) -> None:
    """Raise ValueError or FileNotFoundError for an invalid ``environment``; nothing is made yet.

    It is a mapping with these keys. python: path of an interpreter or of a virtual environment's folder. requirements:
    a requirements file or a list of requirements; ``python`` then makes the environment. variables: environment
    variables; one without a value is that of the run.
    """
    if not isinstance(environment, Mapping):
        raise ValueError(
            f"the environment of reward {name!r} must be {{python: PATH}} or {{requirements: FILE or list}}, "
            f"found {type(environment).__name__}"
        )
    for key in environment:
        if key not in _KEYS:
            raise ValueError(
                f"the environment of reward {name!r} has an unknown key {key!r}." + nearest(str(key), _KEYS)
            )
    if not {"python", "requirements"} & set(environment):
        raise ValueError(f"the environment of reward {name!r} needs `python` or `requirements`")
    variables = environment.get("variables") or {}
    if not isinstance(variables, Mapping) or not all(isinstance(key, str) for key in variables):
        raise ValueError(
            f"the `variables` of reward {name!r} must map names to values, found {type(variables).__name__}"
        )
    for key, value in variables.items():
        if value is None and key not in os.environ:
            raise ValueError(f"the variable {key} of reward {name!r} has no value, and is not set for the run")
    _base_python(name, environment)
    if "requirements" in environment:
        _requirements(name, environment["requirements"])


def environment_python(name: str, environment: Mapping[str, Any]) -> str:
    """Return the path of the interpreter of a checked ``environment``, and make the environment if necessary.

    Raises:
        ValueError: the environment could not be made; with the last lines of pip's output.
    """
    base = _base_python(name, environment)
    if "requirements" not in environment:
        return base
    text, option = _requirements(name, environment["requirements"])
    variables = variables_for_pip(environment.get("variables") or {})
    version = _python_version(name, base, variables)
    digest = hashlib.sha256("\0".join([text, option or "", base, version]).encode()).hexdigest()[:16]
    folder = private_cache_folder() / digest
    python = folder / "bin" / "python"
    with locked(folder.with_suffix(".lock")):  # of several processes only one makes it
        if not (folder / _DONE).exists():
            shutil.rmtree(folder, ignore_errors=True)
            _build(name, base, folder, text, option, variables)
            (folder / _DONE).write_text(text)
    return str(python)


def _python_version(name: str, python: str, variables: dict[str, str]) -> str:
    """Return what ``python -VV`` prints; raise ValueError if it is not a Python."""
    try:
        result = subprocess.run([python, "-VV"], env=variables, capture_output=True, text=True, errors="replace")
    except OSError as error:
        raise ValueError(f"reward {name!r}: {python} cannot be run: {error}") from None
    if result.returncode or not result.stdout.startswith("Python"):
        answer = f"`-VV` ended with {result.returncode}, {foreign(result.stdout + result.stderr, longest=500)!r}"
        raise ValueError(f"reward {name!r}: {python} is not a Python: {answer}")
    return result.stdout


def cache_folder() -> Path:
    """Return the folder of all environments; any of them can be deleted when it is no longer needed."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "flow-align" / "environments"


def private_cache_folder() -> Path:
    """Return the folder of all environments, made if necessary.

    Raises:
        ValueError: somebody else can write to it, and so choose what is executed from it.
    """
    folder = cache_folder()
    folder.parent.parent.mkdir(parents=True, exist_ok=True)
    # Others of the user's group may write to the one above: what they put in the place of `folder` is not the user's.
    for path, foreign_write in ((folder.parent, 0o002), (folder, 0o022)):
        path.mkdir(mode=0o700, exist_ok=True)
        status = path.stat()
        owners = {status.st_uid, path.lstat().st_uid}  # whose link it is can lead it elsewhere later
        if owners != {os.geteuid()} or status.st_mode & foreign_write:
            raise ValueError(
                f"the folder {path} belongs to another user or is writable by others, who could put programs there that "
                "a reward would run: remove it, or set XDG_CACHE_HOME to a folder of your own"
            )
    return folder


def _base_python(name: str, environment: Mapping[str, Any]) -> str:
    given = environment.get("python", sys.executable)
    if not isinstance(given, (str, os.PathLike)):
        raise ValueError(f"the `python` of reward {name!r} must be a path, found {redacted(given)!r}")
    path = Path(given).expanduser()
    if path.is_dir():
        path = path / "bin" / "python"
    found = str(path.absolute()) if path.is_file() else None
    if found is None and path.parent == Path():  # a name without a folder is searched on the PATH
        found = shutil.which(str(path))
    if found is None:
        raise FileNotFoundError(f"reward {name!r}: there is no Python at {path} (environment: python: {given})")
    if not os.access(found, os.X_OK):
        raise ValueError(f"reward {name!r}: {found} is not executable (environment: python: {given})")
    return found


def _requirements(name: str, given: Any) -> tuple[str, str | None]:
    """Return the text of the requirements, and their file, if any."""
    if isinstance(given, Sequence) and not isinstance(given, str) and all(isinstance(line, str) for line in given):
        if given:
            return "\n".join(given) + "\n", None
    elif isinstance(given, (str, os.PathLike)):
        path = Path(given).expanduser()
        if not path.is_file():
            siblings = [p.name for p in path.parent.glob("*.txt")] if path.parent.is_dir() else []
            raise FileNotFoundError(
                f"the requirements file {given} of reward {name!r} does not exist (looked for {path.absolute()})."
                + nearest(path.name, siblings)
            )
        return path.read_text(), str(path.absolute())
    raise ValueError(
        f"the `requirements` of reward {name!r} must be a file or a list of lines, found {redacted(given)!r}"
    )


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Enter a context that one process of the machine is in at a time; ``path``: the lock, made if necessary."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    except OSError as error:  # for instance a link, to a file that is not ours to open
        raise ValueError(f"the lock {path} cannot be opened: {error.strerror}") from None
    with os.fdopen(descriptor, "r+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # released when the file is closed, also if the process dies
        yield


def _build(name: str, base: str, folder: Path, text: str, file: str | None, variables: dict[str, str]) -> None:
    """Make the virtual environment and install into it, showing progress."""
    print(f"reward {name}: making its environment in {folder}, once", file=sys.stderr, flush=True)
    _run_command(name, [base, "-m", "venv", str(folder)], variables)
    if file is None:
        requirements = folder / "requirements.txt"
        requirements.write_text(text)
        file = str(requirements)
    pip = [str(folder / "bin" / "python"), "-m", "pip", "--disable-pip-version-check", "--no-input"]
    install = [*pip, "install", "--progress-bar", "off", "pillow", "-r", file]  # the worker reads images
    _run_command(name, install, variables)


def _run_command(name: str, command: list[str], variables: dict[str, str]) -> None:
    """Run a command and show its steps on standard error; raise ValueError with its last lines if it fails."""
    last: collections.deque[str] = collections.deque(maxlen=15)
    with subprocess.Popen(
        command,
        env=variables,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            line = foreign(line.rstrip())
            last.append(line)
            if line.lstrip().startswith(("Collecting", "Downloading", "Building", "Installing", "Successfully")):
                print(f"  {line.strip()}", file=sys.stderr, flush=True)
    if process.returncode:
        raise ValueError(
            f"the environment of reward {name!r} could not be made ({' '.join(command[1:4])} ... ended with "
            f"{process.returncode}):\n  " + "\n  ".join(last)
        )
