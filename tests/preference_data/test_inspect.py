"""The command that tells what is in a data set."""

import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from preference_files import encoded, json_lines, noise, parquet, picture, save

from preference_data.images import ImageSource
from preference_data.inspect import Findings, main, sheet

ROOT = Path(__file__).parents[2]


@pytest.fixture
def folder(tmp_path):
    save(tmp_path, "1.png", "2.png", "3.png")
    noise().save(tmp_path / "whole.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:2000])
    return tmp_path


def ranked(folder, *scores) -> Path:
    rows = [
        {"prompt": f"prompt {n % 2}", "images": [{"bytes": encoded(k), "path": None} for k in range(3)], "scores": row}
        for n, row in enumerate(scores)
    ]
    return parquet(folder / "ranked.parquet", rows)


def run(capsys, *arguments) -> tuple[int, str, str]:
    code = main([str(argument) for argument in arguments])
    return (code, *capsys.readouterr())


def test_ranked_lists(folder, capsys):
    file = ranked(folder, [0.0, 1.0, 2.0], [1.0, 1.0, 1.0], [0.0, 0.5, None], [None, None, 1.0])
    code, out, _ = run(capsys, file)
    lines = out.splitlines()
    assert code == 0
    assert lines[:6] == [
        f"{file} (ranked): 4 rows, 4 records, 0 bad rows skipped",
        "pairs (best_worst): 2 pairs (4 records, 1 ties, 1 unscored)",
        "trained on: 2 (4 images, 3 different ones)",
        "captions from a column: 2",
        "trained at (width x height) 1184x880: 2",
        "0.9% of the pixels are cropped away",
    ]
    assert any(line.startswith("4 images are enlarged") for line in lines)
    assert "margin of 2 pairs: 0.5 to 2, median 1.25" in lines
    assert sum(line.startswith("  from ") for line in lines) == 10
    assert lines[-3:] == [
        "image sizes: 8x6 (12)",
        "prompt length in characters: 8 to 8, median 8",
        "prompts: 2 distinct, the most frequent one 2 times",
    ]
    assert (
        "pairs (all_pairs): 4 pairs (4 records, 3 ties, 1 unscored)" in run(capsys, file, "--strategy", "all_pairs")[1]
    )
    assert "1 pairs (4 records, 1 ties, 1 below margin" in run(capsys, file, "--min_margin", "1")[1]


def test_broken_rows_are_listed(folder, capsys):
    row = {"prompt": "p", "chosen": "1.png", "rejected": "2.png", "confidence": 0.75}
    rows = [row, {**row, "chosen": "cut.png"}, {**row, "rejected": "gone.png"}, {**row, "confidence": 3}]
    file = json_lines(folder / "a.jsonl", rows)
    code, out, _ = run(capsys, file)
    assert code == 0 and "4 rows, 1 records, 3 bad rows skipped" in out
    for number, problem in ((1, "cut.png is broken"), (2, "gone.png does not exist"), (3, "3 is out of range")):
        assert any(f"row {number}, column" in line and problem in line for line in out.splitlines())
    assert "confidence of 1 pairs: 0.75 to 0.75" in out
    _, fast, _ = run(capsys, file, "--fast")
    assert "2 records, 2 bad rows" in fast  # the one cut short has a good header


def test_a_record_found_broken_by_its_header_is_counted_as_bad_alone(folder, capsys):
    """Of --fast: it was counted as a record and as a bad row, and its prompt among those that are there."""
    (folder / "text.png").write_text("no image")
    row = {"prompt": "good", "chosen": "1.png", "rejected": "2.png"}
    bad = {"prompt": "bad one", "chosen": "text.png", "rejected": "2.png"}
    _, out, _ = run(capsys, json_lines(folder / "a.jsonl", [row, bad, bad | {"confidence": 0.5}]), "--fast")
    assert "3 rows, 1 records, 2 bad rows skipped" in out
    assert "prompts: 1 distinct" in out and "characters: 4 to 4" in out and "image sizes: 8x6 (2)" in out


def test_a_sheet_has_the_winner_left_and_the_loser_right(folder, capsys):
    row = {"prompt": "a very long prompt " * 9, "chosen": "1.png", "rejected": "2.png"}
    file = json_lines(folder / "a.jsonl", [row, {**row, "prompt": "日本" * 80, "chosen": "3.png"}, row])
    _, out, _ = run(capsys, file, "--sheet", folder / "sheet.png", "--pairs", 3)
    assert f"wrote {folder / 'sheet.png'}: 3 pairs" in out
    drawn = Image.open(folder / "sheet.png")
    first = [drawn.getpixel((8 + 192 // 2 + place * 194, 8 + 192 // 2)) for place in range(2)]
    assert first == [picture(1).getpixel((0, 0)), picture(2).getpixel((0, 0))]
    second = drawn.getpixel((8 + (2 * 192 + 2 + 8) + 96, 104))
    assert second == picture(3).getpixel((0, 0))


def test_a_sheet_shows_pairs_from_all_over_the_data():
    runs = []
    for _ in range(2):
        findings = Findings()
        for number in range(400):
            findings.sample(str(number), [ImageSource.of(picture(number % 200), "here")], 20)
        runs.append([int(prompt) for prompt, _ in findings.in_order()])
    assert runs[0] == runs[1] == sorted(set(runs[0])) and len(runs[0]) == 20
    assert all(any(quarter <= n < quarter + 100 for n in runs[0]) for quarter in (0, 100, 200, 300))
    assert abs(sum(runs[0]) / 20 - 200) < 4 * 400 / 12**0.5 / 20**0.5  # 4 standard errors of a fair draw


@pytest.mark.parametrize("count", [0, 1, 2, 7])
def test_a_sheet_holds_any_number(count):
    drawn = sheet([("p", [picture(1), picture(2)])] * count, pairs=True)
    assert drawn.width <= 3 * 400 and drawn.height >= 8


def test_captioned_images_are_told_from_preferences(folder, capsys):
    (folder / "cut.png").unlink()
    for name in ("1", "2", "3", "whole"):
        (folder / f"{name}.txt").write_text(f"caption {name}")
    code, out, _ = run(capsys, folder, "--sheet", folder.parent / "captioned.png")
    assert code == 0 and "(captioned): 4 rows, 4 records" in out and "pairs (" not in out
    assert "image sizes: 8x6 (3), 64x64 (1)" in out and "4 images" in out
    (folder / "2.txt").unlink()
    _, out, _ = run(capsys, folder, "--format", "captioned")
    assert "3 records, 1 bad rows" in out and "2.png: the image has no caption" in out
    assert "4 records, 0 bad rows" in run(capsys, folder, "--trigger", "sks")[1]


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("gone.jsonl", None, "does not exist"),
        ("a.xlsx", "x", "known endings are"),
        ("a.parquet", "x", "no row can be read"),
        ("a.jsonl", '{"prompt": "p", "chosen": "x"}\n', "needs the column 'rejected'"),
        ("empty.jsonl", "", "holds no rows"),
    ],
)
def test_what_cannot_be_read_is_one_line_and_an_exit_code(tmp_path, capsys, name, content, problem):
    if content is not None:
        (tmp_path / name).write_text(content)
    code, out, err = run(capsys, tmp_path / name)
    assert code == 1 and out == ""
    assert err.startswith(f"cannot inspect {tmp_path / name}: ") and problem in err and err.count("\n") == 1


def votes(folder, *winners) -> str:
    rows = "".join(f"p{n},1.png,2.png,{winner}\n" for n, of in enumerate(winners) for winner in of)
    (folder / "votes.csv").write_text("prompt,image_a,image_b,winner\n" + rows)
    return str(folder / "votes.csv")


def test_pairs_that_are_judged_both_ways_are_counted(folder, capsys):
    """The same pair judged both ways counted as so many pairs, without a word."""
    save(folder, "1.png", "2.png")
    _, out, _ = run(capsys, votes(folder, "AAB", "AA", "B"))
    # Of the first pair's 6 ordered couples of votes 2 agree, of the second's 2 both do.
    assert "pairs judged several times: 2 of 3, 1 of them both ways; two votes on one pair agree in 50%" in out
    assert "judged several times" not in run(capsys, votes(folder, "A", "B"))[1]


def test_prompts_that_two_splits_share_are_counted(folder, capsys):
    save(folder, "1.png", "2.png")
    for split, prompts in (("train", "abc"), ("test", "cdc")):
        rows = [{"prompt": p, "chosen": "1.png", "rejected": "2.png"} for p in prompts]
        json_lines(folder / f"{split}.jsonl", rows)
    assert "prompts of the split test: 2 distinct, 1 of them among these" in run(capsys, folder, "--compare", "test")[1]


def test_nothing_that_can_be_used_is_no_success(folder, capsys):
    (folder / "a.jsonl").write_text('{"prompt": "", "chosen": "x", "rejected": "y"}\n' * 30)
    code, _, error = run(capsys, folder / "a.jsonl")
    assert code == 1 and error


def test_columns_and_the_images_folder_may_be_named(folder, capsys):
    save(folder / "images", "1.png", "2.png")
    file = json_lines(folder / "rows" / "a.jsonl", [{"text": "p", "x": "1.png", "y": "2.png"}])
    words = ("--columns", "chosen=x", "rejected=y", "--image_folder", folder / "images")
    assert "(pairs): 1 rows, 1 records" in run(capsys, file, *words)[1]
    code, _, error = run(capsys, file, "--columns", "chosen")
    assert code == 1 and "expected NAME=COLUMN, such as chosen=image_a, found 'chosen'" in error


def test_it_runs_as_a_module_with_its_progress_on_stderr(folder):
    command = [sys.executable, "-m", "preference_data.inspect", str(ranked(folder, [0.0, 1.0, 2.0]))]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0 and "reading: 1 records" in done.stderr
    assert done.stdout.splitlines()[1] == "pairs (best_worst): 1 pairs (1 records)"
    command[-1] = str(folder / "gone.parquet")
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 1 and done.stdout == "" and "does not exist" in done.stderr
