"""SFT, DPO and the making of preferences on two processes, and stopped by a signal in the middle."""

import json
import math
import re
import shutil
import signal
import sys
import time
from importlib import import_module
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from launched import GLOO, ROOT, TWO, finish, here, start
from safetensors.torch import load_file

from align.tiny import IMAGES
from preference_data.readers import read_preferences

TINY = ROOT / "configs/tiny"
REWARD = ("--rewards", ROOT / "tests/helpers/brightness.py:score")
#: Adam's first steps amplify rounding to the learning rate; sgd does not.
TRAIN = [
    *("--optim", "sgd", "--learning_rate", "1", "--lr_scheduler_type", "constant", "--warmup_steps", "0"),
    *("--max_steps", "3", "--eval_strategy", "no", "--eval_on_start", "false", "--num_inference_steps", "2"),
    *("--num_generations_eval", "1", "--ema_decay", "0.5", "--disable_tqdm", "true", "--report_to", "none"),
]
#: What one process runs, and two after it.
CHAIN = """
import json, sys
from importlib import import_module
for module, words in json.load(open(sys.argv[1])):
    import_module(f"align.{module}").main(words)
"""


def chain(folder: Path, out: str, batch: int) -> list[tuple[str, list[str]]]:
    """Preferences, SFT, and DPO from the SFT's LoRA, with everything written below ``out``; (module, words) of each."""
    out_folder, first = folder / out, folder / "one"
    make = [
        "--config",
        TINY / "generate.yaml",
        "--max_prompts",
        "12",
        "--num_generations",
        "4",
        "--num_inference_steps",
    ]
    make += ["3", "--rollout_batch_size", "8", *REWARD, "--output_dir", out_folder / "pairs", "--use_cpu", "true"]
    common = [*TRAIN, *REWARD, *GLOO[:2], "--cache_dir", out_folder / "cache", "--per_device_train_batch_size", batch]
    common += ["--eval_prompts_name", folder / "prompts.txt"]
    style = ["--config", TINY / "sft_style.yaml", *common, "--dataset_name", folder / "data", "--on_bad_row", "skip"]
    style += ["--eval_dataset_name", folder / "data"]
    dpo = ["--config", TINY / "dpo.yaml", *common, "--dataset_name", first / "pairs", "--eval_dataset_name"]
    dpo += [first / "pairs/train", "--adapter", first / "sft", "--guard_dataset_names", folder / "guard.txt"]
    if batch < 16:
        style, dpo = [*style, *GLOO], [*dpo, *GLOO]
    runs = [
        ("generate", make),
        ("sft", [*style, "--output_dir", out_folder / "sft"]),
        ("dpo", [*dpo, "--output_dir", out_folder / "dpo"]),
    ]
    return [(module, [str(word) for word in words]) for module, words in runs]


def some_images(folder: Path) -> Path:
    """A training and a held-out split of few images, of which number 3 is cut short: the second process reads it."""
    for split, count in (("train", 41), ("test", 7)):
        (folder / split).mkdir(parents=True)
        rows = (IMAGES / "grounded/train/metadata.jsonl").read_text().splitlines(keepends=True)[:count]
        (folder / split / "metadata.jsonl").write_text("".join(rows))
        for row in rows:
            name = json.loads(row)["file_name"]
            shutil.copy(IMAGES / "grounded/train" / name, folder / split / name)
    whole = (folder / "train/003.png").read_bytes()
    (folder / "train/003.png").write_bytes(whole[:150])
    return folder


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """The folder in which one process ran the chain, and then two, whose last run stops at the bad row (see two.log)."""
    folder = tmp_path_factory.mktemp("both")
    some_images(folder / "data")
    for name in ("prompts", "guard"):  # an odd number, which two processes cannot share evenly
        (folder / f"{name}.txt").write_text("a circle\na red square\ntwo crosses\n")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in the processes: how a sum is split decides its last bits
    try:
        for module, words in chain(folder, "one", 16):
            import_module(f"align.{module}").main(words)
    finally:
        torch.set_num_threads(threads)
    (folder / "chain.py").write_text(CHAIN)
    _, words = chain(folder, "broken", 8)[1]
    runs = [*chain(folder, "two", 8), ("sft", [*words, "--on_bad_row", "error"])]
    (folder / "two.json").write_text(json.dumps(runs))
    process = start(folder, *TWO, folder / "chain.py", folder / "two.json")
    output, _ = process.communicate(timeout=300)
    assert process.returncode != 0, output  # so the last of them ends
    (folder / "two.log").write_text(output)
    return folder


# --- Two processes are as one ---


