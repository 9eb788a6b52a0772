"""LoRA files of others: each layout is the function that it was saved as, and a file that is not one of them is refused."""

import json
import math
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from torch import Tensor

from align.models.adapters import LORA_FILE, find_adapter, from_tensors, read_adapter
from align.models.families import outline

RANK = 4
LAYERS = ("transformer_blocks.0.attn.to_q", "transformer_blocks.0.attn.to_out.0", "transformer_blocks.1.img_mlp.net.2",
          "transformer_blocks.0.txt_mod.1", "proj_out")  # fmt: skip


@pytest.fixture(scope="module")
def layers() -> dict[str, tuple[int, int]]:
    """Of the embedded model: (out, in) of each linear layer."""
    linear = outline("tiny").transformer.named_modules()
    return {name: tuple(m.weight.shape) for name, m in linear if isinstance(m, torch.nn.Linear)}


@pytest.fixture(scope="module")
def matrices(layers) -> dict[str, tuple[Tensor, Tensor]]:
    """A and B of some layers."""
    generator = torch.Generator().manual_seed(0)
    shapes = {layer: layers[layer] for layer in LAYERS}
    return {
        layer: (torch.randn(RANK, into, generator=generator), torch.randn(out, RANK, generator=generator) * 0.1)
        for layer, (out, into) in shapes.items()
    }


def named(matrices, first: str, a: str = "lora_A", b: str = "lora_B", flat: bool = False) -> dict[str, Tensor]:
    """The matrices as a file names them."""
    found = {}
    for layer, (down, up) in matrices.items():
        name = first + (layer.replace(".", "_") if flat else layer)
        found |= {f"{name}.{a}.weight": down, f"{name}.{b}.weight": up}
    return found


def alphas(matrices, first: str, alpha: float, flat: bool = True) -> dict[str, Tensor]:
    return {f"{first}{n.replace('.', '_') if flat else n}.alpha": torch.tensor(alpha) for n in matrices}


def layouts(matrices, alpha: float) -> dict[str, tuple[dict[str, Tensor], dict[str, str], dict | None]]:
    """Tensors, metadata and adapter_config.json of a LoRA as the tools write it that train Qwen-Image."""
    config = {"r": RANK, "lora_alpha": alpha, "peft_type": "LORA", "target_modules": ["to_q"], "bias": "none"}
    metadata = {"lora_adapter_metadata": json.dumps({f"transformer.{key}": value for key, value in config.items()})}
    kohya = named(matrices, "lora_unet_", "lora_down", "lora_up", flat=True)
    scaled = {layer: (down, up * alpha / RANK) for layer, (down, up) in matrices.items()}
    return {
        "diffusers": (named(matrices, "transformer."), metadata, None),
        "PEFT": (named(matrices, "base_model.model."), {}, config),
        "PEFT's of a pipeline's module": (named(matrices, "base_model.model.transformer."), {}, config),
        "no prefix": (named(scaled, ""), {}, None),
        "ai-toolkit": (named(scaled, "diffusion_model."), {}, None),
        "with alpha": (
            named(matrices, "diffusion_model.") | alphas(matrices, "diffusion_model.", alpha, False),
            {},
            None,
        ),
        "kohya, musubi-tuner": (kohya | alphas(matrices, "lora_unet_", alpha), {"ss_network_alpha": "9"}, None),
        "LyCORIS": (
            named(matrices, "lycoris_", "lora_down", "lora_up", flat=True) | alphas(matrices, "lycoris_", alpha),
            {},
            None,
        ),
        "DiffSynth-Studio": (named(scaled, "", "lora_A.default", "lora_B.default"), {}, None),
        "DiffSynth-Studio, prefix kept": (named(scaled, "pipe.dit.", "lora_A.default", "lora_B.default"), {}, None),
        "lora.down": (named(scaled, "transformer.", "lora.down", "lora.up"), {}, None),
    }


