"""With ``load_best_model_at_end`` the best checkpoint is what is exported, and what table and card say."""

import pytest
from brightness import score as brightness
from datasets import Dataset
from diffusers import QwenImageTransformer2DModel
from matching_runs import sft
from peft import LoraConfig
from safetensors.torch import load_file

from align.engine.trainer import NotMeasured
from align.engine.weights import EMA_WEIGHTS, WEIGHTS
from align.grpo import GRPOConfig, GRPOTrainer
from align.models.families import load_model

PROMPTS = Dataset.from_dict({"prompt": ["a circle", "two squares", "a red cross"]})
LORA = LoraConfig(r=4, lora_alpha=8, init_lora_weights="gaussian")


def falling():
    """A reward that likes held-out images less each time it sees them: the first of three evaluations is the best."""
    looks = []

    def score(images, prompts):
        if len(images) == len(PROMPTS):
            looks.append(1)
            return [1 / len(looks)] * len(images)
        return brightness(images, prompts)

    return score


def trainer(folder, peft_config=LORA, held_out=PROMPTS, **overrides) -> GRPOTrainer:
    settings = {
        "output_dir": str(folder), "height": 64, "width": 64, "num_inference_steps": 3, "sde_window_size": 1,
        "num_generations": 4, "generation_batch_size": 8, "per_device_train_batch_size": 8, "max_steps": 3,
        "learning_rate": 1e-3, "disable_tqdm": True, "use_cpu": True, "load_best_model_at_end": True,
        "eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1, "save_total_limit": 1,
    }  # fmt: skip
    args = GRPOConfig(**settings | overrides)
    return GRPOTrainer(load_model("tiny"), [falling()], args, PROMPTS, held_out, peft_config=peft_config)


@pytest.mark.parametrize("strategy", ["steps", "best"])
@pytest.mark.parametrize("tuning", ["LoRA", "average", "full"])
def test_the_best_checkpoint_is_exported(tmp_path, tuning, strategy):
    """It once ended in a traceback after the last update, and exported nothing."""
    more = {"average": {"ema_decay": 0.5}, "full": {"peft_config": None, "learning_rate": 1e-4}}.get(tuning, {})
    run = trainer(tmp_path, save_strategy=strategy, **more)
    run.train()
    table = run.finish("tiny", "three prompts")
    assert run.state.best_global_step == 1 and run.args.metric_for_best_model == "eval_reward"
    best = load_file(tmp_path / "checkpoint-1" / (EMA_WEIGHTS if tuning == "average" else WEIGHTS))
    if tuning == "full":
        exported = QwenImageTransformer2DModel.from_pretrained(tmp_path / "transformer").state_dict()
        assert all((exported[name] == tensor).all() for name, tensor in best.items())
    else:
        run.flow.save(tmp_path / "expected", best)
        exported, expected = (
            load_file(f / "pytorch_lora_weights.safetensors") for f in (tmp_path, tmp_path / "expected")
        )
        assert exported.keys() == expected.keys() and all((exported[k] == expected[k]).all() for k in expected)
    assert "| reward | not measured | 1.000" in table and table in (tmp_path / "README.md").read_text()
    assert "the weights after update 1, the best ones" in (tmp_path / "README.md").read_text()


@pytest.mark.parametrize("limit", [None, 1])
def test_the_best_is_one_that_was_saved(tmp_path, limit):
    """Evaluated more often than saved, a run once ended in a traceback after the last update, and exported nothing."""
    run = trainer(tmp_path, save_steps=2, save_total_limit=limit)
    run.train()
    run.finish("tiny", "three prompts")
    best = load_file(tmp_path / "checkpoint-2" / WEIGHTS)  # of the third update too: updates 2 and 3 were saved
    run.flow.save(tmp_path / "expected", best)
    exported, expected = (load_file(f / "pytorch_lora_weights.safetensors") for f in (tmp_path, tmp_path / "expected"))
    assert run.state.best_global_step == 2 and all((exported[k] == expected[k]).all() for k in expected)


def test_a_best_that_was_not_saved_and_is_not_wanted_stops_nothing(tmp_path):
    """With one checkpoint to keep, the last update of a run was once followed by a search for that of the best one."""
    run = trainer(
        tmp_path, save_steps=2, max_steps=2, load_best_model_at_end=False, metric_for_best_model="eval_reward"
    )
    run.train()
    assert run.state.best_global_step == 1 and (tmp_path / "checkpoint-2").is_dir()


def test_a_run_in_another_folder_keeps_the_best_of_before(tmp_path):
    """It once looked for it in its own folder, where it is not."""
    trainer(tmp_path / "before", max_steps=1, lr_scheduler_type="constant").train()
    run = trainer(tmp_path / "after", max_steps=2, lr_scheduler_type="constant")
    run.train(resume_from_checkpoint=str(tmp_path / "before" / "checkpoint-1"))
    assert run.state.best_model_checkpoint == str(tmp_path / "before" / "checkpoint-1")
    assert run.handed_on.best == 1


def test_without_rewards_the_loss_decides(tmp_path, caplog):
    saving = {"save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1}
    run = sft(tmp_path, eval_dataset=True, load_best_model_at_end=True, **saving)
    assert run.args.metric_for_best_model == "eval_loss" and not run.args.greater_is_better
    assert "chosen by eval_loss: no held-out samples are scored" in caplog.text
    run.train()
    run.finish("tiny", "images")
    losses = {entry["step"]: entry["eval_loss"] for entry in run.state.log_history if "eval_loss" in entry}
    assert run.state.best_global_step == min(losses, key=losses.get)


def test_a_measure_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ValueError, match="chosen by eval_reward and no held-out samples are scored"):
        trainer(tmp_path, held_out=None, eval_strategy="no", save_strategy="best")
    with pytest.raises(ValueError, match="save_strategy best saves after evaluations and eval_strategy is no"):
        trainer(tmp_path, eval_strategy="no", save_strategy="best")  # once: a run without a checkpoint
    run = trainer(tmp_path, metric_for_best_model="eval_rewad")
    with pytest.raises(NotMeasured, match=r"'eval_rewad' is not measured\. Did you mean 'eval_reward'\?"):
        run.train()
    assert (tmp_path / "checkpoint-1").is_dir()
