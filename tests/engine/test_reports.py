"""What a run leaves to look at: grids, the reward curve, the table of changes, the model card."""

import ast
import json
import math
import re
import warnings
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest
import yaml
from huggingface_hub import ModelCard
from peft import LoraConfig
from PIL import Image

from align.cli.data import DataArguments
from align.engine import reports
from align.grpo import GRPOConfig
from align.models.adapters import LORA_FILE
from align.models.families import outline

RED, BLUE = (220, 30, 30), (30, 60, 220)


def picture(color=RED, size=(64, 64)) -> Image.Image:
    return Image.new("RGB", size, color)


def training_log(evaluated=(0, 4, 8), updates=8) -> list[dict]:
    """A ``trainer_state.json`` log: a training entry for every update, evaluations after some."""
    log = [{"step": step, "loss": 0.0, "reward": step / 10, "reward_std": 0.2} for step in range(1, updates + 1)]
    for step in evaluated:
        held_out = {"eval_reward": step / 8, "eval_reward_se": 0.25, "eval_warm": 0.5, "eval_warm_se": 0.125}
        log.append({"step": step, "eval_num_prompts": 16, **held_out})
    return sorted(log, key=lambda entry: entry["step"])


# --- Grids ---


@pytest.mark.parametrize(("rows", "columns", "tile"), [(1, 1, 128), (3, 2, 128), (8, 4, 32)])
def test_a_grid_holds_one_row_of_tiles_under_each_caption(rows, columns, tile):
    grid = reports.image_grid([[picture()] * columns] * rows, ["a red picture"] * rows, tile=tile)
    assert grid.size == (columns * (tile + 4) + 4, rows * (tile + 16 + 4) + 4)
    pixels = np.asarray(grid)
    for row in range(rows):
        top = 4 + row * (tile + 20)
        assert (pixels[top : top + 16] != 255).any()  # the caption
        for column in range(columns):
            left = 4 + column * (tile + 4)
            assert (pixels[top + 16 : top + 16 + tile, left : left + tile] == RED).all()
    assert (pixels[:, :4] == 255).all() and (pixels[-4:] == 255).all()


def test_a_grid_takes_rows_of_unequal_length_images_of_any_mode_and_long_captions():
    rows = [[picture()], [Image.new("L", (16, 16), 128), Image.new("RGBA", (300, 200), BLUE)]]
    grid = reports.image_grid(rows, ["", "a long caption " * 50], tile=64)
    assert grid.size == (2 * 68 + 4, 2 * 84 + 4) and grid.mode == "RGB"
    assert grid.getpixel((4 + 68 + 32, 4 + 84 + 16 + 32)) == BLUE
    assert grid.getpixel((4 + 68 + 32, 4 + 16 + 32)) == (255, 255, 255)


def test_a_caption_is_needed_for_every_row():
    with pytest.raises(ValueError):
        reports.image_grid([[picture()]] * 2, ["one"])


def test_two_grids_stand_side_by_side(tmp_path):
    picture(RED, (50, 30)).save(tmp_path / "a.png")
    picture(BLUE, (70, 60)).save(tmp_path / "b.png")
    reports.side_by_side(tmp_path / "a.png", tmp_path / "b.png", tmp_path / "both.png")
    with Image.open(tmp_path / "both.png") as both:
        pixels = np.asarray(both)
    assert pixels.shape == (60 + 16, 50 + 70 + 3 * 4, 3)
    assert (pixels[16:46, 4:54] == RED).all() and (pixels[16:76, 58:128] == BLUE).all()
    for left in (4, 58):
        assert (pixels[:16, left : left + 40] < 128).any()  # the words before and after


# --- The log ---


def test_series_are_the_steps_and_values_of_a_key():
    assert reports.series(training_log(), "eval_reward") == ([0, 4, 8], [0.0, 0.5, 1.0])
    assert reports.series(training_log(), "nothing") == ([], [])


@pytest.mark.parametrize(
    "log",
    [
        training_log(),
        training_log(evaluated=(0,), updates=0),
        training_log(evaluated=()),
        [],
        [{"step": 0, "eval_reward": 0.5, "eval_reward_se": math.nan}],
        [{"step": 1, "reward": math.nan}, {"step": 2, "reward": 0.5}],
    ],
    ids=["run", "one evaluation", "no evaluation", "empty", "one prompt", "a rollout without scores"],
)
def test_the_reward_curve_is_a_picture(tmp_path, log):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        reports.reward_curve(log, tmp_path / "curve.png")
    with Image.open(tmp_path / "curve.png") as image:
        assert image.format == "PNG" and min(image.size) > 300
        assert len(image.convert("RGB").getcolors(1 << 20)) > 10


