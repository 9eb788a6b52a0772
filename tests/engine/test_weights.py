"""The trained weights: their moving average by hand, a second set beside them, and what a checkpoint of them refuses."""

import pytest
import torch
from matching_runs import GROUNDED, sft
from safetensors.torch import load_file, save_file
from scaled import largest_difference

from align.engine.weights import EMA_WEIGHTS, WEIGHTS, WeightCopy, load_trained, trained_parameters
from preference_data.readers import read_captioned


def test_the_moving_average_keeps_the_share_that_ema_decay_says(tmp_path):
    """By hand from the weights of every update. Of another share, what is evaluated and exported is another model."""
    data, saving = list(read_captioned(GROUNDED))[:8], {"save_strategy": "steps", "save_steps": 1}
    run = sft(tmp_path, data, ema_decay=0.2, max_steps=4, learning_rate=1e-2, **saving)
    run.train()
    saved = [load_file(tmp_path / f"checkpoint-{n}" / WEIGHTS) for n in (1, 2, 3, 4)]
    average = saved[0]
    # diffusers' EMAModel lets the share grow: it starts from the first update, then keeps (1 + n) / (10 + n), at most decay.
    for update, keep in enumerate((2 / 11, 0.2, 0.2), 1):
        average = {name: keep * average[name] + (1 - keep) * saved[update][name] for name in average}
    found = load_file(tmp_path / "checkpoint-4" / EMA_WEIGHTS)
    assert largest_difference(average, found) < 1e-6 < 1e-4 < largest_difference(found, saved[3])


@pytest.fixture
def model() -> torch.nn.Module:
    """Two weights are trained, of 1 and of 2; the bias is not."""
    layers = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Linear(2, 1, bias=False))
    with torch.no_grad():
        for parameter, value in zip(layers.parameters(), (1.0, 0.0, 2.0), strict=True):
            parameter.fill_(value)
    layers[0].bias.requires_grad_(False)
    return layers


def test_only_what_is_trained_is_kept_and_named(model):
    assert list(trained_parameters(model)) == ["0.weight", "1.weight"]


@pytest.mark.parametrize(("keep", "expected"), [(0.0, 5.0), (0.25, 4.0), (1.0, 1.0)])
def test_a_copy_follows_and_is_carried_for_a_while(model, keep, expected, tmp_path):
    """Of the sampling policy: with the shares exchanged it would stay where it began, or forget it at once."""
    copy = WeightCopy(model)
    with torch.no_grad():
        model[0].weight.fill_(5.0)
    copy.follow(keep)
    with copy.applied():
        assert weights_of(model) == [expected, 2.0]
    assert weights_of(model) == [5.0, 2.0]
    copy.save(tmp_path / "copy.safetensors")
    other = WeightCopy(model)
    other.load(tmp_path / "copy.safetensors")
    with other.applied():
        assert weights_of(model) == [expected, 2.0]


def weights_of(model: torch.nn.Module) -> list[float]:
    return [parameter.flatten()[0].item() for parameter in trained_parameters(model).values()]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"0.weight": None}, "the checkpoint lacks 0.weight"),
        ({"0.bias": torch.zeros(2)}, "the model does not train 0.bias"),
        ({"1.weight": torch.zeros(1, 4)}, r"1.weight is \(1, 4\) there and \(1, 2\) here"),
    ],
)
def test_a_checkpoint_of_other_weights_changes_nothing_and_names_the_first(model, tmp_path, change, message):
    """Half of it in the model would be a model that nobody trained."""
    stored = {"0.weight": torch.full((2, 3), 7.0), "1.weight": torch.full((1, 2), 7.0)} | change
    save_file({name: value for name, value in stored.items() if value is not None}, tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match=message):
        load_trained(trained_parameters(model), tmp_path / "w.safetensors")
    with pytest.raises(FileNotFoundError, match=r"it has no other\.safetensors"):
        load_trained(trained_parameters(model), tmp_path / "other.safetensors")
    assert weights_of(model) == [1.0, 2.0]


def test_a_checkpoint_is_copied_into_the_weights(model, tmp_path):
    save_file({"0.weight": torch.full((2, 3), 7.0), "1.weight": torch.full((1, 2), 8.0)}, tmp_path / "w.safetensors")
    load_trained(trained_parameters(model), tmp_path / "w.safetensors")
    assert weights_of(model) == [7.0, 8.0] and (model[0].bias != 7.0).all()
