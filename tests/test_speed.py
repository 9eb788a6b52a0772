"""What makes the transformer faster, and must not change what it says."""

import pytest
import torch
from asking import ask
from diffusers.models.attention_dispatch import _AttentionBackendRegistry

from align.cli.arguments import ModelArguments
from align.cli.launch import check_attention_backend, load_model
from align.sampling.noise import seeded_noise


@pytest.fixture(autouse=True)
def default_backend():
    """diffusers makes a model's backend that of the whole process: give the process its own back."""
    before = _AttentionBackendRegistry.get_active_backend()[0]
    yield
    _AttentionBackendRegistry.set_active_backend(before)


def velocity_of(model) -> torch.Tensor:
    """Of three prompts of different lengths at a noise level."""
    latents = seeded_noise(("speed",), (3, *model.latent_shape(64, 64)))
    conditions = model.encode(ask(["a circle", "two red squares on blue", "green"]))
    with torch.no_grad():
        return model.velocity(latents, torch.full((3,), 0.6), conditions, height=64, width=64)


def test_an_attention_backend_reaches_every_layer_and_an_unknown_one_is_named():
    model = load_model(ModelArguments(attention_backend="_native_math"))
    backends = {str(module.processor._attention_backend.value) for module in attentions(model.transformer)}
    assert backends == {"_native_math"}
    assert (velocity_of(model) - velocity_of(load_model(ModelArguments()))).abs().max() < 1e-5
    with pytest.raises(ValueError, match=r"unknown attention_backend 'flsh'.*flash"):
        check_attention_backend("flsh")


def attentions(transformer) -> list[torch.nn.Module]:
    return [block.attn for block in transformer.transformer_blocks]


@pytest.mark.slow
def test_compiled_blocks_give_the_same_velocity_and_keep_their_names():
    plain, compiled = load_model(ModelArguments()), load_model(ModelArguments(compile_blocks=True))
    assert [name for name, _ in compiled.transformer.named_parameters()] == [
        name for name, _ in plain.transformer.named_parameters()
    ]
    assert all(block._compiled_call_impl is not None for block in compiled.transformer.transformer_blocks)
    assert (velocity_of(compiled) - velocity_of(plain)).abs().max() < 1e-5
