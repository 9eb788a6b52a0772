"""``flow-align rewards``: the listing, and scores from the shell."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from services import ODD, ROOT, Service

from rewards import BUILTINS, load_rewards, score


def run(*words: str, folder: Path = ROOT) -> subprocess.CompletedProcess:
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from rewards.__main__ import main; main()"
    command = [sys.executable, "-c", code, *words]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120)


@pytest.fixture
def pictures(tmp_path):
    """Three pictures, and a prompt beside each."""
    for n in range(3):
        Image.effect_noise((20 + n, 20), 50).convert("RGB").save(tmp_path / f"p{n}.png")
        (tmp_path / f"p{n}.txt").write_text(f"picture {n}\n")
    return tmp_path


def images(folder: Path) -> list[Image.Image]:
    return [Image.open(folder / f"p{n}.png").convert("RGB") for n in range(3)]


def test_every_built_in_is_listed_with_what_it_needs():
    ended = subprocess.run([sys.executable, "-m", "rewards", "list"], cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 0
    for name, builtin in BUILTINS.items():
        assert f"{name}: {builtin.about}" in ended.stdout
    rows = {row["name"]: row for row in json.loads(run("list", "--json").stdout)}
    assert list(rows) == list(BUILTINS)
    assert rows["shapes_exact"]["runs"] == "yes" and "spec" in rows["shapes_exact"]["columns"]


def test_the_list_into_a_pipe_that_is_closed_ends_in_silence():
    read, write = os.pipe()
    os.close(read)
    ended = subprocess.run([sys.executable, "-m", "rewards", "list"], cwd=ROOT, stdout=write, stderr=subprocess.PIPE)
    os.close(write)
    assert ended.returncode == 0 and b"Broken pipe" not in ended.stderr


def test_a_built_in_whose_package_is_missing_cannot_run_here(monkeypatch, capsys):
    import rewards.__main__ as cli
    from rewards.table import Builtin

    needy = Builtin("no_such_module:score", "something", packages=("no_such_package",), extra="ocr")
    monkeypatch.setattr(cli, "BUILTINS", {"needy": needy})
    cli.main(["list"])
    shown = capsys.readouterr().out
    assert "can run here: no: no_such_package not installed" in shown and 'pip install "flow-align[ocr]"' in shown


def test_scores_are_those_of_the_library(pictures):
    ended = run(
        "score", "--use", f"{ODD}:told", "--use", f"{ODD}:patient", "--images", "p*.png", "--json", folder=pictures
    )
    rows = [json.loads(line) for line in ended.stdout.splitlines() if line.startswith("{")]
    prompts = [f"picture {n}" for n in range(3)]
    table, _ = score(load_rewards([f"{ODD}:told", f"{ODD}:patient"]), images(pictures), prompts, {})
    assert [row["told"] for row in rows] == table[0] and [row["patient"] for row in rows] == table[1]
    assert [(row["image"], row["prompt"]) for row in rows] == [(f"p{n}.png", f"picture {n}") for n in range(3)]


def test_a_prompt_and_columns_are_for_all_images_and_the_table_is_aligned(pictures):
    words = (
        "score",
        "--use",
        f"{ODD}:needing",
        "--prompt",
        "x",
        "--column",
        "target=2.5",
        "--column",
        "note=plain text",
    )
    ended = run(*words, "--images", "p0.png", "p1.png", folder=pictures)
    assert ended.stdout.splitlines() == ["image   needing", "p0.png      2.5", "p1.png      2.5"]


def test_a_config_may_name_a_service(pictures):
    service = Service("--use", f"{ODD}:told")
    (pictures / "run.yaml").write_text(f"rewards: [{{use: told, endpoints: '{service.url}'}}]\n")
    ended = run("score", "--config", "run.yaml", "--images", "p0.png", "--json", folder=pictures)
    service.end()
    ((right,), _) = score(load_rewards([f"{ODD}:told"]), images(pictures)[:1], ["picture 0"], {})
    assert json.loads(ended.stdout)["told"] == right[0]


def test_images_are_scored_as_they_are_shown(tmp_path):
    """Upright, on white, and 16 bits as 8: as the training data are opened."""
    turned = Image.Exif()
    turned[0x0112] = 6
    Image.new("RGB", (100, 50)).save(tmp_path / "turned.jpg", exif=turned)
    Image.new("RGBA", (40, 40), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    Image.fromarray(np.full((40, 40), 40000, np.uint16)).save(tmp_path / "deep.png")
    (tmp_path / "size.py").write_text("def score(images, prompts):\n    return [i.width / i.height for i in images]\n")
    words = ("--use", "brightness", "--use", "./size.py:score", "--images", "*.*g", "--prompt", "x", "--json")
    rows = [json.loads(line) for line in run("score", *words, folder=tmp_path).stdout.splitlines()]
    found = {row["image"]: (round(row["brightness"], 3), row["score"]) for row in rows}
    assert found == {"clear.png": (1.0, 1.0), "deep.png": (round(155 / 255, 3), 1.0), "turned.jpg": (0.0, 0.5)}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--use", "shapes_exat", "--images", "p0.png"), "Did you mean 'shapes_exact'?"),
        (("--use", "shapes_exact", "--images", "p0.png"), "needs the data column 'spec'"),
        (("--use", "grounded", "--images", "q*.png"), "no image matches q*.png"),
        (("--use", "grounded", "--images", "alone.png"), "alone.png has no prompt: pass --prompt"),
        (
            ("--use", "grounded", "--images", "broken.png", "--prompt", "x"),
            "the image broken.png is broken: cannot identify it as PNG",
        ),
        (
            ("--use", "grounded", "--images", "huge.png", "--prompt", "x"),
            "the image huge.png is broken: Image size",
        ),
        (("--use", "grounded", "--images", "p0.png", "--column", "x"), "give NAME=VALUE"),
        (("--images", "p0.png"), "no reward was given"),
        (("--config", "p0.txt", "--images", "p0.png"), "has no list `rewards:`"),
        (("--use", f"{ODD}:told", "--images", "p0.png", "--prompt", "raise"), "reward 'told' failed: ValueError"),
    ],
)
def test_mistakes_are_sentences(pictures, words, message):
    (pictures / "broken.png").write_text("x")
    Image.new("1", (20_000, 10_000)).save(pictures / "huge.png")
    Image.new("RGB", (5, 5)).save(pictures / "alone.png")
    ended = run("score", *words, folder=pictures)
    assert ended.returncode == 1 and message in ended.stderr and "Traceback" not in ended.stderr
