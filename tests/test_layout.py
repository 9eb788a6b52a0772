"""The house: which module may import which, what nothing may be called, and what is not done anywhere."""

import ast
import importlib.metadata
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("align", "rewards", "preference_data")
FILES = sorted(file for package in PACKAGES for file in (ROOT / package).rglob("*.py"))

#: Floors of align/, lowest first: a module imports from its own floor and from those below.
FLOORS = (
    {"flow", "losses", "advantages"},
    {"models", "tiny"},
    {"rollout", "buffer", "scoring", "evaluation", "metrics", "reports", "ranking", "signals", "callbacks", "trainer"}
    | {"checkpoints"}
    | {"flow_config", "arguments", "data_arguments", "launch", "latents", "matching"}
    | {"sharding", "resharding", "memory", "groups", "group_config", "grpo_config"},
    {"sft", "dpo", "dpo_online", "grpo", "nft", "generate"},
)
#: What of align/ each part of the first two floors may import, beside itself.
BELOW = {
    "flow": {"losses", "advantages"},
    "losses": {"flow", "advantages"},
    "advantages": {"flow", "losses"},
    "models": {"flow", "tiny"},
    "tiny": set(),
}
#: Others' checkpoints are pickles; this reads them, and refuses those that are more than tensors.
READS_CHECKPOINTS = ROOT / "rewards" / "checkpoints.py"
#: What torch and DeepSpeed know of a run is pickled as well; this reads only tensors and the plain types that it names.
READS_OPTIMIZERS = ROOT / "align" / "resharding.py"


def module_name(file: Path) -> str:
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(file: Path) -> set[str]:
    """Full names of the modules, and of the names from modules, that a file imports anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file.name} line {node.lineno}: a relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def parts_of_align(file: Path) -> set[str]:
    """The modules and packages directly in align/ that a file imports."""
    names = [name.split(".") for name in imports(file)]
    return {name[1] for name in names if name[0] == "align" and len(name) > 1}


def floor(part: str) -> int:
    return next(number for number, parts in enumerate(FLOORS) if part in parts)


def identify(file: Path) -> str:
    return str(file.relative_to(ROOT))


def does_nothing(statement: ast.stmt) -> bool:
    comment = isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)
    return comment or isinstance(statement, ast.Pass)


ALIGN = [file for file in FILES if file.is_relative_to(ROOT / "align") and module_name(file) != "align"]


def test_every_part_of_align_has_its_floor():
    present = {module_name(file).split(".")[1] for file in ALIGN}
    known = set().union(*FLOORS)
    assert present == known


@pytest.mark.parametrize("file", ALIGN, ids=identify)
def test_imports_point_down(file):
    part = module_name(file).split(".")[1]
    used = parts_of_align(file) - {part}
    assert all(floor(other) <= floor(part) for other in used), used
    if part in BELOW:
        assert used <= BELOW[part]


@pytest.mark.parametrize("file", [ROOT / "align" / f"{part}.py" for part in sorted(FLOORS[0])], ids=identify)
def test_the_maths_imports_torch_and_nothing_else_that_is_installed(file):
    outside = {name.split(".")[0] for name in imports(file)} - set(sys.stdlib_module_names)
    assert outside <= {"torch", "align"}


@pytest.mark.parametrize("file", [f for f in FILES if not f.is_relative_to(ROOT / "align")], ids=identify)
def test_rewards_and_data_never_import_align_nor_each_other(file):
    package = module_name(file).split(".")[0]
    assert {name.split(".")[0] for name in imports(file)} & set(PACKAGES) <= {package}


def test_no_two_modules_of_align_import_each_other():
    graph = {}
    for file in ALIGN:
        graph.setdefault(module_name(file).split(".")[1], set()).update(parts_of_align(file))
    for main in FLOORS[-1]:  # run by path they are `__main__`, and import themselves under their own name
        del graph[main]
    settled: set[str] = set()
    while len(settled) < len(graph):
        ready = {part for part, used in graph.items() if part not in settled and used - {part} <= settled}
        assert ready, f"in a circle: {set(graph) - settled}"
        settled |= ready


@pytest.mark.parametrize("file", FILES, ids=identify)
def test_no_error_is_swallowed_and_nothing_is_unpickled(file):
    tree = ast.parse(file.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.ExceptHandler):
            assert not all(map(does_nothing, node.body)), f"line {node.lineno}: an except that does nothing"
            assert node.type is not None, f"line {node.lineno}: an except of everything"
        if isinstance(node, ast.Call):
            call = ast.unparse(node)
            if file == READS_OPTIMIZERS:
                assert not call.startswith("torch.load(") or "weights_only=True" in call, f"line {node.lineno}: {call}"
            elif file != READS_CHECKPOINTS:
                assert not call.startswith(("torch.load(", "torch.save(")), f"line {node.lineno}: {call}"
            assert not re.match(r"(contextlib\.)?suppress\((Base)?Exception\)", call), f"line {node.lineno}: {call}"
    pickling = {"pickle", "_pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
    refusal = {"pickle.UnpicklingError"} if file == READS_CHECKPOINTS else set()
    assert not {name.split(".")[0] for name in imports(file) - refusal} & pickling


def test_checkpoints_are_unpickled_in_one_place_and_only_as_tensors_unless_asked_for():
    calls = [
        ast.unparse(node) for node in ast.walk(ast.parse(READS_CHECKPOINTS.read_text())) if isinstance(node, ast.Call)
    ]
    (call,) = [call for call in calls if call.startswith("torch.load(")]
    assert "weights_only=not allow_pickle" in call
    assert "allow_pickle: bool = False" in READS_CHECKPOINTS.read_text()


def test_nothing_in_align_is_called_as_a_standard_or_installed_module():
    """Run by path, align/ itself is on sys.path, and whatever is in it comes before everything else."""
    names = {path.stem for path in (ROOT / "align").iterdir()} - {"__init__", "__pycache__"}
    installed = set(importlib.metadata.packages_distributions())
    assert {"torch", "datasets", "trl"} <= installed and {"flow", "models"} <= names
    assert not names & (installed | set(sys.stdlib_module_names))


@pytest.mark.parametrize(
    ("package", "heavy"),
    [
        ("align", {"torch", "numpy", "PIL", "transformers", "diffusers", "datasets", "rewards", "preference_data"}),
        ("align.tiny", {"torch", "numpy", "PIL", "transformers", "diffusers", "datasets"}),
        ("align.models", {"torch", "transformers", "diffusers"}),
        ("rewards", {"torch", "numpy", "scipy", "transformers", "diffusers", "datasets", "align"}),
        ("preference_data", {"torch", "transformers", "diffusers", "datasets", "align", "rewards"}),
    ],
)
def test_importing_a_package_loads_nothing_heavy(package, heavy):
    code = f"import sys, json, {package}; print(json.dumps(sorted(sys.modules)))"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT).stdout
    assert not heavy & set(json.loads(printed))
