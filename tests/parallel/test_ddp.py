"""What of a Qwen-Image can be trained: every trainable parameter gets a gradient, which DDP insists on."""

import pytest
import torch
from asking import ask
from peft import LoraConfig
from torch import distributed
from torch.nn.parallel import DistributedDataParallel


@pytest.fixture
def process_group(tmp_path):
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


def train_twice(flow, model: torch.nn.Module) -> None:
    """Two forwards and backwards; DDP says at the second what the first left waiting."""
    tokens, channels = flow.latent_shape(64, 64)
    for seed in (0, 1):
        latents = torch.randn(2, tokens, channels, generator=torch.Generator().manual_seed(seed))
        conditions = flow.encode(ask(["a circle", "two blue squares"]))
        flow.velocity(
            latents, torch.tensor([0.3, 0.8]), conditions, height=64, width=64, transformer=model
        ).square().mean().backward()


@pytest.mark.parametrize("tuning", ["full", "attention", "all-linear"])
def test_every_trainable_parameter_gets_a_gradient_and_no_other_could(tiny, process_group, tuning):
    if tuning == "full":
        dead = tiny.unfreeze()
    else:
        dead = tiny.add_lora(LoraConfig(r=2, target_modules="all-linear" if tuning == "all-linear" else None))
    last = f"transformer_blocks.{len(tiny.transformer.transformer_blocks) - 1}."
    assert dead and all(name.startswith(last) for name in dead)
    train_twice(tiny, DistributedDataParallel(tiny.transformer))
    without = [n for n, p in tiny.transformer.named_parameters() if p.requires_grad != (p.grad is not None)]
    assert not without


def test_ddp_fails_if_what_no_gradient_reaches_is_not_frozen(tiny, process_group):
    dead = tiny.unfreeze()
    tiny.transformer.requires_grad_(True)
    with pytest.raises(RuntimeError, match="Expected to have finished reduction"):
        train_twice(tiny, DistributedDataParallel(tiny.transformer))
    assert {n for n, p in tiny.transformer.named_parameters() if p.grad is None or not p.grad.any()} == set(dead)
