"""Count how many faults of the core its fast tests notice: single changes of the code, drawn at random.

    python tests/bench/mutants.py --count 4 --seed 0
    python tests/bench/mutants.py align/maths/losses.py align/maths/flow.py --count 20

A mutant is one change in a copy of the checkout: of a comparison, an operator, a number, a `not`, an `and`, a `min`, two
arguments, or a keyword argument or call that is dropped. The tests of its module (TESTS, the quickest first) run on it, in a
fork, up to their first failure. One that none of them notices survives and is printed: it is a behaviour that nothing pins,
or a change that changes nothing. Messages and annotations are left as they are.
"""

import argparse
import ast
import contextlib
import copy
import importlib
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
IGNORED = shutil.ignore_patterns(".git", ".venv", "runs", "site", "__pycache__", ".*_cache")
LIBRARIES = ("torch", "diffusers", "transformers", "peft", "trl.trainer.utils", "datasets", "deepspeed", "matplotlib")
LONGEST = 300  # seconds of the tests of one mutant, which then counts as caught: it hangs
OFFLINE = ("tests/offline/test_examples.py", "tests/offline/test_trainer.py", "-k", "not stock and not preferences")
CHECKPOINTS = ("tests/engine/test_checkpoints.py", "-k", "not processes and not scheduler and not process_group")
TESTS = {
    "align/maths/advantages.py": ("tests/maths/test_advantages.py",),
    "align/maths/flow.py": ("tests/maths/test_flow.py",),
    "align/maths/losses.py": ("tests/maths/test_losses.py",),
    "align/online/buffers.py": ("tests/online/test_buffers.py",),
    "align/online/pairs.py": ("tests/online/test_pairs.py",),
    "align/sampling/noise.py": ("tests/sampling/test_noise.py", "tests/sampling/test_rollout.py"),
    "align/sampling/rollout.py": ("tests/sampling/test_rollout.py",),
    "align/sampling/held_out.py": ("tests/sampling/test_held_out.py", "tests/parallel/test_agreement.py"),
    "align/offline/examples.py": OFFLINE,
    "align/engine/matching.py": ("tests/engine/test_matching.py", *OFFLINE),
    "align/engine/checkpoints.py": CHECKPOINTS,
    "align/engine/resume.py": ("tests/engine/test_resume.py", *CHECKPOINTS),
    "align/engine/weights.py": ("tests/engine/test_weights.py", "tests/engine/test_finite.py"),
    "preference_data/pairs.py": ("tests/preference_data/test_pairs.py",),
    "preference_data/buckets.py": ("tests/preference_data/test_buckets.py",),
    "rewards/weights.py": ("tests/rewards/test_weights.py",),
}
COMPARISONS = {"Lt": "LtE", "Gt": "GtE", "Eq": "NotEq", "Is": "IsNot", "In": "NotIn"}
OPERATORS = {"Add": "Sub", "Mult": "Div", "FloorDiv": "Mod", "BitAnd": "BitOr"}
NAMES = {"min": "max", "amin": "amax", "any": "all", "mean": "sum"}
SWAPPED = COMPARISONS | OPERATORS | NAMES
SWAPPED |= {other: one for one, other in SWAPPED.items()}
UNSWAPPED = ("getattr", "isinstance", "min", "max")  # they end at once with their arguments swapped, or do not mind
LEFT_AS_THEY_ARE = (ast.Raise, ast.Assert, ast.JoinedStr, ast.Import, ast.ImportFrom)


class Mutant(NamedTuple):
    """One change: what stands between two places, (line, column in bytes), both from 0, becomes ``new``."""

    start: tuple[int, int]
    end: tuple[int, int]
    old: str
    new: str


def changes(node: ast.AST) -> Iterator[ast.AST]:
    """Yield what an expression or statement may become."""
    changed = copy.deepcopy(node)
    match node:
        case ast.Compare(ops=[operator]):
            changed.ops = [getattr(ast, SWAPPED[type(operator).__name__])()]
            yield changed
        case ast.BinOp() if type(node.op).__name__ in SWAPPED:
            changed.op = getattr(ast, SWAPPED[type(node.op).__name__])()
            yield changed
        case ast.BoolOp():
            changed.op = ast.Or() if isinstance(node.op, ast.And) else ast.And()
            yield from (changed, *node.values)
        case ast.UnaryOp(op=ast.Not() | ast.USub()):
            yield node.operand
        case ast.Constant(value=int() | float() as value):
            yield from map(ast.Constant, [not value] if isinstance(value, bool) else [value + 1, value / 2 or -1])
        case ast.Expr(value=ast.Call()):
            yield ast.Pass()
        case ast.Call():
            yield from changes_of_call(node)


