"""The command ``flow-align``, and the wheel that brings it: in an environment that has never seen the repository."""

import os
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

from align.__main__ import COMMANDS, main
from align.cli.configs import CONFIGS, shipped

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


@pytest.mark.parametrize("words", [[], ["--help"], ["-h"]])
def test_without_a_command_it_lists_them(words, capsys):
    assert main(words) == 0
    text = capsys.readouterr().out
    assert all(f"  {name}" in text for name in COMMANDS) and "flow-align grpo --config tiny/grpo" in text


def test_an_unknown_command_names_the_nearest(capsys):
    assert main(["gpro"]) == 2
    assert "unknown command 'gpro'. Did you mean 'grpo'?" in capsys.readouterr().err


def test_configs_are_listed_with_a_line_each_and_found_by_name(capsys):
    assert main(["configs"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(shipped()) and all(len(line.split()) > 3 for line in lines)
    assert main(["configs", "accelerate/ddp"]) == 0
    assert capsys.readouterr().out.strip() == str(CONFIGS / "accelerate" / "ddp.yaml")
    assert main(["configs", "tiny/gpro"]) == 2
    assert "Did you mean 'tiny/grpo'?" in capsys.readouterr().err


def test_a_reader_that_has_seen_enough_ends_a_listing_in_silence():
    listing = subprocess.Popen(
        [sys.executable, "-u", "-m", "align", "configs"], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    listing.stdout.readline()
    listing.stdout.close()
    assert listing.wait(60) == 0 and listing.stderr.read() == b""


@pytest.mark.parametrize("words", [["grpo", "--no_such"], ["dpo-online", "--no_such"], ["sft", "--config", "tiny/sff"]])
def test_doors_are_run_by_name(words):
    with pytest.raises(SystemExit, match=r"error: (unknown option|config file tiny/sff does not exist)"):
        main(words)


@pytest.mark.parametrize("command", ["rewards", "rewards score", "rewards serve", "inspect"])
def test_help_begins_with_the_command_that_is_typed(command, capsys):
    with pytest.raises(SystemExit):
        main([*command.split(), "--help"])
    assert capsys.readouterr().out.startswith(f"usage: flow-align {command} ")


def test_rewards_and_data_have_their_commands(capsys):
    main(["rewards", "list"])
    assert "brightness" in capsys.readouterr().out
    assert main(["inspect", "no-such-folder"]) == 1


def test_every_package_is_named_for_the_wheel():
    found = {
        ".".join(file.parent.relative_to(ROOT).parts)
        for top in ("align", "rewards", "preference_data")
        for file in (ROOT / top).rglob("__init__.py")
    }
    assert set(PROJECT["tool"]["setuptools"]["packages"]) == found | {"align.configs"}


def test_the_wheel_alone_trains_from_an_empty_folder(tmp_path):
    """No editable install, no checkout on the path: the wheel's own files, and the packages of this environment."""
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", tmp_path, ROOT]
    subprocess.run(build, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("flow_align-*.whl")
    site = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    (entry,) = site.glob("*.dist-info/entry_points.txt")
    assert "flow-align = align.__main__:main" in entry.read_text()
    empty = tmp_path / "empty"
    empty.mkdir()
    script = (
        "import sys; from align.__main__ import main; print(main.__code__.co_filename); sys.exit(main(sys.argv[1:]))"
    )
    short = ["--max_steps", "1", "--eval_strategy", "no", "--eval_on_start", "false", "--generation_batch_size", "16",
             "--per_device_train_batch_size", "16", "--gradient_accumulation_steps", "1", "--use_cpu", "true",
             "--guard_dataset_names", "tiny/counts", "--num_generations_eval", "1"]  # fmt: skip
    environment = os.environ | {"PYTHONPATH": str(site), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", script, "grpo", "--config", "tiny/grpo", *short]
    done = subprocess.run(command, cwd=empty, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.startswith(str(site)) and "1 updates in" in done.stdout
    assert (empty / "runs" / "tiny-grpo" / "pytorch_lora_weights.safetensors").is_file()
