"""The exported LoRA in the tools that people load it in: each by its published rules, of which the sources are named.

Every rule here gives the weight that a tool adds to each layer from the file's tensors, and asserts that none is left over.
"""

import json

import pytest
import torch
from diffusers import QwenImagePipeline
from peft import LoraConfig
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from align.models.adapters import LORA_FILE
from align.models.families import load_model
from align.models.qwen_image import QwenImage
from align.tiny import CHECKPOINT

ATTENTION = ["to_q", "to_v", "to_out.0", "add_q_proj"]
CONFIGS = {
    "twice the rank": {"r": 4, "lora_alpha": 8},
    "neither": {"r": 4, "lora_alpha": 3},
    "rank-stabilised": {"r": 4, "lora_alpha": 8, "use_rslora": True},
    "by layer": {"r": 4, "lora_alpha": 8, "rank_pattern": {"to_v": 2}, "alpha_pattern": {"to_q": 5, "to_v": 1}},
    "other layers": {"r": 2, "lora_alpha": 4, "target_modules": ["img_mlp.net.2", "txt_mod.1", "proj_out", "linear_1"]},
}
#: What is added to the weight of each layer, by its name.
Deltas = dict[str, Tensor]


def comfyui(tensors: dict[str, Tensor], layers: list[str]) -> Deltas:
    """https://github.com/Comfy-Org/ComfyUI at 17358c8: comfy/lora.py (model_lora_keys_unet, load_lora), comfy/weight_adapter/lora.py"""
    found, used = {}, set()
    for layer in layers:
        flat = layer.replace(".", "_")
        for x in (f"diffusion_model.{layer}", layer, f"transformer.{layer}", f"lora_unet_{flat}", f"lycoris_{flat}"):
            for up, down in (("lora_up", "lora_down"), ("lora_B", "lora_A")):
                if f"{x}.{up}.weight" in tensors:
                    mat1, mat2 = tensors[f"{x}.{up}.weight"], tensors[f"{x}.{down}.weight"]
                    alpha = tensors[f"{x}.alpha"].item() / mat2.shape[0] if f"{x}.alpha" in tensors else 1.0
                    found[layer] = alpha * mat1 @ mat2
                    used |= {f"{x}.{up}.weight", f"{x}.{down}.weight", f"{x}.alpha"} & tensors.keys()
    assert used == tensors.keys()
    return found


def diffsynth(tensors: dict[str, Tensor], layers: list[str]) -> Deltas:
    """https://github.com/modelscope/DiffSynth-Studio at fed7b18: diffsynth/utils/lora/general.py (GeneralLoRALoader)"""
    found, used = {}, set()
    for key in tensors:
        if "lora_B" not in key:
            continue
        keys = key.split(".")
        if len(keys) > keys.index("lora_B") + 2:
            keys.pop(keys.index("lora_B") + 1)
        keys.pop(keys.index("lora_B"))
        keys = keys[1:-1] if keys[0] == "diffusion_model" else keys[:-1]
        down, alpha = key.replace("lora_B", "lora_A"), key.replace("lora_B.weight", "alpha")
        scale = tensors[alpha].item() / len(tensors[down]) if alpha in tensors else 1.0
        if ".".join(keys) in layers:  # fuse_lora_to_base_model looks for modules of these names
            found[".".join(keys)] = tensors[key] @ (scale * tensors[down])
            used |= {key, down, alpha} & tensors.keys()
    assert used == tensors.keys()
    return found


def musubi_converted(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """https://github.com/kohya-ss/musubi-tuner at 30c658c: src/musubi_tuner/convert_lora.py (convert_from_diffusers)"""
    new = {}
    for key, weight in tensors.items():
        prefix, body = key.split(".", 1)
        assert prefix in ("diffusion_model", "transformer")
        name = f"lora_unet_{body}".replace(".", "_")
        new[name.replace("_lora_A_", ".lora_down.").replace("_lora_B_", ".lora_up.")] = weight
    for key in [key for key in new if "lora_down" in key]:
        new[key.split(".")[0] + ".alpha"] = torch.tensor(new[key].shape[0])
    return new


def musubi(tensors: dict[str, Tensor], layers: list[str]) -> Deltas:
    """The same: src/musubi_tuner/utils/lora_utils.py (load_safetensors_with_lora_and_fp8)"""
    converted = musubi_converted(tensors)
    found, left = {}, set(converted)
    for layer in layers:
        name = "lora_unet_" + layer.replace(".", "_")
        if f"{name}.lora_down.weight" in left:
            down, up = converted[f"{name}.lora_down.weight"], converted[f"{name}.lora_up.weight"]
            found[layer] = up @ down * (converted[f"{name}.alpha"] / down.size()[0])
            left -= {f"{name}.lora_down.weight", f"{name}.lora_up.weight", f"{name}.alpha"}
    assert not left
    return found


@pytest.fixture(scope="module")
def layers() -> list[str]:
    """All linear layers of the embedded model."""
    named = QwenImagePipeline.from_pretrained(CHECKPOINT).transformer.named_modules()
    return [name for name, module in named if isinstance(module, torch.nn.Linear)]


@pytest.fixture(params=CONFIGS)
def trained(request, tmp_path) -> QwenImage:
    """A model whose LoRA is exported to ``tmp_path``."""
    model = load_model("tiny")
    model.add_lora(LoraConfig(**{"target_modules": ATTENTION} | CONFIGS[request.param]))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in state_of(model).values():
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    model.save(tmp_path, state_of(model))
    return model


def state_of(model: QwenImage) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in model.transformer.named_parameters() if p.requires_grad}


