"""The native HPSv2 and ImageReward against their PyPI packages, on shared random weights of the full size."""

import contextlib
import importlib
import inspect
import json
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from reward_checkpoints import write_bert_tokenizer

from rewards import load_rewards, score
from rewards.learned.packages import FACTORIES, package_spec
from rewards.remote.environments import environment_python

ROOT = Path(__file__).parents[3]
PROMPTS = [
    "a red cat sits on the table",
    "Photo of a DOG, 黄色 hat &amp;amp; caf\u00c3\u00a9",
    "The sign says “HELLO-World” 3.14!! it's  😀",
    "a very long prompt about a cat " * 20,
    "",
]


def test_the_spec_of_a_package_names_its_factory_and_its_requirements():
    spec = package_spec("hpsv2", {"backend": "package", "version": "v2.0", "device": "cpu"})
    assert spec["use"] == "rewards.learned.package_hpsv2:hpsv2" and spec["args"] == {"version": "v2.0", "device": "cpu"}
    for name in FACTORIES:
        file = Path(package_spec(name, {})["environment"]["requirements"])
        assert {"torch", "torchvision", "transformers"} <= {
            line.partition("==")[0] for line in file.read_text().split()
        }
    with pytest.raises(ValueError, match=r"'ocr' has no backend 'package'\. Rewards with one: hpsv2, imagereward"):
        package_spec("ocr", {})
    with pytest.raises(
        ValueError, match=r"'package' of hpsv2 takes no arg 'batch_size'\. It takes: version, checkpoint"
    ):
        package_spec("hpsv2", {"batch_size": 4})
    with pytest.raises(ValueError, match=r"'package' of imagereward takes no arg 'dtype'"):
        load_rewards([{"use": "imagereward", "args": {"backend": "package", "dtype": "bfloat16"}}])


@pytest.mark.parametrize("name", FACTORIES)
def test_the_args_a_package_is_said_to_take_are_its_factorys(name):
    use, taken = FACTORIES[name]
    module, _, attribute = use.partition(":")
    assert tuple(inspect.signature(getattr(importlib.import_module(module), attribute)).parameters) == taken


def pictures() -> list[Image.Image]:
    noise = np.random.default_rng(0)
    images = []
    for width, height in [(512, 512), (300, 260), (224, 224), (640, 201), (97, 333)]:
        coarse = noise.integers(0, 256, (height // 16 + 2, width // 16 + 2, 3), dtype=np.uint8)
        images.append(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))
    return images


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(FACTORIES))
def test_native_and_package_give_the_same_scores(name, tmp_path):
    """The package runs where a run has it: in its environment, made from our requirements, behind a worker's pipe."""
    write_bert_tokenizer(tmp_path)
    python = environment_python(name, package_spec(name, {})["environment"])
    script, variables = ROOT / "tests" / "helpers" / "package_weights.py", os.environ | {"PYTHONPATH": str(ROOT)}
    subprocess.run([python, script, name, tmp_path], check=True, env=variables, cwd=tmp_path)
    args = json.loads((tmp_path / "args.json").read_text()) | {"device": "cpu"}
    (package,) = load_rewards([{"use": name, "args": args | {"backend": "package"}}])
    here = {"checkpoint": str(tmp_path), "tokenizer": str(tmp_path), "batch_size": 2, "device": "cpu"}
    (native,) = load_rewards([{"use": name, "args": here}])
    with contextlib.closing(package):
        (ours, theirs), failures = score([native, package], pictures(), PROMPTS, {})
    assert not failures and (package.name, package.columns) == (name, native.columns)
    print(name, "largest difference", max(abs(a - b) for a, b in zip(ours, theirs, strict=True)), theirs)
    assert np.std(theirs) > 0.003  # the pairs are told apart
    assert ours == pytest.approx(theirs, abs=1e-5)