def test_the_reward_curve_shows_the_rewards(tmp_path):
    drawn = []
    for name, log in (("without", []), ("training", training_log(evaluated=())), ("both", training_log())):
        reports.reward_curve(log, tmp_path / f"{name}.png")
        with Image.open(tmp_path / f"{name}.png") as image:
            drawn.append((np.asarray(image.convert("L")) < 250).sum())
    assert drawn[0] < drawn[1] < drawn[2]


def test_legends_stand_beside_the_plots_and_guards_have_a_plot_of_their_own():
    log = training_log()
    for entry in log:
        if "eval_reward" in entry:
            entry |= {
                "eval_full_reward": 0.9,
                "eval_full_reward_se": 0.01,
                "eval_diversity": 1.0,
                "eval_diversity_se": 0.1,
            }
    figure = reports.reward_figure(log, ["full"])
    figure.canvas.draw()
    upper, lower = figure.axes
    shown = [{text.get_text() for text in axis.get_legend().get_texts()} for axis in (upper, lower)]
    assert shown == [{"training reward", "reward", "warm"}, {"full_reward", "diversity"}]
    for axis in (upper, lower):
        assert axis.get_legend().get_window_extent().x0 >= axis.get_window_extent().x1
    plt.close(figure)
    alone = reports.reward_figure(training_log())
    assert len(alone.axes) == 1
    plt.close(alone)


def test_changes_are_the_first_and_last_evaluation_with_their_errors():
    rows = [("reward", 0.0, 0.25, 1.0, 0.25), ("warm", 0.5, 0.125, 0.5, 0.125)]
    assert reports.held_out_changes(training_log()) == rows
    assert reports.held_out_changes(training_log(evaluated=())) == []


def test_a_measure_that_some_evaluations_lack_is_taken_where_it_is():
    log = training_log()
    log.append({"step": 8, "eval_full_word": 0.75, "eval_full_word_se": 0.1})
    log.insert(0, {"step": 0, "eval_full_word": 0.5, "eval_full_word_se": 0.2})
    assert ("full_word", 0.5, 0.2, 0.75, 0.1) in reports.held_out_changes(log)


def test_the_table_of_changes_is_markdown():
    lines = reports.changes_table(training_log()).splitlines()
    assert lines[0] == "| held-out measure | before | after | change |"
    assert lines[2:] == [
        "| reward | 0.000 ± 0.250 | 1.000 ± 0.250 | +1.000 |",
        "| warm | 0.500 ± 0.125 | 0.500 ± 0.125 | +0.000 |",
    ]
    assert len({line.count("|") for line in lines}) == 1


@pytest.mark.parametrize("evaluated", [(8,), (4, 8)])
def test_what_was_not_measured_before_the_first_update_shows_no_change(evaluated):
    log = training_log(evaluated)
    name, before, before_se, after, after_se = reports.held_out_changes(log)[0]
    assert (name, after, after_se) == ("reward", 1.0, 0.25) and math.isnan(before) and math.isnan(before_se)
    assert "| reward | not measured | 1.000 ± 0.250 |  |" in reports.changes_table(log)


def test_a_single_evaluation_before_any_update_is_before_and_after():
    assert "| warm | 0.500 ± 0.125 | 0.500 ± 0.125 | +0.000 |" in reports.changes_table(training_log((0,), 0))


def test_a_run_without_evaluation_has_an_empty_table():
    assert len(reports.changes_table(training_log(evaluated=())).splitlines()) == 2


def scored(step: int, folder: Path, warm: list[float | None]) -> None:
    rows = [{"data": "eval", "row": i, "prompt": "p", "warm": w} for i, w in enumerate(warm)]
    reports.save_scores([*rows, {"data": "eval_full", "row": 0, "prompt": "é", "warm": 1.0}], folder, step)


def test_the_error_of_a_change_is_taken_prompt_by_prompt(tmp_path):
    scored(0, tmp_path, [0.0, 1.0, 0.25, 0.5, None])
    scored(4, tmp_path, [9.0, 9.0, 9.0, 9.0, 9.0])  # in between
    scored(8, tmp_path, [0.5, 1.5, 0.75, 1.5, 0.5])  # changes .5 .5 .5 1: standard deviation .25, over four prompts
    errors = reports.paired_errors(tmp_path)
    assert errors == {"warm": pytest.approx(0.125)}  # one prompt alone (eval_full) has no spread
    table = reports.changes_table(training_log(), errors)
    assert "| warm | 0.500 ± 0.125 | 0.500 ± 0.125 | +0.000 ± 0.125 |" in table
    assert "| reward | 0.000 ± 0.250 | 1.000 ± 0.250 | +1.000 |" in table


def test_without_an_evaluation_before_the_first_update_no_error_of_a_change_is_claimed(tmp_path):
    assert reports.paired_errors(tmp_path) == {}
    scored(4, tmp_path, [0.0, 1.0])
    scored(8, tmp_path, [1.0, 1.0])
    assert reports.paired_errors(tmp_path) == {}


