"""What is said of a checkpoint that is not here, does not fit, or would run code; and the formats that serve."""

import os
import sys
from pathlib import Path

import pytest
import torch
from reward_checkpoints import PICTURES, PROMPTS, write_clip, write_clip_tokenizer, write_head
from safetensors.torch import load_file, save_file

from rewards import BUILTINS, load_rewards
from rewards.learned.packages import package_checkpoint
from rewards.learned.weight_files import read_safetensors
from rewards.registry import _run_by_package

NAMES = ["hpsv2", "imagereward", "pickscore", "clipscore", "aesthetic"]


@pytest.mark.parametrize("name", NAMES)
def test_a_checkpoint_that_is_not_here_says_what_to_get_and_where_to_put_it(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    with pytest.raises(FileNotFoundError) as error:
        load_rewards([name])
    first, _, file = (BUILTINS[name].checkpoints[1 if name == "pickscore" else 0]).partition(":")
    get = f"hf download {first} {file} " if file else f"hf download {first} --include "
    assert f"reward {name!r} needs" in str(error.value) and get in str(error.value)
    place = f"{Path(first).name}/{file}" if file else Path(first).name
    assert f"--local-dir {Path(first).name}" in str(error.value) and f": {place}}}`" in str(error.value)


BAD = [
    ("hpsv2", {"checkpoint": "none.pt"}, FileNotFoundError, ["checkpoint 'none.pt' is not a file", "owner/name:file"]),
    ("hpsv2", {"checkpoint": "clip"}, FileNotFoundError, ["is a folder without HPS_v2.1_compressed.pt", "merges.txt"]),
    ("hpsv2", {"tokenizer": "nowhere"}, FileNotFoundError, ["tokenizer 'nowhere' is not a folder"]),
    ("hpsv2", {"version": "v3"}, ValueError, ["unknown version 'v3'", "v2.0, v2.1"]),
    ("hpsv2", {"backend": "onnx"}, ValueError, ["unknown backend 'onnx' of hpsv2", "native, package"]),
    (
        "hpsv2",
        {"checkpoint": "ImageReward.pt"},
        ValueError,
        ["not a checkpoint of the reward 'hpsv2'", "missing", "blip."],
    ),
    ("hpsv2", {"checkpoint": "short.pt"}, ValueError, ["missing: text_model.encoder.layers.1.layer_norm1.bias"]),
    ("hpsv2", {"checkpoint": "long.pt"}, ValueError, ["unexpected: visual.extra.weight"]),
    (
        "hpsv2",
        {"checkpoint": "shape.pt"},
        ValueError,
        ["of another shape: visual_projection.weight (9, 160) for (20, 160)"],
    ),
    ("hpsv2", {"checkpoint": "text.pt"}, ValueError, ["text.pt was refused", "allow_pickle: true"]),
    ("hpsv2", {"checkpoint": "pointer.pt"}, ValueError, ["pointer.pt is a git-lfs pointer"]),
    ("hpsv2", {"checkpoint": "list.pt"}, ValueError, ["list.pt contains a list, not tensors by name"]),
    ("hpsv2", {"checkpoint": "cut.pt"}, ValueError, ["cut.pt is not a checkpoint that torch can read"]),
    ("hpsv2", {"tokenizer": "bigger"}, ValueError, ["they do not belong together"]),
    (
        "imagereward",
        {"checkpoint": "HPS_v2.1_compressed.pt"},
        ValueError,
        ["of the reward 'imagereward'", "missing: blip."],
    ),
    ("imagereward", {"dtype": "float23"}, ValueError, ["unknown dtype 'float23'. Did you mean 'float32'?"]),
    ("clipscore", {"checkpoint": "bert"}, FileNotFoundError, ["bert has no config (config.json)"]),
    ("clipscore", {"checkpoint": "half"}, ValueError, ["half is not a checkpoint", "missing: text_projection.weight"]),
    ("clipscore", {"checkpoint": "other"}, ValueError, ["other is not a checkpoint", "of another shape"]),
    ("clipscore", {"batch_size": 0}, ValueError, ["batch_size must be a positive integer, found 0"]),
    ("clipscore", {"device": "cuda:77"}, ValueError, ["device 'cuda:77' is not available here"]),
    ("clipscore", {"offload": "no"}, ValueError, ["offload must be true or false"]),
    ("pickscore", {"divide_by": 0}, ValueError, ["divide_by must be a positive number"]),
    ("aesthetic", {"head": "ImageReward.pt"}, ValueError, ["of the reward 'aesthetic'", "missing: layers.0.weight"]),
    ("aesthetic", {"head": "wide.pth"}, ValueError, ["needs embeddings of width 21", "gives 20"]),
]


@pytest.fixture(scope="module")
def broken(world) -> Path:
    """Files that are almost checkpoints."""
    folder = world.folder
    state = torch.load(folder / "HPS_v2.1_compressed.pt", weights_only=True)["state_dict"]
    lost = "transformer.resblocks.1.ln_1.bias"
    torch.save({key: value for key, value in state.items() if key != lost}, folder / "short.pt")
    torch.save({**state, "visual.extra.weight": torch.zeros(1)}, folder / "long.pt")
    torch.save({**state, "visual.proj": torch.zeros(160, 9)}, folder / "shape.pt")
    torch.save([torch.zeros(1)], folder / "list.pt")
    (folder / "cut.pt").write_bytes((folder / "long.pt").read_bytes()[:5000])
    (folder / "text.pt").write_text("no checkpoint at all")
    (folder / "pointer.pt").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    write_head(folder / "wide.pth", 21)
    write_clip(folder / "half")
    weights = load_file(folder / "half" / "model.safetensors")
    del weights["text_projection.weight"]
    save_file(weights, folder / "half" / "model.safetensors", metadata={"format": "pt"})
    config = write_clip(folder / "other") / "config.json"
    config.write_text(config.read_text().replace('"projection_dim": 20', '"projection_dim": 24'))
    bigger = write_clip_tokenizer(folder / "bigger") / "vocab.json"
    bigger.write_text(bigger.read_text()[:-1] + f', "more": {world.clip_rows}}}')
    return folder


@pytest.mark.parametrize(("name", "args", "kind", "says"), BAD, ids=lambda value: str(value)[:40])
def test_what_does_not_fit_is_refused_with_what_was_found(world, broken, monkeypatch, name, args, kind, says):
    monkeypatch.chdir(broken)
    with pytest.raises(kind) as error:
        world.make(name, **args)
    assert not [part for part in says if part not in str(error.value)], str(error.value)


class RunsCode:
    def __reduce__(self):
        return (os.mkdir, ("was_here",))


@pytest.mark.parametrize(
    ("name", "arg"), [("hpsv2", "checkpoint"), ("imagereward", "checkpoint"), ("aesthetic", "head")]
)
def test_a_pickle_that_runs_code_is_refused_unless_allowed(world, tmp_path, monkeypatch, name, arg):
    monkeypatch.chdir(tmp_path)
    source = {"hpsv2": "HPS_v2.1_compressed.pt", "imagereward": "ImageReward.pt", "aesthetic": "aesthetic.pth"}[name]
    state = torch.load(world.folder / source, weights_only=True)
    torch.save({"state_dict": state.get("state_dict", state), "more": RunsCode()}, "evil.pt")
    with pytest.raises(ValueError, match=rf"'{name}': evil.pt was refused: it is a pickle .*allow_pickle: true"):
        world.make(name, **{arg: "evil.pt"})
    assert not Path("was_here").exists()
    trusted = world.make(name, **{arg: "evil.pt"}, allow_pickle=True)
    assert Path("was_here").is_dir()
    assert trusted(PICTURES, PROMPTS) == world.make(name)(PICTURES, PROMPTS)


def test_safetensors_serve_as_well(world, tmp_path):
    state = torch.load(world.folder / "HPS_v2.1_compressed.pt", weights_only=True)["state_dict"]
    save_file({key: value.contiguous() for key, value in state.items()}, tmp_path / "hps.safetensors")
    reward = world.make("hpsv2", version="v2.0", checkpoint=str(tmp_path / "hps.safetensors"))
    assert reward(PICTURES, PROMPTS) == world.make("hpsv2")(PICTURES, PROMPTS)


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.mark.parametrize(
    ("name", "file"), [("hpsv2", "HPS_v2.1_compressed.pt"), ("imagereward", "ImageReward.pt"), ("hpsv2", "shared.pt")]
)
def test_a_package_gets_its_checkpoint_as_safetensors_tensor_for_tensor(world, cache, tmp_path, name, file):
    """In the packages' torch 2.2.2 a pickle can run code although weights_only forbids it (CVE-2025-32434)."""
    weight = torch.arange(12.0).reshape(3, 4)
    torch.save(
        {"a": weight, "b": weight, "c": weight.T, "d": weight[1:2, 1], "e": torch.tensor(3)}, tmp_path / "shared.pt"
    )
    path = tmp_path / file if file == "shared.pt" else world.folder / file
    there = package_checkpoint(name, {"backend": "package", "checkpoint": str(path)})
    state, converted = torch.load(path, weights_only=True), load_file(there)
    state = state.get("state_dict", state)
    assert there.suffix == ".safetensors" and there.is_relative_to(cache) and set(converted) == set(state)
    for key, tensor in state.items():
        assert converted[key].dtype == tensor.dtype and torch.equal(converted[key], tensor)
    written = there.stat().st_mtime_ns
    assert package_checkpoint(name, {"checkpoint": str(path)}) == there and there.stat().st_mtime_ns == written
    assert package_checkpoint(name, {"checkpoint": str(there)}) == there  # safetensors are taken as they are
    assert {part.suffix for part in there.parent.iterdir()} == {".safetensors", ".lock"}


def test_a_checkpoint_that_has_changed_is_converted_anew(cache, tmp_path):
    for value in (1.0, 2.0):
        torch.save({"a": torch.full((int(value) * 100,), value)}, tmp_path / "weights.pt")
        there = package_checkpoint("imagereward", {"checkpoint": str(tmp_path / "weights.pt")})
        assert load_file(there)["a"][0] == value


def test_a_pickle_that_runs_code_reaches_no_package(cache, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": {"a": torch.zeros(2)}, "more": RunsCode()}, "evil.pt")
    entry = {"use": "imagereward", "args": {"backend": "package", "checkpoint": "evil.pt"}}
    with pytest.raises(ValueError, match=r"evil.pt was refused: it is a pickle .*allow_pickle: true"):
        load_rewards([entry])
    with pytest.raises(ValueError, match=r"evil.pt is not a safetensors file"):
        read_safetensors(Path("evil.pt"), reward="imagereward")
    assert not Path("was_here").exists() and not list(cache.rglob("*.safetensors"))
    (spec,) = [_run_by_package({**entry, "args": entry["args"] | {"allow_pickle": True}})]
    assert spec["args"].keys() == {"checkpoint"} and spec["args"]["checkpoint"].endswith(".safetensors")


def test_a_wrong_version_of_a_package_is_named(cache):
    with pytest.raises(ValueError, match="unknown version 'v2' of hpsv2"):
        load_rewards([{"use": "hpsv2", "args": {"backend": "package", "version": "v2"}}])


def test_what_the_hubs_cache_holds_is_used_without_a_network(world, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    files = {
        "xswu--HPSv2": [world.folder / "HPS_v2.1_compressed.pt"],
        "openai--clip-vit-large-patch14": sorted(world.clip.iterdir()),
        "yuvalkirstain--PickScore_v1": [world.clip / "config.json", world.clip / "model.safetensors"],
        "laion--CLIP-ViT-H-14-laion2B-s32B-b79K": [world.clip / "merges.txt", world.clip / "preprocessor_config.json"],
        "trl-lib--ddpo-aesthetic-predictor": [world.folder / "aesthetic.pth"],
    }
    names = {"aesthetic.pth": "aesthetic-model.pth"}
    for repository, paths in files.items():
        folder = tmp_path / f"models--{repository}" / "snapshots" / ("0" * 40)
        folder.mkdir(parents=True)
        (tmp_path / f"models--{repository}" / "refs").mkdir()
        (tmp_path / f"models--{repository}" / "refs" / "main").write_text("0" * 40)
        for path in paths:
            (folder / names.get(path.name, path.name)).symlink_to(path)
    laion = tmp_path / "models--laion--CLIP-ViT-H-14-laion2B-s32B-b79K" / "snapshots" / ("0" * 40)
    for file in ("vocab.json", "tokenizer_config.json"):
        (laion / file).symlink_to(world.clip / file)
    for name in ("hpsv2", "pickscore", "clipscore", "aesthetic"):
        (cached,) = load_rewards([name])
        assert cached.function(PICTURES, PROMPTS) == world.make(name)(PICTURES, PROMPTS)


def test_without_ftfy_hpsv2_says_what_to_install(world, monkeypatch):
    monkeypatch.setitem(sys.modules, "ftfy", None)
    with pytest.raises(ImportError, match=r"'hpsv2' needs the package ftfy: pip install \"flow-align\[rewards\]\""):
        world.make("hpsv2", checkpoint="before any file is looked for")