def write(folder: Path, tensors, metadata, config=None, name: str = LORA_FILE) -> Path:
    folder.mkdir(exist_ok=True)
    save_file({key: tensor.clone() for key, tensor in tensors.items()}, folder / name, metadata=metadata or None)
    if config is not None:
        (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder / name


def deltas(lora) -> dict[str, Tensor]:
    """What a LoRA adds to each layer's weight."""
    return {n: lora.alphas[n] / len(lora.down[n]) * lora.up[n] @ lora.down[n] for n in lora.down}


@pytest.mark.parametrize("layout", layouts({}, 0.0))
@pytest.mark.parametrize("alpha", [8.0, 3.0])
def test_every_layout_is_the_same_lora(matrices, layers, tmp_path, layout, alpha):
    """One with another prefix was used as if it were none, and ended with exit code 0."""
    write(tmp_path, *layouts(matrices, alpha)[layout])
    found = deltas(read_adapter(tmp_path, layers))
    assert found.keys() == matrices.keys()
    for layer, (down, up) in matrices.items():
        torch.testing.assert_close(found[layer], alpha / RANK * up @ down)


@pytest.mark.parametrize("layout", layouts({}, 0.0))
def test_a_model_that_has_loaded_a_layout_has_its_weights(tiny, matrices, tmp_path, layout):
    tiny.load_adapter(write(tmp_path, *layouts(matrices, 8.0)[layout]))
    for layer, (down, up) in matrices.items():
        assert torch.allclose(tiny.transformer.get_submodule(layer).get_delta_weight("default"), 2 * up @ down)
    trained = {name for name, p in tiny.transformer.named_parameters() if p.requires_grad}
    assert trained == {f"{layer}.lora_{side}.default.weight" for layer in matrices for side in "AB"}


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"use_rslora": True},
        {"alpha_pattern": {"to_q": 5}},
        {"rank_pattern": {"0": 2}, "alpha_pattern": {"attn.to_v": 1}, "use_rslora": True},
    ],
)
def test_what_peft_saves_is_what_it_computes(tmp_path, more):
    """Scales by rank-stabilised LoRA and by layer are PEFT's, with its own keys and config beside them."""
    model = torch.nn.ModuleDict(
        {"attn": torch.nn.ModuleDict({n: torch.nn.Linear(6, 5) for n in ("to_q", "to_v", "0")})}
    )
    config = LoraConfig(r=4, lora_alpha=12, target_modules=["to_q", "to_v", "0"], init_lora_weights=False, **more)
    adapted = get_peft_model(model, config)
    adapted.save_pretrained(tmp_path)
    found = deltas(read_adapter(tmp_path, {f"attn.{name}": (5, 6) for name in ("to_q", "to_v", "0")}))
    assert len(found) == 3
    for layer, delta in found.items():
        torch.testing.assert_close(delta, adapted.base_model.model.get_submodule(layer).get_delta_weight("default"))


def test_layers_of_other_ranks_and_alphas_keep_theirs(tiny, matrices, layers, tmp_path):
    mixed = dict(matrices) | {
        "proj_out": tuple(m[:2] if m.shape[0] == RANK else m[:, :2] for m in matrices["proj_out"])
    }
    tensors = named(mixed, "lora_unet_", "lora_down", "lora_up", flat=True) | alphas(mixed, "lora_unet_", 4.0)
    tensors["lora_unet_transformer_blocks_0_attn_to_q.alpha"] = torch.tensor(1.0)
    tiny.load_adapter(write(tmp_path, tensors, {}))
    for layer, scale in (("transformer_blocks.0.attn.to_q", 0.25), ("proj_out", 2.0), (LAYERS[2], 1.0)):
        down, up = mixed[layer]
        delta = tiny.transformer.get_submodule(layer).get_delta_weight("default")
        torch.testing.assert_close(delta, scale * up @ down)


def test_peft_keys_without_their_config_are_taken_at_alpha_for_rank_and_it_is_said(matrices, layers, tmp_path, caplog):
    write(tmp_path, named(matrices, "base_model.model."), {})
    assert set(read_adapter(tmp_path, layers).alphas.values()) == {RANK}
    assert "has no adapter_config.json beside it, which says its alpha: it is taken to be the rank" in caplog.text


# --- What is refused ---


def strange(matrices) -> dict[str, tuple[dict[str, Tensor], str]]:
    good, (down, up) = named(matrices, "transformer."), matrices[LAYERS[0]]
    first = f"transformer.{LAYERS[0]}."
    return {
        "none matches": (
            named(matrices, "unet."),
            r"10 of its 10 tensors belong to no linear layer of the model: unet\.proj_out\.lora_A\.weight, .*, \.\.\.\. "
            r"Names that do are like transformer\.proj_out\.lora_A\.weight",
        ),
        "some match": (
            good | {"transformer.transformer_blocks.9.attn.to_q.lora_A.weight": down},
            r"1 of its 11 tensors belong to no .*: transformer\.transformer_blocks\.9\.attn\.to_q\.lora_A\.weight\. Names",
        ),
        "text encoder": (good | {"lora_te_layers_0_mlp.lora_down.weight": down}, "1 of its 11 tensors.*lora_te_"),
        "DoRA": (good | {first + "lora_magnitude_vector": up[:, 0]}, "1 of its 11 tensors.*magnitude"),
        "LoKr": ({first + "lokr_w1": down, first + "lokr_w2": up}, "2 of its 2 tensors.*lokr_w1"),
        "bias": (good | {first + "lora_B.bias": up[:, 0]}, r"1 of its 11 tensors.*lora_B\.bias"),
        "half": ({first + "lora_A.weight": down}, "to_q has only one of its two matrices"),
        "alpha alone": (good | {"lora_unet_img_in.alpha": up[0, 0]}, "img_in has only one of its two matrices"),
        "twice": (good | named(matrices, ""), "lora_A.weight are for the same layer"),
        "shape": (
            good | {first + "lora_A.weight": down[:, 1:]},
            r"needs \(4, 128\) and \(128, 4\): it is the LoRA of another model",
        ),
        "convolution": (
            good | {first + "lora_A.weight": down[..., None, None]},
            r"to_q\.lora_A\.weight has the shape \(4, 128, 1, 1\): A and B are matrices",
        ),
        "two alphas": (good | {first + "alpha": up[0, :2]}, r"to_q\.alpha has the shape .* alpha is one number"),
        "NaN": (
            good | {first + "lora_B.weight": up * math.nan},
            "lora_B.weight holds numbers that are NaN or infinite",
        ),
        "empty": ({}, "it holds no tensor"),
    }


