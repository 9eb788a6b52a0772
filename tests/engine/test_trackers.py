"""Trackers get what people look at: pictures and tables; and a resumed run is one run there."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from launched import ROOT
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

REWARD = """from PIL import ImageStat


def score(images, prompts, step):
    bright = [ImageStat.Stat(image.convert("L")).mean[0] / 255 for image in images]
    return bright, {"updates": step[0], "twice": [2 * value for value in bright]}
"""


def run(folder: Path, tracker: str, **words) -> None:
    """GRPO on two prompts in a process of its own, as Weights & Biases keeps one run to a process."""
    (folder / "bright.py").write_text(REWARD)
    (folder / "prompts.txt").write_text("a circle\ntwo squares\n")
    settings = {
        "dataset_name": "prompts.txt", "eval_dataset_name": "prompts.txt", "rewards": "./bright.py:score", "output_dir": "out",
        "height": 32, "width": 32, "num_inference_steps": 2, "num_generations": 2, "generation_batch_size": 4,
        "sde_window_size": 1, "per_device_train_batch_size": 4, "lora_r": 2, "use_cpu": True, "report_to": tracker,
        "eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1, "max_steps": 1,
    } | words  # fmt: skip
    command = [sys.executable, "-m", "align.grpo", *(str(w) for n, v in settings.items() for w in (f"--{n}", v))]
    environment = {**os.environ, "WANDB_MODE": "offline", "WANDB_DIR": str(folder), "PYTHONPATH": str(ROOT)}
    environment.pop("WANDB_DISABLED", None)
    ended = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr[-3000:]


def test_wandb_goes_on_in_the_same_run_and_has_the_grid_and_the_table(tmp_path):
    """A resumed run began a second one, and the pictures stayed on the training machine."""
    run(tmp_path, "wandb")
    run(tmp_path, "wandb", max_steps=2, resume_from_checkpoint=True)
    folders = sorted((tmp_path / "wandb").glob("offline-run-*"))
    (identity,) = {folder.name.rpartition("-")[2] for folder in folders}
    assert len(folders) == 2 and identity == (tmp_path / "out" / "wandb_run_id").read_text()
    for folder in folders:
        media = {path.suffix for path in folder.glob("files/media/**/*") if path.is_file()}
        assert {".png", ".json"} <= media
    (table,) = folders[0].glob("files/media/table/samples/*.json")
    content = json.loads(table.read_text())
    assert {"prompt", "reward", "score"} <= set(content["columns"]) and len(content["data"]) == 2


def test_tensorboard_has_the_grid_the_table_and_what_rewards_log(tmp_path):
    run(tmp_path, "tensorboard", max_steps=2)
    (events,) = (tmp_path / "out").rglob("events.out.*")
    seen = EventAccumulator(str(events), size_guidance={"images": 0, "tensors": 0, "scalars": 0}).Reload()
    assert [event.step for event in seen.Images("samples/grid")] == [1, 2]
    assert "samples/scores/text_summary" in seen.Tags()["tensors"]
    assert [event.value for event in seen.Scalars("train/rewards/score/updates")] == [0.0, 1.0]
    doubled, plain = (
        [event.value for event in seen.Scalars(f"train/rewards/score/{name}")] for name in ("twice", "mean")
    )
    assert doubled == pytest.approx([2 * value for value in plain], abs=1e-6)


def test_the_id_of_a_run_does_not_stay_in_the_environment(tmp_path, monkeypatch):
    from align.engine.settings import FlowConfig
    from align.engine.trackers import named_run

    monkeypatch.delenv("WANDB_RUN_ID", raising=False)
    args = FlowConfig(str(tmp_path), use_cpu=True, report_to="none")
    args.report_to = ["wandb"]
    with named_run(args, resumed=False):
        first = os.environ["WANDB_RUN_ID"]
    assert "WANDB_RUN_ID" not in os.environ
    with named_run(args, resumed=True):
        assert os.environ["WANDB_RUN_ID"] == first and os.environ["WANDB_RESUME"] == "allow"
    with named_run(args, resumed=False):
        assert os.environ["WANDB_RUN_ID"] != first
    monkeypatch.setenv("WANDB_RUN_ID", "mine")
    with named_run(args, resumed=False):
        assert os.environ["WANDB_RUN_ID"] == "mine"
