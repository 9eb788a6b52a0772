"""Sampling without rewards: images to look at, the same as with rewards, however the run was stopped and shared out."""

import json
import shutil

import datasets
import numpy as np
import pytest
from datasets import Dataset
from peft import LoraConfig
from PIL import Image
from safetensors.torch import load_file, save_file

from align import generate
from align.generate import GenerateArguments, open_writer
from align.models.contract import Request
from align.models.families import load_model
from align.sampling.noise import ImageKey
from align.sampling.rollout import SamplingPlan, rollout
from preference_data.readers import read_captioned, read_preferences

PROMPTS = ["a red circle", "two blue squares", "das Wort \u00c4PFEL", "a green cross", "a circle"]
REWARD = "def score(images, prompts):\n    return [float(n) for n, _ in enumerate(images)]\n"


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """The user stands in a folder with prompts, each with a column of its own, and a reward."""
    monkeypatch.chdir(tmp_path)
    rows = [{"prompt": prompt, "kind": number, "image": "elsewhere.png"} for number, prompt in enumerate(PROMPTS)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "my_reward.py").write_text(REWARD)
    return tmp_path


def run(out: str, **overrides) -> None:
    words = {
        "dataset_name": "./prompts.jsonl", "output_dir": out, "height": 64, "width": 64, "num_inference_steps": 2,
        "num_generations": 2, "rollout_batch_size": 4, "use_cpu": True,
    }  # fmt: skip
    generate.main([str(word) for name, value in (words | overrides).items() for word in (f"--{name}", value)])


def files(folder) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_the_images_are_files_and_what_sft_trains_on(folder, capsys, monkeypatch):
    """Without rewards the run ended with `no reward was given`, and there was no other way to look at an adapter."""
    run("out")
    assert "5 prompts x 2 images in " in capsys.readouterr().out
    rows = [json.loads(line) for line in (folder / "out/train/metadata.jsonl").read_text().splitlines()]
    names = [f"{index:06d}-{number}.png" for index in range(5) for number in range(2)]
    assert [row["file_name"] for row in rows] == names
    assert rows[5] == {"file_name": "000002-1.png", "prompt": PROMPTS[2], "kind": 2}
    captioned = list(read_captioned("out"))
    assert [item.prompt for item in captioned] == [prompt for prompt in PROMPTS for _ in range(2)]
    assert all(item.image.open().size == (64, 64) for item in captioned)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "cache")
    stock = datasets.load_dataset("imagefolder", data_dir=str(folder / "out"), split="train")
    assert stock["prompt"] == [item.prompt for item in captioned]


def test_they_are_the_images_that_rewards_would_have_ranked(folder):
    run("plain")
    run("ranked", rewards="./my_reward.py:score")
    ranked = [image.open() for record in read_preferences("ranked") for image in record.images]
    plain = [item.image.open() for item in read_captioned("plain")]
    assert len(plain) == 10 and [a.tobytes() for a in plain] == [b.tobytes() for b in ranked]


@pytest.mark.parametrize("prefix", ["", "base_model.model.", "diffusion_model."])
def test_they_are_those_of_the_adapter_whatever_its_names_begin_with(folder, prefix):
    """They were those of the model without it, and the exit code 0, where the names did not begin with `transformer.`"""
    model = load_model("tiny")
    model.add_lora(LoraConfig(r=2, lora_alpha=2, init_lora_weights=False))
    model.save("lora", {name: p for name, p in model.transformer.named_parameters() if p.requires_grad})
    tensors = load_file("lora/pytorch_lora_weights.safetensors")
    save_file({prefix + key.removeprefix("diffusion_model."): t for key, t in tensors.items()}, "mine.safetensors")
    run("base", max_prompts=1)
    run("adapted", max_prompts=1, adapter="mine.safetensors")
    base, adapted = (item.image.open() for item in (next(iter(read_captioned(name))) for name in ("base", "adapted")))
    row = [Request(PROMPTS[0])]
    key = [ImageKey(0, "generate", 0, 0)]
    expected = rollout(model, row, key, SamplingPlan(64, 64, 2)).images[0]
    assert np.abs(np.asarray(adapted, int) - np.asarray(expected, int)).mean() < 0.1
    assert np.abs(np.asarray(adapted, int) - np.asarray(base, int)).mean() > 1


def test_one_image_of_each_prompt_is_enough_without_rewards_and_not_with_them(folder):
    run("one", num_generations=1)
    assert len(list((folder / "one/train").glob("*.png"))) == 5
    with pytest.raises(SystemExit, match="num_generations must be at least 2 for rewards to rank, found 1"):
        run("ranked", num_generations=1, rewards="./my_reward.py:score")


def test_what_was_stopped_goes_on_to_the_same_files(folder, capsys):
    run("whole")
    run("cut", max_prompts=3)
    (folder / "cut/train/000001-1.png").unlink()  # a crash in the middle of a row, before the metadata was written
    (folder / "cut/train/metadata.jsonl").unlink()
    capsys.readouterr()
    run("cut")
    assert "3 prompts x 2 images in " in capsys.readouterr().out
    assert files(folder / "cut/train") == files(folder / "whole/train")
    run("cut", max_prompts=1)  # what is there beyond the prompts of this run keeps its prompt
    assert [item.prompt for item in read_captioned("cut")] == [prompt for prompt in PROMPTS for _ in range(2)]


def test_two_processes_write_what_one_does(folder):
    run("whole")
    shutil.copytree("whole", "shared")
    for image in (folder / "shared/train").glob("*.png"):
        image.unlink()
    args = GenerateArguments("./prompts.jsonl", output_dir="shared", num_generations=2, height=64, width=64,
                             num_inference_steps=2, rollout_batch_size=4)  # fmt: skip
    data, settings = Dataset.from_json("prompts.jsonl"), json.loads((folder / "shared/train/writer.json").read_text())
    model = load_model("tiny")
    writers = [open_writer(args, data, [], settings, (process, 2)) for process in range(2)]
    written = [generate.generate(model, data, [], args, writer, (i, 2)) for i, writer in enumerate(writers)]
    assert written == [3, 2]
    for writer in reversed(writers):
        writer.close()
    assert files(folder / "shared/train") == files(folder / "whole/train")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 1}, "was written with seed = 0, and this run has 1"),
        ({"rewards": "./my_reward.py:score"}, "out/train was written with "),
        ({"dataset_name": "./others.jsonl"}, "was written with dataset_name = './prompts.jsonl'"),
    ],
)
def test_a_folder_of_other_images_is_not_gone_on_with(folder, change, message):
    (folder / "others.jsonl").write_text('{"prompt": "x"}\n')
    run("out", max_prompts=1)
    with pytest.raises(SystemExit, match=message):
        run("out", **change)


def test_a_file_of_prompts_that_has_changed_is_named(folder):
    run("out", max_prompts=2)
    (folder / "prompts.jsonl").write_text('{"prompt": "a red circle"}\n{"prompt": "another"}\n')
    with pytest.raises(
        SystemExit, match="from other prompts: its row 1 has 'two blue squares', and the data 'another'"
    ):
        run("out")
    with Image.open(folder / "out/train/000001-0.png") as image:
        assert image.info["prompt"] == "two blue squares"
