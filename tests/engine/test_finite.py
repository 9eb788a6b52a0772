"""A run whose numbers are no numbers ends at once, with its last good checkpoint kept and named."""

from dataclasses import replace

import pytest
import torch
from brightness import score as brightness
from datasets import Dataset
from matching_runs import sft
from peft import LoraConfig
from transformers import TrainerCallback

from align.grpo import GRPOConfig, GRPOTrainer
from align.models.contract import NotFinite
from align.models.families import load_model

PROMPTS = Dataset.from_dict({"prompt": ["a circle", "two squares"]})


def trainer(folder, rewards=(brightness,), **overrides) -> GRPOTrainer:
    settings = {
        "output_dir": str(folder), "height": 64, "width": 64, "num_inference_steps": 3, "sde_window_size": 1,
        "num_generations": 4, "generation_batch_size": 8, "per_device_train_batch_size": 8, "max_steps": 4,
        "disable_tqdm": True, "use_cpu": True, "save_strategy": "steps", "save_steps": 1, "save_total_limit": 2,
    }  # fmt: skip
    lora = LoraConfig(r=4, lora_alpha=8, init_lora_weights="gaussian")
    args = GRPOConfig(**settings | overrides)
    return GRPOTrainer(load_model("tiny"), list(rewards), args, PROMPTS, PROMPTS, peft_config=lora)


class Glitch(TrainerCallback):
    """One gradient of one weight is NaN, in the third update."""

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        if state.global_step == 2:
            next(p for p in model.parameters() if p.grad is not None).grad[0] = float("nan")


@pytest.mark.parametrize("optim", ["adamw_torch", "sgd"])
def test_one_gradient_that_is_no_number_ends_the_run(tmp_path, optim):
    """Images once went black, were scored as true zeros, and every good checkpoint was rotated away."""
    run = trainer(tmp_path, optim=optim)
    run.add_callback(Glitch())
    with pytest.raises(
        NotFinite, match=r"after update 3 the loss or the weights .*: the last good checkpoint is .*-2$"
    ):
        run.train()
    assert sorted(p.name for p in tmp_path.glob("checkpoint-*")) == ["checkpoint-1", "checkpoint-2"]
    assert not list(tmp_path.glob("*.safetensors"))


@pytest.mark.parametrize("value", ["nan", "inf"])
def test_a_loss_that_is_no_number_ends_the_run(tmp_path, value, monkeypatch):
    run = sft(tmp_path, save_strategy="no")
    loss = run.loss

    def wrong(model, batch):
        result = loss(model, batch)
        return replace(result, loss=result.loss + float(value)) if run.state.global_step == 1 else result

    monkeypatch.setattr(run, "loss", wrong)
    with pytest.raises(NotFinite, match=r"after update 2 the loss or the weights .*: there is no checkpoint"):
        run.train()


def test_images_that_are_no_numbers_are_not_scored(tmp_path):
    """Weights that are finite and far too large."""
    seen = []

    def counts(images, prompts):
        seen.append(len(images))
        return brightness(images, prompts)

    run = trainer(tmp_path, rewards=[counts])
    with torch.no_grad():
        for parameter in run.trained_parameters().values():
            parameter.fill_(1e30)
    with pytest.raises(NotFinite, match="whose pixels are NaN or infinite; they are not scored"):
        run.evaluate()
    with pytest.raises(
        NotFinite, match="whose pixels are NaN or infinite; they are not scored: there is no checkpoint"
    ):
        run.train()
    assert not seen