def changes_of_call(node: ast.Call) -> Iterator[ast.Call]:
    """Yield a call without each keyword argument, with neighbouring arguments swapped, and of the opposite function."""
    for number in range(len(node.keywords)):
        changed = copy.deepcopy(node)
        del changed.keywords[number]
        yield changed
    swaps = 0 if any(isinstance(argument, ast.Starred) for argument in node.args) else len(node.args) - 1
    for number in range(0 if ast.unparse(node.func) in UNSWAPPED else swaps):
        changed = copy.deepcopy(node)
        changed.args[number : number + 2] = changed.args[number : number + 2][::-1]
        yield changed
    field = "attr" if isinstance(node.func, ast.Attribute) else "id"
    if getattr(node.func, field, "") in SWAPPED:
        changed = copy.deepcopy(node)
        setattr(changed.func, field, SWAPPED[getattr(node.func, field)])
        yield changed


def places(node: ast.AST) -> Iterator[ast.AST]:
    """Walk over what may be changed: no messages, annotations, decorators and types."""
    if isinstance(node, LEFT_AS_THEY_ARE) or (isinstance(node, ast.Expr) and "logger" in ast.unparse(node)):
        return
    if isinstance(node, ast.Subscript) and ast.unparse(node.value) in ("Literal", "Callable", "tuple", "list", "dict"):
        return
    yield node
    for name, value in ast.iter_fields(node):
        if name not in ("annotation", "returns", "decorator_list", "bases"):
            for child in value if isinstance(value, list) else [value]:
                if isinstance(child, ast.AST):
                    yield from places(child)


def mutants_of(source: str) -> list[Mutant]:
    """Return every single change of a file."""
    found = []
    for node in places(ast.parse(source)):
        for changed in changes(node):
            text = ast.unparse(ast.fix_missing_locations(changed))
            text = f"({text})" if isinstance(changed, ast.expr) else text
            start, end = (node.lineno - 1, node.col_offset), (node.end_lineno - 1, node.end_col_offset)
            found.append(Mutant(start, end, ast.get_source_segment(source, node), text))
    return found


def applied(source: str, mutant: Mutant) -> str:
    """Return the file with one change."""
    lines, (first, start), (last, end) = source.encode().splitlines(keepends=True), mutant.start, mutant.end
    lines[first : last + 1] = [lines[first][:start] + mutant.new.encode() + lines[last][end:]]
    return b"".join(lines).decode()


def passes(tree: Path, tests: tuple[str, ...]) -> bool:
    """Whether tests pass on a copy of the checkout, in a process of their own; its output goes to log.txt beside it."""
    if (child := os.fork()) == 0:
        try:
            os.setsid()
            log = os.open(tree.parent / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(log, 1), os.dup2(log, 2)
            os.chdir(tree)
            sys.path.insert(0, str(tree))
            os.environ |= {"PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1"}
            os.environ["PYTEST_XDIST_WORKER"] = "alone"  # for tests/conftest.py: one thread
            options = ["-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", f"--basetemp={tree.parent / 'tests'}"]
            os._exit(int(importlib.import_module("pytest").main([*options, *tests])))
        finally:
            os._exit(99)
    started = time.monotonic()
    while (ended := os.waitpid(child, os.WNOHANG))[0] == 0 and time.monotonic() - started < LONGEST:
        time.sleep(0.05)
    with contextlib.suppress(ProcessLookupError):  # what it has started too
        os.killpg(child, signal.SIGKILL)
    return (ended if ended[0] else os.waitpid(child, 0))[1] == 0


def main() -> None:
    """Draw mutants of each module, run its tests on each, and print how many were caught and which survived."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("modules", nargs="*", default=list(TESTS), help="default: all of TESTS")
    parser.add_argument("--count", type=int, default=4, help="mutants of each module")
    parser.add_argument("--seed", type=int, default=0)
    asked, total, caught_in_all = parser.parse_args(), 0, 0
    for library in LIBRARIES:
        importlib.import_module(library)
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        tree = Path(shutil.copytree(ROOT, Path(folder) / "tree", ignore=IGNORED))
        for module in asked.modules:
            file, source, caught = tree / module, (tree / module).read_text(), 0
            if not passes(tree, TESTS[module]):
                sys.exit(
                    f"the tests of {module} fail without a change:\n{(tree.parent / 'log.txt').read_text()[-2000:]}"
                )
            mutants = mutants_of(source)
            mutants = random.Random(f"{asked.seed} {module}").sample(mutants, min(asked.count, len(mutants)))
            for mutant in mutants:
                file.write_text(applied(source, mutant))
                if passes(tree, TESTS[module]):
                    print(f"    {module}:{mutant.start[0] + 1}: {mutant.old}  ->  {mutant.new}", flush=True)
                else:
                    caught += 1
            file.write_text(source)
            total, caught_in_all = total + len(mutants), caught_in_all + caught
            print(f"{module:35} {caught:3}/{len(mutants)}", flush=True)
    print(f"caught {caught_in_all} of {total}, seed {asked.seed}")


if __name__ == "__main__":
    main()
