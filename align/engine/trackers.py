"""What goes to the tracker besides numbers: the grid of held-out samples and what each prompt scored; and its run's name."""

import os
import secrets
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from align.engine.settings import FlowConfig

#: In output_dir: the id of the run at Weights & Biases, so that a resumed run goes on in it.
WANDB_RUN = "wandb_run_id"


@contextmanager
def named_run(args: FlowConfig, resumed: bool) -> Iterator[None]:
    """Enter a context in which Weights & Biases begins a run of an id that is kept in output_dir, or goes on in it.

    ``resumed``: go on in the run of before, where its id is known. One that is in the environment stays.
    """
    if "wandb" not in args.report_to or "WANDB_RUN_ID" in os.environ or not args.should_save:
        yield
        return
    file = Path(str(args.output_dir)) / WANDB_RUN
    if not (resumed and file.is_file()):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(secrets.token_hex(4))
    named = {"WANDB_RUN_ID": file.read_text().strip(), "WANDB_RESUME": "allow"}
    before = {name: os.environ.get(name) for name in named}
    os.environ |= named
    try:
        yield
    finally:  # another run of this process would find it
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


def show_samples(
    callbacks: Sequence[TrainerCallback], step: int, grid: Path | None, rows: Sequence[dict[str, Any]]
) -> None:
    """Give a grid of samples and the scores of the prompts to the trackers that take pictures and tables.

    These are Weights & Biases and TensorBoard. The files in output_dir are there whatever the tracker.
    """
    for callback in callbacks:
        kind = type(callback).__name__
        if kind == "WandbCallback" and callback._wandb is not None and callback._wandb.run is not None:
            _to_wandb(callback._wandb, step, grid, rows)
        elif kind == "TensorBoardCallback" and callback.tb_writer is not None:
            _to_tensorboard(callback.tb_writer, step, grid, rows)


def _columns(rows: Sequence[dict[str, Any]]) -> list[str]:
    return list(dict.fromkeys(name for row in rows for name in row))


def _to_wandb(wandb: Any, step: int, grid: Path | None, rows: Sequence[dict[str, Any]]) -> None:
    shown: dict[str, Any] = {"train/global_step": step}
    if grid is not None:
        shown["samples/grid"] = wandb.Image(str(grid))
    if rows:
        names = _columns(rows)
        shown["samples/scores"] = wandb.Table(columns=names, data=[[row.get(name) for name in names] for row in rows])
    if len(shown) > 1:
        wandb.log(shown)


def _to_tensorboard(writer: Any, step: int, grid: Path | None, rows: Sequence[dict[str, Any]]) -> None:
    import numpy as np
    from PIL import Image

    if grid is not None:
        writer.add_image("samples/grid", np.asarray(Image.open(grid)), step, dataformats="HWC")
    if rows:
        names = _columns(rows)
        cells = [[str(row.get(name, "")).replace("|", "\\|") for name in names] for row in rows]
        lines = ["| " + " | ".join(line) + " |" for line in [names, ["---"] * len(names), *cells]]
        writer.add_text("samples/scores", "\n".join(lines), step)