def added(transformer: torch.nn.Module, adapter: str = "default") -> Deltas:
    """What PEFT adds to the weight of each adapted layer."""
    adapted = {n: m for n, m in transformer.named_modules() if hasattr(m, "get_delta_weight")}
    return {name: module.get_delta_weight(adapter).detach() for name, module in adapted.items()}


def check_same(found: Deltas, expected: Deltas) -> None:
    assert found.keys() == expected.keys()
    for layer, delta in expected.items():
        torch.testing.assert_close(found[layer], delta)


@pytest.mark.parametrize("rule", [comfyui, diffsynth, musubi])
def test_each_tool_adds_to_each_layer_what_was_trained(trained, tmp_path, layers, rule):
    """ComfyUI applied half of it, and DiffSynth-Studio nothing."""
    check_same(rule(load_file(tmp_path / LORA_FILE), layers), added(trained.transformer))


@pytest.mark.parametrize("metadata", [True, False])
def test_diffusers_adds_it_with_the_files_metadata_and_without(trained, tmp_path, metadata):
    if not metadata:
        save_file(load_file(tmp_path / LORA_FILE), tmp_path / LORA_FILE)
    stock = QwenImagePipeline.from_pretrained(CHECKPOINT)
    stock.load_lora_weights(tmp_path, adapter_name="default")
    check_same(added(stock.transformer), added(trained.transformer))


@pytest.mark.parametrize("by", ["us", "musubi-tuner", "a tool that drops metadata"])
def test_training_goes_on_from_the_same_function(trained, tmp_path, by):
    """Also from a copy that a converter has made, which keeps the metadata and adds alphas, or not."""
    with safe_open(tmp_path / LORA_FILE, "pt") as stored:
        tensors, metadata = load_file(tmp_path / LORA_FILE), stored.metadata()
    file = tmp_path / "copy.safetensors"
    save_file(musubi_converted(tensors) if by == "musubi-tuner" else tensors, file, None if "drops" in by else metadata)
    model = load_model("tiny")
    model.load_adapter(file)
    check_same(added(model.transformer), added(trained.transformer))


def test_training_goes_on_with_the_same_steps(trained, tmp_path):
    """With alpha for the rank an update of A would be half as large: another learning rate than the one that was set."""
    model = load_model("tiny")
    model.load_adapter(tmp_path)
    before, after = state_of(trained), state_of(model)
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        torch.testing.assert_close(after[name], tensor)
    scales = [
        {n: m.scaling["default"] for n, m in of.transformer.named_modules() if hasattr(m, "scaling")}
        for of in (trained, model)
    ]
    assert scales[0] == pytest.approx(scales[1])
    model.save(tmp_path / "again", after)
    check_same(load_file(tmp_path / "again" / LORA_FILE), load_file(tmp_path / LORA_FILE))


def test_the_default_comes_back_to_the_bit(tiny, tmp_path):
    tiny.add_lora(LoraConfig(r=16, lora_alpha=32, init_lora_weights=False, lora_dropout=0.1))
    tiny.save(tmp_path, state_of(tiny))
    model = load_model("tiny")
    model.load_adapter(tmp_path)
    before, after = state_of(tiny), state_of(model)
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    config = model.transformer.peft_config["default"]
    assert (config.r, config.lora_alpha, config.lora_dropout) == (16, 32, 0.1)


def test_the_file_says_no_alpha_but_in_metadata_of_our_own(trained, tmp_path):
    """diffusers would apply an alpha of its metadata once more, and a newer peft's metadata is an error in an older one."""
    with safe_open(tmp_path / LORA_FILE, "pt") as stored:
        assert set(stored.metadata()) == {"format", "flow_align_lora"}
        ours = json.loads(stored.metadata()["flow_align_lora"])
        assert ours["folded"] is True and ours["lora_alpha"]
        assert all(key.startswith("diffusion_model.") and ".lora_" in key for key in stored.keys())  # noqa: SIM118
