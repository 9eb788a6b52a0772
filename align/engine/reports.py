"""What a run leaves to look at: sample grids, the reward curve, a table, and a model card."""

import json
import math
import re
import statistics
import textwrap
from collections.abc import Sequence
from dataclasses import MISSING, fields
from enum import Enum
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

from rewards.redaction import redacted

_CAPTION, _GAP = 16, 4
#: On the card of a LoRA, behind the code for diffusers.
_ELSEWHERE = """Strength 1 is what was trained, in every tool; alpha is the rank.

- ComfyUI: put the file into `models/loras`; node "Load LoRA".
- DiffSynth-Studio: `pipe.load_lora(pipe.dit, "THIS_FOLDER/pytorch_lora_weights.safetensors", alpha=1)`.
- musubi-tuner: first `python convert_lora.py --input pytorch_lora_weights.safetensors --output musubi.safetensors --target default`."""


def image_grid(rows: Sequence[Sequence[Image.Image]], captions: Sequence[str], tile: int = 128) -> Image.Image:
    """Draw one row of images under each caption; ``tile`` is the side of a cell in pixels."""
    columns = max(len(row) for row in rows)
    size = (columns * (tile + _GAP) + _GAP, len(rows) * (tile + _CAPTION + _GAP) + _GAP)
    canvas = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(canvas)
    for r, (row, caption) in enumerate(zip(rows, captions, strict=True)):
        top = _GAP + r * (tile + _CAPTION + _GAP)
        room = max(8, size[0] // 6)  # the default font is about six pixels a letter
        draw.text((_GAP, top), textwrap.shorten(caption, room, placeholder="..."), fill="black")
        for c, image in enumerate(row):
            shown = image.convert("RGB").resize(
                (tile, tile), Image.Resampling.NEAREST if image.width < tile else Image.Resampling.LANCZOS
            )
            canvas.paste(shown, (_GAP + c * (tile + _GAP), top + _CAPTION))
    return canvas


def save_grid(images: Sequence[tuple[str, Sequence[Image.Image]]], folder: Path, step: int) -> Path:
    """Write ``samples/step-N.png`` of a run folder, from (prompt, its images), and return the file."""
    (folder / "samples").mkdir(parents=True, exist_ok=True)
    grid = image_grid([row for _, row in images], [prompt for prompt, _ in images])
    file = folder / "samples" / f"step-{step:06d}.png"
    grid.save(file)
    return file


def save_scores(rows: Sequence[dict[str, Any]], folder: Path, step: int) -> None:
    """Write ``samples/step-N.jsonl`` of a run folder: what each held-out prompt scored."""
    (folder / "samples").mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (folder / "samples" / f"step-{step:06d}.jsonl").write_text(text, encoding="utf-8")


def _of_steps(folder: Path, ending: str, until: int | None) -> list[Path]:
    """List the files of a run's evaluations, in order; ``until``: the last update of interest."""
    files = sorted((folder / "samples").glob(f"step-*{ending}"))
    return [file for file in files if until is None or int(file.stem.removeprefix("step-")) <= until]


def paired_errors(folder: Path, until: int | None = None) -> dict[str, float]:
    """Return the standard error of each held-out change, prompt by prompt: both evaluations start from the same noise.

    Names are those of :func:`held_out_changes`. Empty when the run was not evaluated before its first update. ``until``:
    the update whose weights are exported, the last one by default.
    """
    files = _of_steps(folder, ".jsonl", until)
    if len(files) < 2 or files[0].name != "step-000000.jsonl":
        return {}
    before, after = (
        {(row["data"], row["row"]): row for row in map(json.loads, path.read_text(encoding="utf-8").splitlines())}
        for path in (files[0], files[-1])
    )
    changes: dict[str, list[float]] = {}
    for key in before.keys() & after.keys():
        for name in (before[key].keys() & after[key].keys()) - {"data", "row", "prompt"}:
            if before[key][name] is not None and after[key][name] is not None:
                full = f"{key[0]}_{name}".removeprefix("eval_")
                changes.setdefault(full, []).append(after[key][name] - before[key][name])
    return {name: statistics.stdev(c) / math.sqrt(len(c)) for name, c in changes.items() if len(c) > 1}


def side_by_side(before: Path, after: Path, target: Path) -> None:
    """Write to ``target`` the two grids next to each other, under the words before and after."""
    grids = [Image.open(path).convert("RGB") for path in (before, after)]
    width = sum(g.width for g in grids) + 3 * _GAP
    canvas = Image.new("RGB", (width, max(g.height for g in grids) + _CAPTION), "white")
    draw, left = ImageDraw.Draw(canvas), _GAP
    for grid, title in zip(grids, ("before", "after"), strict=True):
        draw.text((left, 2), title, fill="black")
        canvas.paste(grid, (left, _CAPTION))
        left += grid.width + _GAP
    canvas.save(target)


def series(log_history: list[dict[str, Any]], key: str) -> tuple[list[int], list[float]]:
    """Return steps and values of ``key`` in a ``trainer_state.json`` log."""
    points = [(entry["step"], entry[key]) for entry in log_history if key in entry]
    return [s for s, _ in points], [v for _, v in points]


def reward_curve(log_history: list[dict[str, Any]], target: Path, guards: Sequence[str] = ()) -> None:
    """Draw :func:`reward_figure` as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure = reward_figure(log_history, guards)
    figure.savefig(target, dpi=120)
    plt.close(figure)


def reward_figure(log_history: list[dict[str, Any]], guards: Sequence[str] = ()) -> Any:
    """Plot the training reward and every held-out measure with its standard error.

    What is watched and not rewarded, guards (``guards``: the names of their data sets) and the diversity, has a plot of
    its own below. Legends stand beside the plots.
    """
    import matplotlib.pyplot as plt

    keys = sorted({k for entry in log_history for k in entry if k.startswith("eval_") and f"{k}_se" in entry})
    watched = [key for key in keys if is_guard(key, guards)]
    rewarded = [key for key in keys if key not in watched]
    figure, axes = plt.subplots(
        2 if watched else 1, figsize=(9, 7 if watched else 4), layout="constrained", sharex=True, squeeze=False
    )
    steps, values = series(log_history, "reward")
    if steps:
        axes[0, 0].plot(steps, values, color="0.7", label="training reward")
    _plot_held_out(axes[0, 0], log_history, rewarded)
    axes[0, 0].set_ylabel("reward (held out: mean and standard error)")
    if watched:
        _plot_held_out(axes[1, 0], log_history, watched)
        axes[1, 0].set_ylabel("guards, not rewarded")
    axes[-1, 0].set_xlabel("optimizer update")
    for axis in axes.flat:
        axis.grid(alpha=0.3)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.01, 1.0), borderaxespad=0.0)
    return figure


def is_guard(key: str, guards: Sequence[str]) -> bool:
    """Whether a logged measure ``eval_...`` is watched for damage, not rewarded."""
    return key == "eval_diversity" or any(key.startswith(f"eval_{name}_") for name in guards)


def _plot_held_out(axis: Any, log_history: list[dict[str, Any]], keys: Sequence[str]) -> None:
    for key in keys:
        (steps, values), errors = series(log_history, key), series(log_history, f"{key}_se")[1]
        width = 2.5 if key == "eval_reward" else 1.2
        name = key.removeprefix("eval_")
        axis.errorbar(steps, values, yerr=errors, marker="o", linewidth=width, capsize=2, label=name)


def held_out_changes(log_history: list[dict[str, Any]]) -> list[tuple[str, float, float, float, float]]:
    """List (name, before, its standard error, after, its standard error) for every held-out measure of a run.

    Before is NaN when the run was not evaluated before its first update.
    """
    keys = dict.fromkeys(k for entry in log_history for k in entry if k.startswith("eval_") and f"{k}_se" in entry)
    rows = []
    for key in keys:
        (steps, values), errors = series(log_history, key), series(log_history, f"{key}_se")[1]
        before = (values[0], errors[0]) if steps[0] == 0 else (math.nan, math.nan)
        rows.append((key.removeprefix("eval_"), *before, values[-1], errors[-1]))
    return rows


def changes_table(
    log_history: list[dict[str, Any]], paired: dict[str, float] | None = None, until: int | None = None
) -> str:
    """Return :func:`held_out_changes` as a Markdown table.

    ``paired``: the standard errors of the changes themselves. ``until``: as for :func:`paired_errors`.
    """
    paired = paired or {}
    log_history = [entry for entry in log_history if until is None or entry["step"] <= until]
    lines = ["| held-out measure | before | after | change |", "|---|---|---|---|"]
    for name, before, before_se, after, after_se in held_out_changes(log_history):
        start, change = (f"{before:.3f} ± {before_se:.3f}", f"{after - before:+.3f}")
        if name in paired:
            change += f" ± {paired[name]:.3f}"
        if math.isnan(before):
            start, change = "not measured", ""
        lines.append(f"| {name} | {start} | {after:.3f} ± {after_se:.3f} | {change} |")
    return "\n".join(lines)


def changed_settings(*settings: Any) -> dict[str, Any]:
    """Return the fields of these dataclasses that differ from their defaults, without tokens."""
    changed = {}
    for group in settings:
        for spec in fields(group):
            default = spec.default_factory() if spec.default_factory is not MISSING else spec.default
            value = getattr(group, spec.name)
            value = value.value if isinstance(value, Enum) else value
            unset = not value and default in (None, False, "none", "")  # transformers fills these in as it likes
            plain = isinstance(value, (str, int, float, list, dict, type(None)))
            if plain and not unset and value != default and "token" not in spec.name:
                changed[spec.name] = value
    return changed


def write_run_folder(
    folder: Path, log_history: list[dict[str, Any]], guards: Sequence[str] = (), until: int | None = None, **card: Any
) -> None:
    """Write the pictures and the model card of a finished run; ``card`` is what :func:`model_card` takes besides.

    ``until``: as for :func:`paired_errors`.
    """
    reward_curve(log_history, folder / "reward_curve.png", guards)
    pictures = ["reward_curve.png"]
    grids = _of_steps(folder, ".png", until)
    if len(grids) > 1 and grids[0].name == "step-000000.png":
        side_by_side(grids[0], grids[-1], folder / "before_after.png")
        pictures.append("before_after.png")
    table = changes_table(log_history, paired_errors(folder, until), until)
    text = model_card(exported=until, title=folder.resolve().name, table=table, pictures=pictures, **card)
    (folder / "README.md").write_text(text)


def _escaped(text: str) -> str:
    """Return a text of the data's as Markdown shows it, on one line."""
    shown = "".join(letter if letter.isprintable() else " " for letter in text)
    return re.sub(r"([\\`*\[\]<>|#])", r"\\\1", shown)


def model_card(
    *,
    title: str,
    algorithm: str,
    base_model: str,
    base_on_hub: bool,
    loading_code: str,
    lora: bool,
    data: str,
    account: Sequence[str],
    rewards: list[str],
    settings: dict[str, Any],
    table: str,
    pictures: Sequence[str] = (),
    exported: int | None = None,
) -> str:
    """Return the README.md of a run folder: what it is, how to load it, what it was made from, what changed.

    ``exported``: the update whose weights these are, where it is not the last one. ``account``: lines that say what the
    data are.
    """
    base = f"base_model: {json.dumps(base_model)}\n" if base_on_hub else ""  # the hub refuses a name it does not know
    tags = "".join(
        f"- {tag}\n" for tag in ["text-to-image", "flow-align", algorithm.lower(), *(["lora"] if lora else [])]
    )
    sections = [
        f"---\nlibrary_name: diffusers\n{base}tags:\n{tags}---",
        f"# {_escaped(title)}",
        f"Trained with flow-align ({algorithm}) from `{base_model}`."
        + (f" These are the weights after update {exported}, the best ones." if exported is not None else ""),
        f"```python\n{loading_code}\n```",
        *([_ELSEWHERE] if lora else []),
        f"## Result\n\n{table}",
        *(f"![{Path(picture).stem.replace('_', ' ')}]({picture})" for picture in pictures),
        f"## Data and rewards\n\nTrained on {_escaped(data)}. Rewards: {_escaped(', '.join(rewards)) or 'none'}.",
        *(["\n".join(f"- {_escaped(line)}" for line in account)] if account else []),
        f"## Settings that differ from the defaults\n\n```json\n{json.dumps(redacted(settings), indent=2, default=str)}\n```",
    ]
    return redacted("\n\n".join(sections)) + "\n"
