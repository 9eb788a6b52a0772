"""List the rewards, or score images, from the shell.

flow-align rewards list
flow-align rewards score --use hpsv2 --use ocr --images *.png --prompt "a red cat"
flow-align rewards score --config run.yaml --images pictures/*.png --column target=STOP --json
"""

import argparse
import glob
import importlib.util
import json
import math
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from rewards.calling import score
from rewards.contract import STEP, RewardError
from rewards.redaction import redacted
from rewards.registry import load_rewards, read_rewards
from rewards.table import BUILTINS, Builtin


def main(argv: list[str] | None = None) -> None:
    """Run a command; errors of the user are printed in one line."""
    words = list(sys.argv[1:] if argv is None else argv)
    if words[:1] == ["serve"]:  # needs packages of its own, and has its own options
        from rewards.serve import main as serve

        return serve(words[1:])
    parser = argparse.ArgumentParser(
        prog="flow-align rewards", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    listing = commands.add_parser(
        "list", help="list the built-in rewards, what each needs, and whether it can run here"
    )
    listing.add_argument("--json", action="store_true", help="print JSON")
    commands.add_parser("serve", help="serve rewards over HTTP: `serve --help` lists its options")
    scoring = commands.add_parser("score", help="score images")
    add = scoring.add_argument
    add("--use", action="append", default=[], help="a built-in name, module:attr or file.py:attr; may be repeated")
    add("--config", type=Path, help="YAML with a list `rewards:`, as for training (args, environment, endpoints)")
    add("--images", nargs="+", required=True, help="files or patterns")
    add("--prompt", help="prompt of all images; default: the text of a .txt file beside each image")
    add(
        "--column",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="a data column for all images, JSON or text",
    )
    add("--json", action="store_true", help="print one JSON object a line instead of a table")
    args = parser.parse_args(words)
    try:
        if args.command == "list":
            _print_list(args.json)
        else:
            _print_scores(args)
        sys.stdout.flush()
    except BrokenPipeError:  # as with `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # where the remaining output goes at exit
    except (ValueError, OSError, ImportError, RewardError) as error:
        raise SystemExit(f"error: {redacted(str(error))}") from None


# --- list ---


def _print_list(as_json: bool) -> None:
    rows = [{"name": name, **_facts(builtin)} for name, builtin in BUILTINS.items()]
    if as_json:
        print(json.dumps(rows, indent=1))
        return
    for row in rows:
        print(f"{row['name']}: {row['about']}")
        needs = [f"columns {', '.join(row['columns'])}"] if row["columns"] else []
        needs += [f'{", ".join(row["packages"])} (pip install "flow-align[{row["extra"]}]")'] if row["packages"] else []
        needs += list(row["checkpoints"])
        if needs:
            print(f"    needs: {'; '.join(needs)}")
        print(f"    can run here: {row['runs']}")


def _facts(builtin: Builtin) -> dict[str, Any]:
    """Return what the list shows of a built-in."""
    missing = [name for name in builtin.packages if importlib.util.find_spec(name.partition(".")[0]) is None]
    cached = {name: _in_cache(name) for name in builtin.checkpoints}
    runs = "yes"
    if not all(cached.values()):
        absent = ", ".join(name for name, is_cached in cached.items() if not is_cached)
        runs = f"after a download at the first use, or with paths in `args`: {absent}"
    if missing:
        runs = f"no: {', '.join(missing)} not installed"
    return {
        "about": builtin.about,
        "columns": [name.replace("?", " (optional)") for name in builtin.columns],
        "packages": list(builtin.packages),
        "extra": builtin.extra,
        "checkpoints": cached,
        "runs": runs,
    }


def _in_cache(checkpoint: str) -> bool:
    """Whether a file (or, for a model, its config) is in the local cache of the hub."""
    from huggingface_hub import try_to_load_from_cache

    repository, _, file = checkpoint.partition(":")
    return isinstance(try_to_load_from_cache(repository, file or "config.json"), str)


# --- score ---


def _print_scores(args: argparse.Namespace) -> None:
    specs = [*args.use, *(read_rewards(args.config) if args.config else [])]
    files = _find_files(args.images)
    prompts = [args.prompt if args.prompt is not None else _read_prompt(file) for file in files]
    columns = {name: [value] * len(files) for name, value in map(_parse_column, args.column)}
    rewards = load_rewards(specs)
    try:
        for reward in rewards:
            reward.check_columns({*columns, STEP})
        columns = {STEP: [0] * len(files)} | columns
        table, failures = score(rewards, [_read_image(file) for file in files], prompts, columns)
    finally:
        for reward in rewards:
            reward.close()
    rows = [
        {"image": str(file), "prompt": prompt}
        | {r.name: None if math.isnan(values[n]) else values[n] for r, values in zip(rewards, table, strict=True)}
        for n, (file, prompt) in enumerate(zip(files, prompts, strict=True))
    ]
    if args.json:
        print("\n".join(json.dumps(row, ensure_ascii=False) for row in rows))
    else:
        _print_table(rows, [reward.name for reward in rewards])
    if failures:
        raise RewardError("; ".join(f"reward {name!r} failed: {message}" for name, message in failures.items()))


def _print_table(rows: Sequence[Mapping[str, Any]], names: Sequence[str]) -> None:
    """Print aligned columns, with "-" for an image that was not scored."""
    cells = [["image", *names]]
    cells += [[row["image"], *("-" if row[n] is None else f"{row[n]:.6g}" for n in names)] for row in rows]
    widths = [max(len(line[n]) for line in cells) for n in range(len(cells[0]))]
    for line in cells:
        print("  ".join([line[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=True))]))


def _find_files(patterns: Sequence[str]) -> list[Path]:
    files: list[Path] = []
    for pattern in patterns:
        found = [pattern] if Path(pattern).is_file() else sorted(glob.glob(pattern))
        if not found:
            raise FileNotFoundError(f"no image matches {pattern}")
        files += map(Path, found)
    return files


def _read_prompt(file: Path) -> str:
    text = file.with_suffix(".txt")
    if not text.is_file():
        raise FileNotFoundError(f"{file} has no prompt: pass --prompt, or write it to {text}")
    return text.read_text(encoding="utf-8-sig").strip()


def _parse_column(text: str) -> tuple[str, Any]:
    name, separator, value = text.partition("=")
    if not separator or not name:
        raise ValueError(f"--column {text}: give NAME=VALUE")
    try:
        return name, json.loads(value)
    except ValueError:  # plain text
        return name, value


def _read_image(file: Path) -> Image.Image:
    from preference_data.images import ImageSource  # the one way to open an image; only this door reads files

    return ImageSource(str(file), path=file).open()


if __name__ == "__main__":
    main()
