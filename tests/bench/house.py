"""Print figures of the code's structure: what a GRPO run imports, rooms and floors, longest function and file, clones.

    python tests/bench/house.py [CHECKOUT]

Rooms are the files and folders directly in align/, and arrows are imports between them. The number of floors is the length
of the longest chain of imports. A line is cloned if it is one of ten consecutive lines that occur somewhere else too;
blank lines, comments and docstrings do not count.
"""

import ast
import json
import os
import subprocess
import sys
import tempfile
from collections import Counter, defaultdict
from pathlib import Path

PACKAGES = ("align", "rewards", "preference_data")
WINDOW = 10  # consecutive lines that make a clone
RUN_CODE = """
import json, sys
from align.grpo import main
sys.stdout = open("/dev/null", "w")
main(json.loads(sys.argv[1]))
ours = [name for name in sys.modules if name.split(".")[0] in ("align", "rewards", "preference_data")]
sys.__stderr__.write("\\nIMPORTED " + json.dumps(sorted(ours)) + "\\n")
"""
GRPO_ARGUMENTS = ["--dataset_name", "tiny/background", "--rewards", "warm_background", "--output_dir", "run", "--height", "64",
         "--width", "64", "--num_inference_steps", "2", "--num_generations", "2", "--generation_batch_size", "2",
         "--per_device_train_batch_size", "4", "--max_steps", "1", "--use_cpu", "true", "--disable_tqdm", "true",
         "--save_strategy", "no"]  # fmt: skip


def imported(root: Path) -> list[str]:
    """Run GRPO for one update, and return the modules of PACKAGES that it has loaded at its end."""
    with tempfile.TemporaryDirectory() as folder:
        environment = os.environ | {"PYTHONPATH": str(root), "HF_HUB_OFFLINE": "1"}
        command = [sys.executable, "-c", RUN_CODE, json.dumps(GRPO_ARGUMENTS)]
        ended = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=True)
    return json.loads(ended.stderr.split("IMPORTED ")[1])


def has_code(root: Path, name: str) -> bool:
    """Return whether a module's file has more than a docstring."""
    path = root.joinpath(*name.split("."))
    file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    return len(ast.parse(file.read_text()).body) > 1


def imports(tree: ast.AST) -> set[str]:
    """Return the full names of all modules that a file imports, and of all names that it imports from modules."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def arrows(files: dict[Path, ast.AST], root: Path) -> dict[str, set[str]]:
    """Return the rooms that each room of align/ imports."""
    rooms = {
        path.stem for path in (root / "align").iterdir() if path.suffix == ".py" or (path / "__init__.py").is_file()
    }
    graph: dict[str, set[str]] = {room: set() for room in rooms - {"__init__", "__main__"}}
    for file, tree in files.items():
        parts = file.relative_to(root).with_suffix("").parts
        if parts[0] == "align" and parts[1] in graph:
            used = {name.split(".")[1] for name in imports(tree) if name.startswith("align.")}
            graph[parts[1]] |= (used & graph.keys()) - {parts[1]}
    return graph


def floors(graph: dict[str, set[str]]) -> int:
    """Return the number of floors: the rooms in the longest chain of imports."""

    def height(room: str) -> int:
        return 1 + max((height(other) for other in graph[room]), default=0)

    return max(map(height, graph))


def code_lines(file: Path, tree: ast.AST) -> list[str]:
    """Return the lines of code of a file, with white space folded."""
    lines = file.read_text().splitlines()
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            lines[node.lineno - 1 : node.end_lineno] = [""] * (node.end_lineno - node.lineno + 1)
    return [folded for line in lines if (folded := " ".join(line.split())) and not folded.startswith("#")]


def cloned_share(files: dict[Path, ast.AST]) -> float:
    """Return the share of code lines that are in a window of lines that occurs more than once."""
    windows: dict[tuple[str, ...], list[tuple[Path, int]]] = defaultdict(list)
    line_count = 0
    for file, tree in files.items():
        lines = code_lines(file, tree)
        line_count += len(lines)
        for start in range(len(lines) - WINDOW + 1):
            windows[tuple(lines[start : start + WINDOW])].append((file, start))
    cloned: set[tuple[Path, int]] = set()
    for places in windows.values():
        if len(places) > 1:
            for file, start in places:
                cloned |= {(file, line) for line in range(start, start + WINDOW)}
    return len(cloned) / line_count


def main() -> None:
    """Measure, and print a line for each figure."""
    root = Path(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parents[2]).resolve()
    files = {
        file: ast.parse(file.read_text()) for package in PACKAGES for file in sorted((root / package).rglob("*.py"))
    }
    graph, loaded = arrows(files, root), imported(root)
    functions = []
    for file, tree in files.items():
        for node in ast.walk(tree):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                functions.append((node.end_lineno - node.lineno + 1, f"{file.relative_to(root)}:{node.name}"))
    lengths = [(len(file.read_text().splitlines()), str(file.relative_to(root))) for file in files]
    naming_family = [str(file.relative_to(root)) for file in files if "QwenImage" in file.read_text()]
    outside = [file for file in naming_family if not file.startswith(("align/models/", "align/tiny/"))]
    with_code = [name for name in loaded if has_code(root, name)]
    per_package = Counter(name.split(".")[0] for name in with_code)
    listed = ", ".join(f"{count} of {package}" for package, count in sorted(per_package.items()))
    print(f"own files behind a GRPO run: {len(with_code)} ({listed}), and {len(loaded) - len(with_code)} without code")
    print(f"rooms of align/: {len(graph)}, floors: {floors(graph)}, arrows: {sum(map(len, graph.values()))}")
    print("longest function: {} lines, {}".format(*max(functions)))
    print("longest file: {} lines, {}".format(*max(lengths)))
    print(f"lines in ten-line clones: {cloned_share(files):.2%}")
    print(f"files that say QwenImage outside models/ and tiny/: {len(outside)} {outside or ''}")
    print(f"files: {len(files)}, lines: {sum(n for n, _ in lengths)}")


if __name__ == "__main__":
    main()
