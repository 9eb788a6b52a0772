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

#: Floors of align/, highest first. A module imports from its own room and from the floors below it, never from another
#: room of its own floor; "doors" are the files directly in align/, of which one may import another.
FLOORS = (
    ("doors",),
    ("cli",),
    ("online", "offline"),
    ("engine",),
    ("sampling",),
    ("models",),
    ("tiny", "maths", "parallel"),
)
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
#: Others' checkpoints are pickles; this reads them, and refuses those that are more than tensors.
READS_CHECKPOINTS = ROOT / "rewards" / "learned" / "weight_files.py"
#: What torch and DeepSpeed know of a run is pickled as well; this reads only tensors and the plain types that it names.
READS_OPTIMIZERS = ROOT / "align" / "parallel" / "resharding.py"


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


def room_of(module: str) -> str:
    """The room of one of align's modules, or of a name in it."""
    parts = module.split(".")
    return parts[1] if parts[1] in FLOOR else "doors"


def used_rooms(file: Path) -> set[str]:
    """The rooms of align/ that a file imports from."""
    return {room_of(name) for name in imports(file) if name.startswith("align.")}


def identify(file: Path) -> str:
    return str(file.relative_to(ROOT))


def does_nothing(statement: ast.stmt) -> bool:
    comment = isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)
    return comment or isinstance(statement, ast.Pass)


ALIGN = [file for file in FILES if file.is_relative_to(ROOT / "align") and module_name(file) != "align"]


def test_every_room_of_align_has_its_floor():
    rooms = {path.name for path in (ROOT / "align").iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert rooms | {"doors"} == set(FLOOR)


@pytest.mark.parametrize("file", ALIGN, ids=identify)
def test_imports_point_down(file):
    room = room_of(module_name(file))
    for other in used_rooms(file) - {room}:
        assert FLOOR[other] > FLOOR[room], f"{room} imports {other}"


def test_no_room_but_the_lowest_is_a_single_file_and_none_is_deeper_than_two_folders():
    for package in PACKAGES:
        for folder in (ROOT / package).rglob("*/"):
            modules = [path for path in folder.glob("*.py") if path.name != "__init__.py"]
            assert len(modules) != 1, f"{identify(folder)} is a folder of one file"
            if modules:
                assert len(folder.relative_to(ROOT).parts) <= 2, identify(folder)


@pytest.mark.parametrize("file", FILES, ids=identify)
def test_a_file_fits_an_eye_and_a_function_a_screen(file):
    assert len(file.read_text().splitlines()) <= 350
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            assert node.end_lineno - node.lineno + 1 <= 60, f"{node.name} in line {node.lineno}"


@pytest.mark.parametrize("file", FILES, ids=identify)
def test_only_models_and_the_embedded_one_know_a_family_by_name(file):
    if not identify(file).startswith(("align/models/", "align/tiny/")):
        assert "QwenImage" not in file.read_text()


@pytest.mark.parametrize("file", sorted((ROOT / "align" / "maths").glob("*.py")), ids=identify)
def test_the_maths_imports_torch_and_nothing_else_that_is_installed(file):
    outside = {name.split(".")[0] for name in imports(file)} - set(sys.stdlib_module_names)
    assert outside <= {"torch", "align"}
    assert used_rooms(file) <= {"maths"}


@pytest.mark.parametrize("file", [f for f in FILES if not f.is_relative_to(ROOT / "align")], ids=identify)
def test_rewards_and_data_never_import_align_nor_each_other(file):
    package = module_name(file).split(".")[0]
    opens = (
        {"preference_data.images.ImageSource"} if identify(file) == "rewards/__main__.py" else set()
    )  # a command line
    assert {name.split(".")[0] for name in imports(file) - opens} & set(PACKAGES) <= {package}


@pytest.mark.parametrize("package", PACKAGES)
def test_no_two_modules_import_each_other(package):
    modules = {module_name(file): file for file in FILES if module_name(file).split(".")[0] == package}
    graph = {}
    for name, file in modules.items():
        used = {
            target for target in imports(file) for target in (target, target.rpartition(".")[0]) if target in modules
        }
        graph[name] = used - {name, package}  # a door, run by path, imports itself under its own name
    settled: set[str] = set()
    while len(settled) < len(graph):
        ready = {name for name, used in graph.items() if name not in settled and used <= settled}
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
            if re.match(r"Auto\w+\.from_pretrained\(", call):  # it would ask on stdin to run the repository's code
                assert "trust_remote_code=False" in call, f"line {node.lineno}: {call}"
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
    assert {"torch", "datasets", "trl"} <= installed and {"grpo", "models"} <= names
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
