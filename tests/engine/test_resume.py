"""What a resume must not change is refused by name, for every algorithm, from the command line and from Python."""

import dataclasses
import json
import shlex
import shutil
from pathlib import Path

import pytest
from datasets import Dataset
from matching_runs import GROUNDED, dpo, sft

from align import sft as door
from align.cli.arguments import ModelArguments
from align.cli.data import DataArguments
from align.cli.images import CaptionedDataArguments, PreferenceDataArguments
from align.cli.launch import check_adapter_stays, settings_beside
from align.dpo import DPOConfig
from align.dpo_online import OnlineDPOConfig
from align.engine.resume import ROWS_PER_UPDATE, ResumePlan, _option, clear_earlier_run, describe_inputs, plan_resume
from align.engine.settings import FlowConfig, check_settings, setting, values_of
from align.grpo import GRPOConfig
from align.models.qwen_image import QwenImage
from align.nft import NFTConfig
from align.sft import SFTConfig
from preference_data.readers import read_captioned
from rewards import load_rewards

SAVING = {"max_steps": 1, "save_strategy": "steps", "save_steps": 1}


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, Path]:
    """The checkpoint of a run of one update of each algorithm that learns from data."""
    folder = tmp_path_factory.mktemp("runs")
    sft(folder / "sft", cache_dir=str(folder / "cache"), **SAVING).train()
    dpo(folder / "dpo", cache_dir=str(folder / "cache"), **SAVING).train()
    return {name: folder / name / "checkpoint-1" for name in ("sft", "dpo")}