@pytest.mark.parametrize("fault", strange(dict.fromkeys(LAYERS, (torch.ones(1, 1), torch.ones(1, 1)))))
def test_what_does_not_match_is_an_error_before_weights_are_read(matrices, tmp_path, fault):
    """What did not match was left out without a word: images were those of the model without the LoRA, or of half of it."""
    tensors, message = strange(matrices)[fault]
    file = write(tmp_path, tensors, {})
    with pytest.raises(ValueError, match=message) as raised:
        outline("tiny", adapter=file)
    assert str(raised.value).startswith(f"adapter {file}: ")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"use_dora": True}, "use_dora is not supported"),
        ({"bias": "all"}, "bias 'all' is not supported"),
        ({"modules_to_save": ["proj_out"]}, "modules_to_save is not supported"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights 'pissa' changes the frozen weights too"),
    ],
)
def test_variants_of_lora_are_refused_in_a_file_and_for_training(tiny, matrices, layers, settings, message):
    """An export of A and B alone would have been another model, in every tool."""
    with pytest.raises(ValueError, match=message):
        from_tensors(named(matrices, ""), settings, layers)
    with pytest.raises(ValueError, match=message):
        tiny.add_lora(LoraConfig(r=4, **settings))


@pytest.mark.parametrize(
    ("stored", "message"),
    [
        ('{"lora_alpha": 8', "adapter_config.json is not JSON: "),
        ("[8]", "adapter_config.json is no mapping"),
        ('{"lora_alpha": null}', "the alpha of .* is stored as None, which is no number"),
        ('{"lora_alpha": "8"}', "the alpha of .* is stored as '8', which is no number"),
    ],
)
def test_what_is_stored_about_a_lora_is_damaged(matrices, layers, tmp_path, stored, message):
    """It once ended in a traceback, or in a sentence that named no file."""
    file = write(tmp_path, named(matrices, "base_model.model."), {})
    file.with_name("adapter_config.json").write_text(stored)
    with pytest.raises(ValueError, match=f"^adapter {file}: .*{message}"):
        read_adapter(file, layers)


def test_a_file_that_is_no_safetensors_file_is_a_sentence(tmp_path, layers):
    (tmp_path / LORA_FILE).write_bytes(b"version https://git-lfs.github.com/spec/v1")
    with pytest.raises(ValueError, match=rf"adapter .*{LORA_FILE} cannot be read: "):
        read_adapter(tmp_path, layers)


# --- Which file ---


@pytest.mark.parametrize(
    ("files", "found"),
    [
        (["style.safetensors"], "style.safetensors"),
        (["adapter_model.safetensors", "optimizer.bin"], "adapter_model.safetensors"),
        (["model.safetensors", LORA_FILE, "a.safetensors"], LORA_FILE),  # a checkpoint of ours holds the first two
    ],
)
def test_a_folder_is_its_one_file_or_the_one_with_the_usual_name(tmp_path, files, found):
    for file in files:
        (tmp_path / file).touch()
    assert find_adapter(tmp_path) == tmp_path / found
    assert find_adapter(tmp_path / files[0]) == tmp_path / files[0]


@pytest.mark.parametrize(
    ("files", "name", "message"),
    [
        (["a.safetensors", "b.safetensors"], ".", r"several files: a\.safetensors, b\.safetensors\. Name the one"),
        ([LORA_FILE, "adapter_model.safetensors"], ".", f"several files: {LORA_FILE}, adapter_model.safetensors"),
        (["adapter_model.bin"], ".", f"has no {LORA_FILE}, nor any other .safetensors file"),
        (["a.ckpt"], "a.ckpt", "adapter .*a.ckpt is no .safetensors file"),
        ([], "somebody/lora", "adapter .*somebody/lora does not exist here"),
    ],
)
def test_a_folder_that_leaves_the_choice_open_or_has_none_says_what_is_wanted(tmp_path, files, name, message):
    for file in files:
        (tmp_path / file).touch()
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        find_adapter(tmp_path / name)