# --- The model card ---


def loading_code(base_model: str, lora: bool) -> str:
    """As the embedded model says it."""
    model = outline("tiny", LoraConfig(r=2) if lora else None)
    return model.loading_code(base_model, "THIS_FOLDER")


def card(**overrides) -> str:
    base, lora = overrides.get("base_model", "Qwen/Qwen-Image"), overrides.get("lora", True)
    args = GRPOConfig(output_dir="runs/my-run", use_cpu=True, hub_token="hf_aVerySecretToken", num_generations=8)
    settings = {
        "title": "my-run",
        "algorithm": "GRPO",
        "base_model": "Qwen/Qwen-Image",
        "base_on_hub": base != "tiny",
        "loading_code": loading_code(base, lora),
        "lora": True,
        "settings": reports.changed_settings(args),
        "data": "tiny/background",
        "account": ["training data: 3", "left out, .heic is not read: 1 (my [odd](x).heic)"],
        "rewards": ["warm_background (weight 1)", "shapes_following (weight 0)"],
        "table": reports.changes_table(training_log()),
        "pictures": ["reward_curve.png", "before_after.png"],
    }
    return reports.model_card(**(settings | overrides))


@pytest.mark.parametrize("lora", [True, False])
def test_the_hub_reads_the_head_of_the_card(lora):
    data = ModelCard(card(lora=lora)).data
    assert (data.library_name, data.base_model) == ("diffusers", "Qwen/Qwen-Image")
    assert {"text-to-image", "flow-align", "grpo"} <= set(data.tags) and ("lora" in data.tags) == lora


@pytest.mark.parametrize("name", ["./my: model", "C:\\models\\x", 'say "hi"', "modèle", "- a", "3", "null"])
def test_any_name_of_a_base_model_survives_the_head(name):
    assert yaml.safe_load(card(base_model=name).split("---\n")[1])["base_model"] == name
    assert ModelCard(card(base_model=name)).data.base_model == name


def test_the_card_holds_result_data_rewards_and_config():
    text = card()
    assert "# my-run" in text and reports.changes_table(training_log()) in text
    assert "Trained on tiny/background." in text
    assert "warm_background (weight 1), shapes_following (weight 0)" in text
    assert "(reward_curve.png)" in text and "(before_after.png)" in text
    settings = json.loads(re.search(r"```json\n(.*?)\n```", text, re.DOTALL)[1])
    assert settings == {"output_dir": "runs/my-run", "use_cpu": True, "num_generations": 8}


def test_the_card_holds_no_secret_of_the_rewards():
    """A card is published with the weights; the entries of its rewards may hold keys."""
    entry = {
        "use": "vlm_judge",
        "args": {"model": "m", "api_key": "hunter2"},
        "environment": {"python": "/venv", "variables": {"JUDGE": "hunter2"}},
    }
    data = DataArguments(dataset_name="https://user:hunter2@host/prompts.jsonl", rewards=[entry, "ocr"])
    text = card(settings=reports.changed_settings(data), data=data.dataset_name)
    assert "hunter2" not in text and '"use": "vlm_judge"' in text and '"python": "/venv"' in text and '"ocr"' in text


def test_the_card_of_a_model_from_the_package_does_not_pass_it_for_a_hub_name():
    text = card(base_model="tiny", pictures=[])
    assert "from_pretrained(CHECKPOINT" in text and "from align.tiny import CHECKPOINT" in text
    assert ModelCard(text).data.base_model is None
    assert ".png" not in text


@pytest.mark.parametrize("lora", [True, False])
def test_the_loading_code_is_python_that_names_the_base_model(lora):
    code = re.search(r"```python\n(.*?)\n```", card(lora=lora), re.DOTALL)[1]
    calls = [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Call)]
    loaded = {ast.unparse(call.func): ast.literal_eval(call.args[0]) for call in calls}
    assert loaded["QwenImagePipeline.from_pretrained"] == "Qwen/Qwen-Image"
    assert ("load_lora_weights" in code) == lora and ('subfolder="transformer"' in code) == (not lora)


@pytest.mark.parametrize("lora", [True, False])
def test_the_card_of_a_lora_says_how_each_tool_loads_it(lora):
    """Half of a LoRA's users have no diffusers, and would guess at its strength."""
    text = card(lora=lora)
    for words in ("ComfyUI: put the file into `models/loras`", "pipe.load_lora(pipe.dit, ", "--target default"):
        assert (words in text) == lora
    assert text.count(LORA_FILE) == 2 * lora


def test_the_card_contains_no_secret(monkeypatch):
    for name in ("HF_TOKEN", "WANDB_API_KEY"):
        monkeypatch.setenv(name, f"the-value-of-{name}")
    text = card()
    assert "hf_aVerySecretToken" not in text and "the-value-of" not in text