@pytest.mark.parametrize("algorithm", ["sft", "dpo"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"seed": 7},
            "seed is 7 and was 42 when .*: resume with --seed 42, or start a new run, in another output_dir, from",
        ),
        ({"data_seed": 7}, "data_seed is 7 and was None when .*: resume without --data_seed,"),
        ({"logit_mean": 0.5}, "logit_mean is 0.5 and was 0.0 when .*: resume with --logit_mean 0.0,"),
        ({"logit_std": 0.5}, "logit_std is 0.5 and was 1.0"),
        ({"height": 32, "width": 32}, "height is 32 and was 64, width is 32 and was 64 when .* --height 64 --width 64"),
        ({"resolution": 48}, "resolution is 48 and was None"),
        ({"max_aspect_ratio": 1.5}, "max_aspect_ratio is 1.5 and was 2.0"),
        (
            {"negative_prompt": "grey"},
            "negative_prompt is 'grey' and was ' ' when .*: resume with --negative_prompt ' '",
        ),
        ({"eval_seed": 5}, "eval_seed is 5 and was 1234"),
        ({"eval_sigmas": 3}, "eval_sigmas is 3 and was 5"),
        ({"per_device_train_batch_size": 2}, "= 2 rows an update, and it was 4 when .*: resume with --per_device"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_another_update_is_refused_by_name(runs, tmp_path, algorithm, change, message):
    run = {"sft": sft, "dpo": dpo}[algorithm](tmp_path, cache_dir=str(runs["sft"].parents[1] / "cache"), **change)
    with pytest.raises(ValueError, match=message):
        run.train(resume_from_checkpoint=str(runs[algorithm]))
    assert not list(tmp_path.glob("checkpoint-*"))


def test_the_advice_can_be_typed():
    typed = shlex.split(_option("lr_scheduler_kwargs", {"min_lr": 0.1}))
    assert typed[0] == "--lr_scheduler_kwargs" and json.loads(typed[1]) == {"min_lr": 0.1}
    assert shlex.split(_option("rewards", ["a.py:b", "it's"])) == ["--rewards", "a.py:b", "it's"]


@pytest.mark.parametrize("decay", [0.9, None])
def test_a_moving_average_that_comes_or_goes_is_refused(runs, tmp_path, decay):
    cache = str(runs["sft"].parents[1] / "cache")
    sft(tmp_path / "first", cache_dir=cache, ema_decay=decay, **SAVING).train()
    again = sft(tmp_path / "again", cache_dir=cache, ema_decay=0.9 if decay is None else None)
    with pytest.raises(ValueError, match=r"ema_decay is .* and was"):
        again.train(resume_from_checkpoint=str(tmp_path / "first" / "checkpoint-1"))


def test_settings_of_data_and_model_are_refused_by_name_on_the_command_line(runs, tmp_path):
    words = {
        "dataset_name": GROUNDED, "output_dir": tmp_path / "out", "height": 64, "width": 64, "lora_r": 4, "lora_alpha": 8,
        "per_device_train_batch_size": 4, "use_cpu": True, "cache_dir": runs["sft"].parents[1] / "cache",
        "num_inference_steps": 2, **SAVING,
    }  # fmt: skip
    start(words)
    resumed = words | {"max_steps": 2, "resume_from_checkpoint": True}
    for change, message in (
        ({"trigger": "mystyle"}, "trigger is 'mystyle' and was None when .*: resume without --trigger"),
        ({"dtype": "bfloat16"}, "dtype is 'bfloat16' and was 'float32' when .*: resume with --dtype float32"),
    ):
        with pytest.raises(SystemExit, match=message):
            start(resumed | change)
    start(resumed)
    assert (tmp_path / "out" / "checkpoint-2").is_dir()


def test_all_that_differs_stands_in_one_table(runs, tmp_path, caplog):
    """What the checkpoint's optimizer holds, and the data, are refused; what is taken over is said."""
    cache = str(runs["sft"].parents[1] / "cache")
    rows = list(read_captioned(GROUNDED))
    edited = [dataclasses.replace(rows[0], prompt="another caption"), *rows[1:]]
    for change, data, message in (
        (
            {"learning_rate": 1e-4},
            None,
            r"learning_rate is 0\.0001 and was 0\.001 when .*: resume with --learning_rate 0\.001",
        ),
        ({"optim": "sgd"}, None, "optim is 'sgd' and was 'adamw_torch.*: resume with --optim adamw_torch"),
        (
            {"lr_scheduler_type": "cosine", "warmup_steps": 2},
            None,
            "resume with --lr_scheduler_type linear --warmup_steps 0",
        ),
        ({"adam_beta2": 0.95}, None, r"adam_beta2 is 0\.95 and was 0\.999"),
        (
            {"max_steps": 9},
            edited,
            r"training_data is '160 records, .*' and was '160 records, .*with the data as they were",
        ),
        ({}, rows[1:], "training_data is '159 records, "),
    ):
        run = sft(tmp_path / "new", data, cache_dir=cache, **change)
        with pytest.raises(ValueError, match=message):
            run.train(resume_from_checkpoint=str(runs["sft"]))
    table = [line.split() for line in caplog.text.splitlines() if line.startswith("  ")]
    assert ["learning_rate", "0.001", "0.0001", "refused"] in table
    assert [
        "max_steps",
        "1",
        "9",
        *[
            "taken",
            "over;",
            "from",
            "here",
            "on",
            "the",
            "linear",
            "schedule",
            "is",
            "that",
            "of",
            "the",
            "new",
            "length",
        ],
    ] in table
    assert next(row for row in table if row[0] == "training_data")[-1] == "refused"


def test_the_same_data_elsewhere_are_the_same_data(runs, tmp_path, caplog):
    moved = shutil.copytree(GROUNDED, tmp_path / "moved")
    run = sft(
        tmp_path / "new", read_captioned(str(moved)), cache_dir=str(runs["sft"].parents[1] / "cache"), max_steps=1
    )
    run.train(resume_from_checkpoint=str(runs["sft"]))
    assert "what differs" not in caplog.text


def test_a_run_that_is_complete_gets_no_update_more(tmp_path):
    """Started once more, as a scheduler does, it once trained beyond its end, one update each time."""
    data = list(read_captioned(GROUNDED))[:8]  # 2 updates an epoch
    first = sft(tmp_path, data, **SAVING, lr_scheduler_type="constant")
    first.train()
    before = first.trained_parameters()
    for length in ({"max_steps": 1}, {"max_steps": -1, "num_train_epochs": 0.5}):
        again = sft(tmp_path, data, **SAVING | length, lr_scheduler_type="constant")
        again.train(resume_from_checkpoint=True)
        after = again.trained_parameters()
        assert again.state.global_step == 1 and all((after[name] == before[name]).all() for name in before)


def test_a_checkpoint_of_weights_alone_is_no_place_to_go_on_from(tmp_path):
    """A fresh optimizer would begin there without a word."""
    sft(tmp_path / "first", save_only_model=True, **SAVING).train()
    again = sft(tmp_path / "again", cache_dir=str(tmp_path / "first" / "cache"), max_steps=2)
    with pytest.raises(ValueError, match=r"checkpoint-1 holds weights and no optimizer .*from its LoRA with --adapter"):
        again.train(resume_from_checkpoint=str(tmp_path / "first" / "checkpoint-1"))


def start(words: dict) -> None:
    """SFT, by the command line."""
    door.main([str(word) for name, value in words.items() for word in (f"--{name}", value)])


def test_several_settings_are_advised_as_one_can_type_them(runs, tmp_path):
    run = sft(tmp_path, cache_dir=str(runs["sft"].parents[1] / "cache"), seed=7, data_seed=7, height=32)
    with pytest.raises(ValueError, match=r"resume with --seed 42 --height 64 and without --data_seed, or"):
        run.train(resume_from_checkpoint=str(runs["sft"]))


# --- What a new run leaves alone, and what it clears ---

#: What runs leave, and what they do not.
LEFT = ["checkpoint-1/model.safetensors", "transformer/config.json", "pytorch_lora_weights.safetensors"]
LEFT += [
    "trainer_state.json",
    "README.md",
    "reward_curve.png",
    "samples/step-000000.png",
    "rollouts/part-00000.parquet",
]
OTHERS = ["samples/mine.png", "rollouts/notes.txt", "notes.md"]


def fill(folder: Path, names: list[str]) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("{}")
    return folder


@pytest.mark.parametrize("name", LEFT[:4])
def test_what_a_run_left_is_not_overwritten_unasked(tmp_path, name):
    fill(tmp_path, [name])
    with pytest.raises(FileExistsError, match=f"holds {name.split('/')[0]} of an earlier run"):
        plan_resume(FlowConfig(str(tmp_path), use_cpu=True), {}, None)
    assert plan_resume(FlowConfig(str(tmp_path), use_cpu=True, overwrite_output_dir=True), {}, None).folder is None


def test_a_model_is_never_overwritten(tmp_path):
    fill(tmp_path, ["model_index.json", "transformer/config.json"])
    with pytest.raises(FileExistsError, match=r"holds a model \(model_index.json\): pass another --output_dir"):
        plan_resume(FlowConfig(str(tmp_path), use_cpu=True, overwrite_output_dir=True), {}, None)


def test_only_what_a_run_left_is_cleared(tmp_path):
    clear_earlier_run(fill(tmp_path / "a", LEFT + OTHERS), keep_samples=False)
    assert sorted(str(p.relative_to(tmp_path / "a")) for p in (tmp_path / "a").rglob("*.*")) == sorted(OTHERS)
    clear_earlier_run(fill(tmp_path / "b", [LEFT[6], "README.md"]), keep_samples=True)
    assert (tmp_path / "b" / LEFT[6]).exists() and (tmp_path / "b/README.md").exists()  # of a project, not of a run


def test_an_earlier_run_is_kept_from_a_resume_out_of_another_folder_too(runs, tmp_path):
    cache = str(runs["sft"].parents[1] / "cache")
    run = sft(fill(tmp_path, ["checkpoint-9/model.safetensors"]), cache_dir=cache, max_steps=2)
    with pytest.raises(FileExistsError, match="holds checkpoint-9 of an earlier run"):
        run.train(resume_from_checkpoint=str(runs["sft"]))


def test_from_python_a_second_run_is_refused_and_clears_when_told_to(runs, tmp_path):
    cache = str(runs["sft"].parents[1] / "cache")
    run = sft(tmp_path, cache_dir=cache, **SAVING)
    run.train()
    with pytest.raises(FileExistsError, match="holds checkpoint-1 of an earlier run"):
        run.train()
    again = sft(tmp_path, cache_dir=cache, max_steps=2, overwrite_output_dir=True)
    again.train()
    assert not (tmp_path / "checkpoint-1").exists()


def test_an_adapter_in_the_folder_of_the_new_run_is_refused(runs, tmp_path):
    args = SFTConfig(output_dir=str(runs["sft"].parent), use_cpu=True, overwrite_output_dir=True)
    with pytest.raises(ValueError, match=r"the adapter .*checkpoint-1 lies in output_dir .* which a new run clears"):
        check_adapter_stays(str(runs["sft"]), args, ResumePlan())
    check_adapter_stays(str(runs["sft"]), args, ResumePlan(runs["sft"]))
    check_adapter_stays(str(runs["sft"]), dataclasses.replace(args, output_dir=str(tmp_path)), ResumePlan())


@pytest.mark.parametrize("data", [DataArguments, CaptionedDataArguments, PreferenceDataArguments])
def test_data_and_rewards_are_of_what_a_resume_names(data):
    secret = {"use": "brightness", "environment": {"variables": {"KEY": "5ec3e7"}}}
    _, free = settings_beside(data(dataset_name="mine", rewards=[secret]), ModelArguments())
    assert free["dataset_name"] == "mine" and "5ec3e7" not in str(free)
    prompts = Dataset.from_dict({"prompt": ["a", "b"]})
    inputs = describe_inputs(prompts, load_rewards([{"use": "brightness", "weight": 2}]), guard_datasets={"g": prompts})
    assert list(inputs.fixed) == ["training_data"] and inputs.fixed["training_data"].startswith("2 rows, ")
    assert inputs.free["rewards"][0].startswith("brightness (weight 2, ")
    assert inputs.free["held_out_data"] == [inputs.fixed["training_data"]]


def test_what_only_sft_has_is_refused_too(runs, tmp_path):
    with pytest.raises(ValueError, match=r"caption_dropout is 0\.5 and was 0\.1"):
        sft(tmp_path, caption_dropout=0.5).train(resume_from_checkpoint=str(runs["sft"]))


def test_the_objective_may_change_and_is_named(runs, tmp_path, caplog):
    again = dpo(tmp_path, max_steps=2, loss_type="hinge", cache_dir=str(runs["sft"].parents[1] / "cache"))
    again.train(resume_from_checkpoint=str(runs["dpo"]))
    assert again.state.global_step == 2 and "loss_type  sigmoid       hinge     taken over" in caplog.text


def test_the_command_line_says_so_before_a_model_is_loaded(runs, tmp_path, monkeypatch):
    def loaded(*args, **kwargs):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(QwenImage, "load", loaded)
    words = {
        "dataset_name": GROUNDED, "output_dir": tmp_path / "out", "height": 64, "width": 64, "lora_r": 4, "lora_alpha": 8,
        "per_device_train_batch_size": 4, "use_cpu": True, "logit_mean": 0.5, "learning_rate": 1e-3,
        "resume_from_checkpoint": runs["sft"],
    }  # fmt: skip
    with pytest.raises(SystemExit, match=r"error: logit_mean is 0.5 and was 0.0 when .* resume with --logit_mean 0.0"):
        door.main([str(word) for name, value in words.items() for word in (f"--{name}", value)])


def test_a_checkpoint_of_the_version_before_is_refused_with_a_way_on(runs, tmp_path):
    """Format 1 said of SFT and DPO how many rows an update has, and nothing else."""
    old = Path(shutil.copytree(runs["sft"], tmp_path / "old" / "checkpoint-1"))
    content = json.loads((old / "checkpoint.json").read_text()) | {"format": 1, "version": "0.1.0"}
    fixed = content["run"].pop("fixed_on_resume")
    content["run"] |= {"dealing": {ROWS_PER_UPDATE: fixed[ROWS_PER_UPDATE]}}
    (old / "checkpoint.json").write_text(json.dumps(content))
    with pytest.raises(
        ValueError,
        match=r"0\.1\.0 in format 1.*or start a new run, in another output_dir, from its LoRA with --adapter .*old",
    ):
        sft(tmp_path / "new").train(resume_from_checkpoint=str(old))


@pytest.mark.parametrize("config", [SFTConfig, DPOConfig, OnlineDPOConfig, GRPOConfig, NFTConfig])
def test_every_algorithm_says_what_is_fixed_in_its_fields(tmp_path, config):
    fixed = values_of(config(output_dir=str(tmp_path), use_cpu=True), fixed_on_resume=True)
    assert {"seed", "data_seed", "height", "width", "negative_prompt"} <= fixed.keys()
    if config is not SFTConfig and config is not DPOConfig:
        assert {"num_generations", "generation_batch_size", "num_iterations", "num_inference_steps"} <= fixed.keys()
    if config is not GRPOConfig:
        assert {"logit_mean", "logit_std"} <= fixed.keys()


def test_a_field_says_what_its_value_may_be():
    @dataclasses.dataclass
    class Some:
        count: int | None = setting(3, "How many.", least=1)
        share: float = setting(0.5, "A share.", least=0, most=1)
        rate: float = setting(0.1, "A rate.", above=0)

    check_settings(Some())
    check_settings(Some(count=None))
    for wrong, message in (
        ({"count": 0}, "count must be at least 1, found 0"),
        ({"share": 1.5}, r"share must lie in \[0, 1\], found 1.5"),
        ({"rate": 0}, "rate must be positive, found 0"),
    ):
        with pytest.raises(ValueError, match=message):
            check_settings(Some(**wrong))