@pytest.mark.parametrize("algorithm", ["sft", "dpo"])
def test_two_processes_train_as_one(both, algorithm):
    one, two = (
        json.loads((both / out / algorithm / "trainer_state.json").read_text())["log_history"] for out in ("one", "two")
    )
    figures = [
        {
            k: v
            for entry in log
            for k, v in entry.items()
            if not any(word in k for word in ("seconds", "runtime", "per_", "memory"))
        }
        for log in (one, two)
    ]
    assert [entry["loss"] for entry in one if "loss" in entry] == pytest.approx(
        [entry["loss"] for entry in two if "loss" in entry], abs=1e-6
    )
    assert figures[0] == pytest.approx(figures[1], abs=1e-5)  # among them all that was held out
    assert "eval_loss" in figures[0] and "eval_score" in figures[0]
    weights = [load_file(both / out / algorithm / "pytorch_lora_weights.safetensors") for out in ("one", "two")]
    assert max((weights[0][key] - weights[1][key]).abs().max().item() for key in weights[0]) < 1e-6
    if algorithm == "dpo":  # it started from the style's
        first = load_file(both / "one/sft/pytorch_lora_weights.safetensors")
        assert max((weights[0][key] - first[key]).abs().max().item() for key in first) > 1e-3
        assert one[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
        assert "eval_guard_score" in figures[0]


def test_two_processes_fill_one_empty_cache_at_a_time(both):
    one, two = ({f.name: f.read_bytes() for f in (both / out / "cache").rglob("*.*")} for out in ("one", "two"))
    assert len(one) > 60 and one == two  # nothing half written among them


def test_a_bad_row_that_one_process_reads_is_left_out_by_both(both):
    log = (both / "two.log").read_text()
    assert log.count("left out, it cannot be used: 1 (") == 1  # said by the main process alone
    assert log.count("training data: 40\n") == 1


def rows_of(folder: Path) -> list[dict]:
    return sorted((row for file in folder.glob("*.parquet") for row in pq.read_table(file).to_pylist()), key=str)


def test_two_processes_make_the_preferences_of_one(both):
    one, two = (rows_of(both / out / "pairs/train") for out in ("one", "two"))
    assert len(one) == 12 and len(list(read_preferences(both / "two/pairs"))) == 12
    assert one == two  # the images' bytes, their scores, every column
    assert len(list((both / "two/pairs/train").glob("part-0000?-of-00002-*"))) == 2


def test_a_broken_image_that_one_process_reads_ends_both(both):
    problem = (
        r"error: .*/metadata.jsonl, row 3, column 'image': the image .*003.png is broken: .* \(1 rows of 41 are bad"
    )
    assert re.search(problem, (both / "two.log").read_text())  # by either process: none waits for the other
    assert not (both / "broken/sft/README.md").exists()


# --- A signal in the middle ---


#: Scores as the helper does, but its second call in a process waits to be let go on.
GATED = """
import time
from pathlib import Path
calls = 0

def score(images, prompts):
    global calls
    calls += 1
    if calls == 2:
        Path("waiting").touch()
        while not Path("go").exists():
            time.sleep(0.01)
    return plain(images, prompts)
"""


def test_a_signal_keeps_the_rows_and_the_same_command_goes_on(both, tmp_path):
    plain = (ROOT / "tests/helpers/brightness.py").read_text().replace("def score", "def plain")
    (tmp_path / "gated.py").write_text(plain + GATED)
    _, words = chain(both, "undisturbed", 16)[0]
    command = [sys.executable, ROOT / "align/generate.py", *words, "--output_dir", "cut", "--prompts_per_file", "3"]
    command += ["--rewards", "./gated.py:score"]
    left = 12
    for number in (signal.SIGTERM, signal.SIGINT):  # while the second batch of two prompts is scored
        for name in ("waiting", "go"):
            (tmp_path / name).unlink(missing_ok=True)
        process = start(tmp_path, *command)
        while process.poll() is None and not (tmp_path / "waiting").exists():
            time.sleep(0.02)
        process.send_signal(number)
        (tmp_path / "go").touch()
        output = finish(process)
        assert f"{number.name}: finishing this batch, then writing what there is." in output
        before = left
        said = re.search(r"interrupted; go on with the same command: (\d+) prompts are left", output)
        left = int(said[1]) if said else 0
        assert before - left in (4, 6)  # the next batch may have been begun meanwhile, and is then finished
        assert len(rows_of(tmp_path / "cut/train")) == 12 - left  # of which the last ones fill no file
    output = here(tmp_path, *command[1:])
    assert f"{left} prompts x 4 images in" in output and f"{12 - left} prompts were there already" in output
    assert "interrupted" not in output
    assert rows_of(tmp_path / "cut/train") == rows_of(both / "one/pairs/train")
