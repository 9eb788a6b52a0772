"""From a folder to its adapter, and what is known of a model without its weights."""

import json
import shutil

import huggingface_hub
import pytest
import torch
from asking import ask
from peft import LoraConfig
from PIL import Image

from align.models.contract import Request
from align.models.families import FAMILIES, Deferred, family, load_model, outline
from align.models.qwen_image import QwenImage
from align.tiny import CHECKPOINT
from preference_data.images import ImageSource


def test_every_row_of_the_table_names_an_adapter_of_that_pipeline():
    for pipeline, target in FAMILIES.items():
        module, _, name = target.partition(":")
        assert module.startswith("align.models.") and name
        assert pipeline.endswith("Pipeline")
    assert family(CHECKPOINT) is QwenImage


def test_an_unknown_pipeline_names_the_nearest(tmp_path):
    shutil.copytree(CHECKPOINT, tmp_path / "model", ignore=shutil.ignore_patterns("*.safetensors"))
    index = tmp_path / "model" / "model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"_class_name": "QwenImagePipelin"}))
    for known in (load_model, outline):
        with pytest.raises(ValueError, match=r"QwenImagePipelin, .* Did you mean 'QwenImagePipeline'\?"):
            known(tmp_path / "model")


def test_a_module_that_the_index_leaves_empty_is_not_missed(tmp_path):
    shutil.copytree(CHECKPOINT, tmp_path / "model", ignore=shutil.ignore_patterns("*.safetensors"))
    index = tmp_path / "model" / "model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"image_encoder": [None, None]}))
    assert outline(tmp_path / "model").cell == 16


def test_weights_that_were_not_all_downloaded_are_named(tmp_path):
    model = tmp_path / "model"
    shutil.copytree(CHECKPOINT, model)
    (file,) = (model / "transformer").glob("*.safetensors")
    file.rename(file.with_name("part-1.safetensors"))
    index = {"weight_map": {"a": "part-1.safetensors", "b": "part-2.safetensors"}}
    (model / "transformer/diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(
        FileNotFoundError, match=r"model lacks transformer/part-2\.safetensors, which diffusion_pytorch_"
    ):
        load_model(model)
    for file in (model / "vae").glob("*.safetensors"):
        file.rename(file.with_suffix(".bin"))
    (model / "transformer/part-2.safetensors").touch()
    with pytest.raises(FileNotFoundError, match=r"model has no weights \(\*\.safetensors\) in vae"):
        load_model(model)


def test_a_download_that_broke_off_goes_on(tmp_path, monkeypatch):
    model, asked = tmp_path / "model", []
    shutil.copytree(CHECKPOINT, model, ignore=shutil.ignore_patterns("*.safetensors"))

    def download(name, allow_patterns, local_files_only):
        asked.append(local_files_only)
        if not local_files_only and len(allow_patterns) > 1:
            shutil.copytree(CHECKPOINT, model, dirs_exist_ok=True)
        return str(model)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert load_model("owner/name").cell == 16
    assert asked == [True, True, False, False]  # index and modules, of the cache and then of the hub


@pytest.mark.parametrize("lora", [None, LoraConfig(r=4, lora_alpha=8)])
def test_an_outline_says_of_a_model_what_the_loaded_one_does(lora):
    sketch, model = outline("tiny", lora), load_model("tiny")
    if lora is None:
        model.unfreeze()
    else:
        model.add_lora(lora)
    assert sketch.identity() == model.identity()
    assert sketch.parameter_counts() == model.parameter_counts()
    assert sketch.latent_shape(64, 96) == model.latent_shape(64, 96) == (24, 64)
    assert (sketch.cell, sketch.adapter) == (model.cell, model.adapter)
    assert all(p.device.type == "meta" for p in sketch.transformer.parameters())


def test_a_deferred_model_is_loaded_when_it_is_asked_for(monkeypatch):
    deferred = Deferred.of("tiny")
    assert next(deferred.outline.transformer.parameters()).device.type == "meta"
    loaded = deferred.load()
    assert next(loaded.transformer.parameters()).device.type == "cpu"
    again = Deferred.of(loaded)
    assert again.outline is loaded and again.load() is loaded and Deferred.of(again) is again


def test_equal_requests_are_one_request(tiny):
    assert Request("a circle") == Request("a circle") and len({*ask(["a", "b", "a"])}) == 2
    first, second = tiny.encode(ask(["a circle", "a circle"]))
    assert torch.equal(first.embeds, second.embeds)


def test_a_request_with_an_input_image_is_refused_by_a_model_that_takes_none(tiny):
    image = ImageSource.of(Image.new("RGB", (8, 8)), "an image")
    with pytest.raises(ValueError, match="a request with input images needs an edit model"):
        tiny.encode([Request("make it red", (image,))])
