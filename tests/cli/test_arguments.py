"""Command line and config files, and every mistake in them: a sentence that helps, before any model is loaded."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from align import dpo, dpo_online, generate, grpo, nft, sft
from align.cli.arguments import (
    DTYPES,
    ModelArguments,
    parse,
    plain_errors,
    resolve_dataset,
)
from align.cli.configs import find_config, shipped
from align.engine.checkpoints import FORMAT
from align.grpo import DataArguments, GRPOConfig
from align.models.adapters import LORA_FILE
from align.models.families import outline
from align.models.qwen_image import QwenImage
from align.tiny import CHECKPOINT, PROMPTS

torch.set_num_threads(1)

ROOT = Path(__file__).parents[2]
TYPES = (DataArguments, ModelArguments, GRPOConfig)
REWARD = "def score(images, prompts):\n    return [0.0 for _ in images]\n"


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """The user stands in an empty folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


class ModelLoaded(AssertionError):
    """A model was loaded before the mistake was found."""


@pytest.fixture
def no_model(monkeypatch):
    """A tripwire: loading a model ends the test."""

    def loaded(*args, **kwargs):
        raise ModelLoaded

    monkeypatch.setattr(QwenImage, "load", loaded)


def arguments(**overrides) -> list[str]:
    """A command line that works, but for what is overridden: None leaves an argument out, a list gives many words."""
    settings = {
        "dataset_name": "tiny/background",
        "rewards": "warm_background",
        "output_dir": "run",
        "height": 64,
        "width": 64,
        "num_inference_steps": 4,
        "sde_window_size": 2,
        "num_generations": 4,
        "generation_batch_size": 8,
        "per_device_train_batch_size": 4,
        "max_steps": 1,
        "use_cpu": True,
    }
    words = []
    for key, value in (settings | overrides).items():
        if value is not None:
            words += [f"--{key}", *map(str, value if isinstance(value, list) else [value])]
    return words


def config(text: str, name: str = "config.yaml") -> str:
    with open(name, "w") as file:
        file.write(text)
    return name


def parsed(*words: str, **overrides):
    return parse(TYPES, [*arguments(**overrides), *words])


# --- Parsing ---


def test_a_command_line_becomes_three_dataclasses():
    data, model, args = parsed("--lora_r", "4", rewards=["a", "b"], seed=3)
    assert (type(data), type(model), type(args)) == TYPES
    assert (data.rewards, model.lora_r, model.use_peft, args.seed, args.sde_window_size) == (["a", "b"], 4, True, 3, 2)


@pytest.mark.parametrize("words", [["--config", "config.yaml"], ["--config=config.yaml"]])
def test_a_config_file_fills_in_what_the_command_line_leaves_out(words):
    config("seed: 3\nnum_iterations: 2\nmodel: tiny\n")
    _, model, args = parsed(*words, "--num_iterations", "5")
    assert (args.seed, args.num_iterations, model.model) == (3, 5, "tiny")


def test_required_arguments_may_stand_in_the_config_file():
    config("dataset_name: tiny/full\nrewards: [shapes_exact]\noutput_dir: elsewhere\n")
    data, _, args = parsed("--config", "config.yaml", dataset_name=None, rewards=None, output_dir=None)
    assert (data.dataset_name, data.rewards, args.output_dir) == ("tiny/full", ["shapes_exact"], "elsewhere")


def test_rewards_of_a_config_file_stay_mappings():
    config(
        "rewards:\n  - {use: shapes_exact, weight: 0.5}\n  - use: ./r.py:make\n    args: {scale: 2}\n  - shapes_word\n"
    )
    data, _, _ = parsed("--config", "config.yaml", rewards=None)
    assert data.rewards == [
        {"use": "shapes_exact", "weight": 0.5},
        {"use": "./r.py:make", "args": {"scale": 2}},
        "shapes_word",
    ]
    data, _, _ = parsed("--config", "config.yaml", rewards=["warm_background"])
    assert data.rewards == ["warm_background"]


@pytest.mark.parametrize(
    ("text", "key", "value"),
    [
        ("epsilon: 1e-4", "epsilon", 1e-4),  # YAML 1.1 reads this as text
        ("epsilon: 1.0e-4", "epsilon", 1e-4),
        ("learning_rate: 3e-4", "learning_rate", 3e-4),
        ("eval_delay: -1e-2", "eval_delay", -1e-2),
        ("eval_seed: -3", "eval_seed", -3),
        ("sde_window_range: [1, 4]", "sde_window_range", [1, 4]),
        ("sde_window_range:", "sde_window_range", None),
        ("bf16_full_eval: no", "bf16_full_eval", False),
        ("save_rollouts: true", "save_rollouts", True),
        ('save_strategy: "no"', "save_strategy", "no"),
        ("beta: 0", "beta", 0.0),
    ],
)
def test_values_of_a_config_file_have_their_type(text, key, value):
    config(text)
    found = getattr(parsed("--config", "config.yaml")[2], key)
    assert found == value and not (isinstance(value, float) and isinstance(found, str))


@pytest.mark.parametrize(
    ("words", "key", "value"),
    [
        (["--eval_seed", "-3"], "eval_seed", -3),
        (["--eval_delay", "-0.5"], "eval_delay", -0.5),
        (["--eval_delay=-5e-1"], "eval_delay", -0.5),
        (["--epsilon", "1e-4"], "epsilon", 1e-4),
        (["--num-iterations", "3"], "num_iterations", 3),
        (["--num_iterations=3"], "num_iterations", 3),
        (["--save_rollouts"], "save_rollouts", True),
        (["--save_rollouts", "false"], "save_rollouts", False),
        (["--negative_prompt", ""], "negative_prompt", ""),
        (["--sde_window_range", "1", "4"], "sde_window_range", [1, 4]),
    ],
)
def test_values_of_the_command_line_have_their_type(words, key, value):
    assert getattr(parsed(*words)[2], key) == value


@pytest.mark.parametrize("flag", ["--no_use_peft", "--no-use-peft"])
def test_what_is_on_by_default_has_a_flag_that_turns_it_off(flag):
    assert parsed()[1].use_peft and not parsed(flag)[1].use_peft


def test_the_environment_of_a_config_file_is_set(monkeypatch):
    monkeypatch.setenv("A_VARIABLE_OF_A_RUN", "before")
    config("env: {A_VARIABLE_OF_A_RUN: 7}\n")
    parsed("--config", "config.yaml")
    assert os.environ["A_VARIABLE_OF_A_RUN"] == "7"


@pytest.mark.parametrize(
    ("words", "fragments"),
    [
        (["--num_generation", "4"], ["unknown option --num_generation.", "Did you mean 'num_generations'?"]),
        (["--learning-rat=1"], ["unknown option --learning_rat.", "Did you mean 'learning_rate'?"]),
        (["--use_pef"], ["unknown option --use_pef.", "Did you mean 'use_peft'?"]),
        (["--no_offload"], ["unknown option --no_offload.", "Did you mean"]),
        (["--confg", "x.yaml"], ["unknown option --confg.", "Did you mean 'config'?"]),
        (["--config"], ["--config needs a file"]),
        (["stray"], ["stray"]),
    ],
)
def test_an_unknown_option_names_the_nearest(words, fragments):
    with pytest.raises(ValueError) as caught:
        parsed(*words)
    assert all(fragment in str(caught.value) for fragment in fragments), str(caught.value)


def test_an_abbreviated_option_is_not_guessed_at():
    with pytest.raises(ValueError, match="unknown option --num_iter"):
        parsed("--num_iter", "3")


@pytest.mark.parametrize(
    ("text", "fragments"),
    [
        ("num_generation: 4", ["unknown key 'num_generation' in config.yaml", "Did you mean 'num_generations'?"]),
        ("num-generations: 4", ["unknown key 'num-generations'", "Did you mean 'num_generations'?"]),
        ("zzzzzz: 4", ["unknown key 'zzzzzz' in config.yaml. --help lists all."]),
        ("config: other.yaml", ["unknown key 'config'"]),
        ("help: true", ["unknown key 'help'"]),
        ("3: 4", ["unknown key 3 in config.yaml"]),
        ("on: 4", ["unknown key True in config.yaml"]),
        ("- height: 64", ["config.yaml must hold a mapping of keys to values, found list"]),
        ("height", ["must hold a mapping of keys to values, found str"]),
        ("", ["must hold a mapping of keys to values, found NoneType"]),
        ("height: [1\nwidth: 2", ["config file config.yaml is not YAML", "line 2"]),
        ("height: 1\n\twidth: 2", ["config file config.yaml is not YAML", "line 2"]),
        ("height:", ["height in config.yaml has no value"]),
        ("rewards:", ["rewards in config.yaml has no value"]),
        ("env: 3", ["env"]),
    ],
)
def test_a_wrong_config_file_says_what_is_wrong(text, fragments):
    config(text)
    with pytest.raises(ValueError) as caught:
        parsed("--config", "config.yaml", height=None, rewards=None)
    assert all(fragment in str(caught.value) for fragment in fragments), str(caught.value)


def test_a_broken_config_file_is_told_without_the_broken_line():
    """The line may hold a key, and the message goes to a log."""
    config("seed: 1\nrewards: [{use: vlm_judge, environment: {variables: {JUDGE: hunter2}}")
    with pytest.raises(ValueError, match=r"is not YAML: .* in line \d+, column \d+") as caught:
        parsed("--config", "config.yaml", rewards=None)
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize("words", [["--config", "confg.yaml"], ["--config=confg.yaml"]])
def test_a_missing_config_file_names_the_nearest(words):
    config("seed: 3")
    with pytest.raises(FileNotFoundError, match=r"confg\.yaml does not exist\. Did you mean 'config\.yaml'\?"):
        parsed(*words)


def test_a_missing_config_file_in_a_missing_folder_is_named():
    with pytest.raises(FileNotFoundError, match=r"config file nowhere/a\.yaml does not exist"):
        parsed("--config", "nowhere/a.yaml")


# --- Errors in a sentence ---


@pytest.mark.parametrize("error", [ValueError, FileNotFoundError, FileExistsError, ImportError, ModuleNotFoundError])
def test_a_mistake_of_the_user_ends_in_a_sentence(error):
    with pytest.raises(SystemExit) as caught, plain_errors():
        raise error("the sentence")
    assert caught.value.code == "error: the sentence" and isinstance(caught.value.__cause__, error)


@pytest.mark.parametrize("error", [TypeError, KeyError, RuntimeError, AssertionError, KeyboardInterrupt])
def test_a_mistake_of_the_library_keeps_its_traceback(error):
    with pytest.raises(error), plain_errors():
        raise error("not the user's")


# --- Model arguments ---


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dtype": "bfloat"}, r"dtype 'bfloat' is unknown\. Did you mean 'bfloat16'\?"),
        ({"dtype": "zzz"}, r"dtype 'zzz' is unknown\. There are: bfloat16, float16, float32"),
        ({"use_peft": False, "lora_r": 4}, "use_peft: false asks for a full fine-tune and 'lora_r' for an adapter"),
        ({"use_peft": False, "lora_target_modules": ["to_q"]}, "'lora_target_modules' for an adapter"),
        ({"use_peft": False, "adapter": "somewhere"}, "'adapter' for an adapter"),
        ({"lora_r": 0}, "lora_r must be at least 1, found 0"),
        ({"lora_r": -4}, "lora_r must be at least 1, found -4"),
    ],
)
def test_model_arguments_that_cannot_work_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        ModelArguments(**settings)


def test_an_adapter_folder_needs_a_file(folder):
    (folder / "lora").mkdir()
    with pytest.raises(FileNotFoundError, match=rf"adapter folder lora has no {LORA_FILE}, nor any other"):
        ModelArguments(adapter="lora")


@pytest.mark.parametrize("setting", [{"lora_r": 8}, {"lora_alpha": 8}, {"lora_target_modules": ["to_q"]}])
def test_an_adapter_brings_its_own_settings(folder, setting, caplog):
    (folder / LORA_FILE).touch()
    assert ModelArguments(adapter=".").peft_config() is None
    assert ModelArguments(adapter=".", **setting).peft_config() is None
    assert f"{next(iter(setting))} is ignored: the adapter . defines it" in caplog.text


def test_a_full_fine_tune_of_half_precision_weights_is_refused():
    with pytest.raises(ValueError, match=r"loses most of its updates to rounding: use dtype: float32"):
        ModelArguments(use_peft=False, dtype="bfloat16")


def test_a_fresh_adapter_has_rank_sixteen_and_twice_that_as_alpha():
    fresh = ModelArguments().peft_config()
    assert (fresh.r, fresh.lora_alpha, fresh.lora_dropout, fresh.target_modules) == (16, 32, 0.0, None)
    asked = ModelArguments(lora_r=4, lora_target_modules=["to_q"]).peft_config()
    assert (asked.r, asked.lora_alpha, asked.target_modules) == (4, 8, {"to_q"})
    assert ModelArguments(lora_r=4, lora_alpha=1).peft_config().lora_alpha == 1


def test_a_full_fine_tune_has_no_adapter():
    assert ModelArguments(use_peft=False).peft_config() is None


@pytest.mark.parametrize("name", DTYPES)
def test_every_dtype_is_named_as_in_torch(name):
    assert DTYPES[ModelArguments(dtype=name).dtype] is getattr(torch, name)


@pytest.mark.parametrize(("height", "width"), [(64, 64), (16, 128), (512, 80)])
def test_a_resolution_of_whole_tokens_is_fine(height, width):
    assert outline("tiny").latent_shape(height, width) == (height * width // 256, 64)


@pytest.mark.parametrize(
    ("height", "width", "message"),
    [
        (60, 64, "height 60 must be a positive multiple of 16: the nearest are 48 and 64"),
        (64, 100, "width 100 must be a positive multiple of 16: the nearest are 96 and 112"),
        (0, 64, "height 0 must be a positive multiple of 16"),
        (64, -64, "width -64 must be a positive multiple of 16"),
        (8, 64, "height 8 must be a positive multiple of 16: the nearest are 16 and 32"),
    ],
)
def test_a_resolution_that_does_not_divide_names_the_nearest(height, width, message):
    with pytest.raises(ValueError, match=message):
        outline("tiny").latent_shape(height, width)


# --- Other people's modules ---


def test_a_door_by_its_path_does_not_lend_its_folders_to_rewards(monkeypatch):
    """`from metrics import x` in a reward once got a file of ours."""
    own = str(ROOT / "align")
    monkeypatch.setattr(sys, "path", [own, *sys.path])
    with pytest.raises(ValueError, match="unknown option"):
        parse((ModelArguments,), ["--no_such"])
    assert own not in sys.path


@pytest.mark.parametrize("name", ["rewards", "preference_data"])
@pytest.mark.parametrize("layout", ["{}.py", "{}/__init__.py"])
def test_a_file_that_hides_a_package_of_ours_is_named(tmp_path, name, layout):
    file = tmp_path / layout.format(name)
    file.parent.mkdir(exist_ok=True)
    file.write_text("")
    ended = subprocess.run([sys.executable, "-c", "import align"], cwd=tmp_path, capture_output=True, text=True)
    assert ended.returncode != 0 and f"{file} hides the package '{name}' of flow-align: rename" in ended.stderr


# --- Embedded data ---


def test_embedded_data_sets_are_found_by_name():
    for path in PROMPTS.iterdir():
        assert resolve_dataset(f"tiny/{path.name}") == str(path)


@pytest.mark.parametrize("name", ["somebody/prompts", "./data.jsonl", "prompts", "/data/x", "tinyx/full"])
def test_other_names_stay_as_they_are(name):
    assert resolve_dataset(name) == name


def test_a_folder_of_the_user_comes_before_an_embedded_name(folder):
    (folder / "tiny" / "full").mkdir(parents=True)
    assert resolve_dataset("tiny/full") == "tiny/full"


@pytest.mark.parametrize(("name", "end"), [("tiny/backgroun", "mean 'tiny/background'"), ("tiny", "There are: tiny/")])
def test_an_unknown_embedded_name_names_the_nearest(name, end):
    with pytest.raises(FileNotFoundError, match=f"no embedded data set '{name}'.*{end}"):
        resolve_dataset(name)


# --- Bad input to the trainer's command line ---


def answer(*words: str, **overrides) -> str:
    """What the command line says before it ends; it must end with a sentence."""
    with pytest.raises(SystemExit) as caught:
        grpo.main([*arguments(**overrides), *words])
    assert isinstance(caught.value.code, str) and caught.value.code.startswith("error: "), caught.value.code
    return caught.value.code


@pytest.mark.usefixtures("no_model")
def test_the_command_line_below_works_but_for_its_one_mistake():
    with pytest.raises(ModelLoaded):
        grpo.main(arguments())


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize(
    ("overrides", "fragments"),
    [
        ({"rewards": "shapes_folowing"}, ["unknown reward 'shapes_folowing'", "Did you mean 'shapes_following'?"]),
        ({"rewards": ["shapes_exact", "shapes_exact"]}, ["two rewards are both called 'shapes_exact'"]),
        ({"rewards": "./my_rewrd.py:score"}, ["my_rewrd.py does not exist", "Did you mean 'my_reward.py'?"]),
        ({"rewards": "./my_reward.py:skore"}, ["has no 'skore'", "Did you mean 'score'?"]),
        ({"rewards": "no_such_package.rewards:score"}, ["'no_such_package.rewards' was not found"]),
        ({"rewards": "./my_reward.py:needs_target"}, ["'needs_target' needs the data column 'target'", "There are: "]),
        ({"dataset_name": "./promts.jsonl"}, ["./promts.jsonl does not exist", "Did you mean 'prompts.jsonl'?"]),
        ({"dataset_name": "tiny/backgroun"}, ["no embedded data set", "Did you mean 'tiny/background'?"]),
        ({"dataset_name": "somebody/prompts"}, ["'somebody/prompts' is no file or folder here", "Give a path"]),
        ({"dataset_name": "./no_prompt.jsonl"}, ["no_prompt.jsonl has no column 'prompt'", "rename 'prompts'?"]),
        ({"dataset_name": "./empty_prompt.jsonl"}, ["empty_prompt.jsonl, row 1, column 'prompt'", "is empty"]),
        ({"dataset_name": "./empty.jsonl"}, ["empty.jsonl holds no rows"]),
        ({"dataset_name": "./broken.jsonl"}, ["cannot read prompts from", "broken.jsonl"]),
        ({"dataset_name": "./prompts.jsonl", "generation_batch_size": 16}, ["takes 4 prompts", "data holds 2"]),
        ({"dataset_split": "validation"}, ["no file for the split 'validation'", "It has: test.jsonl, train.jsonl"]),
        ({"eval_dataset_name": "tiny/ful", "eval_strategy": "steps"}, ["'tiny/ful'", "Did you mean 'tiny/full'?"]),
        ({"eval_dataset_name": "./no_prompt.jsonl"}, ["has no column 'prompt'"]),
        ({"guard_dataset_names": ["tiny/full", "tiny/wrds"]}, ["'tiny/wrds'", "Did you mean 'tiny/words'?"]),
        (
            {"guard_dataset_names": "./prompts.jsonl", "eval_dataset_name": "tiny/full"},
            ["'warm_background' needs the data column 'spec'"],
        ),
        ({"eval_strategy": "steps"}, ["eval_strategy is set and there is no held-out data", "--eval_dataset_name"]),
        ({"eval_on_start": True}, ["there is no held-out data"]),
        ({"model": "./no_such_model"}, ["model folder './no_such_model' does not exist", "owner/name", "tiny"]),
        ({"model": "tinny"}, ["model folder 'tinny' does not exist", "Did you mean 'tiny'?"]),
        ({"model": "somebody/some-model"}, ["'somebody/some-model' is not in the local cache", "hf download somebody"]),
        ({"model": "."}, ["holds no model_index.json"]),
        ({"height": 60}, ["height 60 must be a positive multiple of 16", "48 and 64"]),
        ({"width": 100}, ["width 100 must be a positive multiple of 16", "96 and 112"]),
        ({"dtype": "bfloat"}, ["dtype 'bfloat' is unknown", "Did you mean 'bfloat16'?"]),
        ({"use_peft": False, "lora_r": 4}, ["full fine-tune", "'lora_r'", "leave one of them out"]),
        ({"use_peft": False, "adapter": "lora"}, ["full fine-tune", "'adapter'", "leave one of them out"]),
        ({"adapter": "lora"}, ["adapter lora does not exist here: give a .safetensors file, or its folder"]),
        ({"adapter": "some/lora"}, ["adapter some/lora does not exist here", "hf download some/lora"]),
        ({"adapter": str(CHECKPOINT / "vae")}, ["tensors belong to no linear layer", "Names that do are like transf"]),
        ({"num_generations": 1}, ["num_generations must be at least 2", "found 1"]),
        ({"num_generations": 3}, ["generation_batch_size 8 must be a multiple of num_generations 3", "nearest is 9"]),
        ({"per_device_train_batch_size": 5}, ["8 images x 2 trained steps = 16 transitions", "does not divide"]),
        ({"gradient_accumulation_steps": 3}, ["= 12 does not divide"]),
        ({"per_device_train_batch_size": 0}, ["per_device_train_batch_size must be at least 1"]),
        ({"beta": -0.1}, ["beta must be at least 0, found -0.1"]),
        ({"sde_window_size": 5}, ["sde_window_size 5 must lie within [1, 4]"]),
        ({"sde_window_range": [3, 5]}, ["sde_window_range [3, 5] must lie within [0, 4]"]),
        ({"sde_window_range": [2, 4], "sde_type": "cps"}, ["within [0, 3]", "the last of cps having no noise"]),
        ({"noise_level": 0}, ["noise_level must lie in (0, 10]"]),
        ({"resume_from_checkpoint": "elsewhere/checkpoint-3"}, ["resume from: elsewhere/checkpoint-3"]),
    ],
)
def test_a_mistake_is_answered_before_a_model_is_loaded(folder, overrides, fragments):
    (folder / "my_reward.py").write_text(REWARD + "def needs_target(images, prompts, target):\n    return target\n")
    (folder / "prompts.jsonl").write_text('{"prompt": "a"}\n{"prompt": "b"}\n')
    (folder / "no_prompt.jsonl").write_text('{"prompts": "a"}\n')
    (folder / "empty_prompt.jsonl").write_text('{"prompt": "a"}\n{"prompt": " "}\n')
    (folder / "empty.jsonl").touch()
    (folder / "broken.jsonl").write_text('{"prompt": "a"\n')
    if overrides.get("dataset_name", "").startswith("./"):
        overrides = {"rewards": "./my_reward.py:score"} | overrides
    said = answer(**overrides)
    assert all(fragment in said for fragment in fragments), said
    assert not (folder / "run").exists()


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize(
    ("text", "fragments"),
    [
        ("num_generation: 4", ["unknown key 'num_generation'", "Did you mean 'num_generations'?"]),
        ("rewards: [{use: shapes_exact, wieght: 1}]", ["unknown key 'wieght'", "Did you mean 'weight'?"]),
        (
            "rewards: [{use: shapes_preference}]",
            ["'shapes_preference' do not fit: missing a required argument: 'attribute'"],
        ),
        ("rewards: [{use: shapes_exact, weight: .inf}]", ["'shapes_exact' must be a finite number"]),
        ("rewards: [null]", ["None is NoneType"]),
        ("rewards: shapes_exakt", ["unknown reward 'shapes_exakt'", "Did you mean 'shapes_exact'?"]),
        ("scale_rewards: groop", ["scale_rewards must be one of group, batch, none, found 'groop'"]),
        ("log_prob_reduction: median", ["log_prob_reduction must be one of mean, sum"]),
        ("height: [1", ["config.yaml is not YAML"]),
        ("height:", ["height in config.yaml has no value"]),
        ("- height", ["must hold a mapping"]),
    ],
)
def test_a_mistake_in_a_config_file_is_answered_before_a_model_is_loaded(text, fragments):
    config(text)
    rewards = None if text.startswith("rewards") else "shapes_exact"
    said = answer("--config", "config.yaml", rewards=rewards, height=None)
    assert all(fragment in said for fragment in fragments), said


@pytest.mark.usefixtures("no_model")
def test_a_single_reward_in_a_config_file_needs_no_list():
    for text in ("rewards: shapes_exact", "rewards: {use: shapes_exact, weight: 2}"):
        with pytest.raises(ModelLoaded):
            grpo.main([*arguments(rewards=None), "--config", config(text)])


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize("part", ["scheduler", "text_encoder", "tokenizer", "transformer", "vae"])
@pytest.mark.parametrize("emptied", [False, True])
def test_a_model_folder_without_a_part_names_it(folder, part, emptied):
    light = shutil.ignore_patterns("*.safetensors")
    shutil.copytree(CHECKPOINT, folder / "model", ignore=light)
    shutil.rmtree(folder / "model" / part)
    if emptied:
        (folder / "model" / part).mkdir()
    said = answer(model="./model")
    assert f"has no '{part}'" in said and "needs: scheduler, text_encoder, tokenizer, transformer, vae" in said


@pytest.mark.usefixtures("no_model")
def test_an_earlier_run_is_not_overwritten_unless_asked(folder):
    (folder / "run" / "checkpoint-12").mkdir(parents=True)
    (folder / "run" / "checkpoint-12" / "trainer_state.json").write_text(json.dumps({"global_step": 12}))
    said = answer(resume_from_checkpoint=True)
    assert "no checkpoint in run is complete: run/checkpoint-12 has no checkpoint.json" in said
    run = {
        "algorithm": {"algorithm": "GRPO"},
        "trained": {"tuning": "LoRA"},
    }  # what a part does not say is not compared
    content = {"format": FORMAT, "version": "0.1.0", "run": run, "files": {"trainer_state.json": 19, "optimizer.pt": 2}}
    (folder / "run" / "checkpoint-12" / "optimizer.pt").write_text("{}")
    (folder / "run" / "checkpoint-12" / "checkpoint.json").write_text(json.dumps(content))
    said = answer()
    assert "run holds checkpoint-12 of an earlier run" in said
    for way_out in ("--resume_from_checkpoint true", "--overwrite_output_dir", "another --output_dir"):
        assert way_out in said
    for overrides in ({"resume_from_checkpoint": True}, {"overwrite_output_dir": True}, {"output_dir": "other"}):
        with pytest.raises(ModelLoaded):
            grpo.main(arguments(**overrides))


@pytest.mark.usefixtures("no_model")
def test_dropout_in_the_adapter_is_refused():
    said = answer(lora_dropout=0.1)
    assert "lora_dropout must be 0" in said and "two different policies" in said


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize(
    ("overrides", "fragments"),
    [
        ({"dataset_name": None}, ["required: --dataset_name"]),
        ({"rewards": None}, ["required: --rewards"]),
        ({"seed": "abc"}, ["--seed", "abc"]),
        ({"sde_type": "sdee"}, ["--sde_type", "sdee", "sde", "cps"]),
        ({"eval_strategy": "sometimes"}, ["--eval_strategy", "sometimes", "epoch"]),
        ({"use_peft": "maybe"}, ["--use_peft", "maybe"]),
    ],
)
def test_what_the_parser_itself_refuses_names_the_option_without_the_usage_of_all(overrides, fragments, capsys):
    said = answer(**overrides)
    assert all(fragment in said for fragment in fragments), said
    assert "usage" not in said and "usage" not in capsys.readouterr().err


# --- Without a word, and help ---


@pytest.mark.parametrize("door", [grpo, nft, dpo, dpo_online, sft, generate])
@pytest.mark.parametrize("by_path", [True, False])
def test_without_a_word_three_lines_say_what_to_type(door, by_path, monkeypatch, capsys):
    started = f"align/{door.__name__.split('.')[1]}.py" if by_path else "door.py"
    monkeypatch.setattr("sys.argv", [started])
    with pytest.raises(SystemExit) as caught:
        door.main()
    assert not caught.value.code
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    command, _, config_name = lines[0].partition(": ")[2].rpartition(" --config ")
    assert config_name in shipped()
    name = door.__name__.split(".")[1]
    assert command == (f"accelerate launch {started}" if started != "door.py" else f"flow-align {name}")


def test_help_shows_our_options_before_those_of_transformers_and_says_where_each_is_declared(capsys):
    with pytest.raises(SystemExit):
        grpo.main(["--help"])
    text = capsys.readouterr().out
    titles = [line.rstrip(":") for line in text.splitlines() if line.endswith("):") and not line.startswith(" ")]
    assert titles == [
        "DataArguments (align/cli/data.py)",
        "ModelArguments (align/cli/arguments.py)",
        "GRPOConfig (align/grpo.py)",
        "AdvantageConfig (align/online/settings.py)",
        "OnlineConfig (align/online/settings.py)",
        "FlowConfig (align/engine/settings.py)",
        "TrainingArguments (transformers)",
    ]
    assert (
        text.startswith("usage: flow-align grpo --config FILE_OR_NAME")
        and "--max_steps" not in text[: text.index("--noise_level")]
    )
    own, theirs = text.split("TrainingArguments (transformers)")
    for option in ("--noise_level", "--num_generations", "--seed", "--adapter"):
        assert f"  {option} " in own and f"  {option} " not in theirs
    assert "  --max_steps " in theirs


# --- Shipped configs by name ---


def test_a_shipped_config_is_found_by_its_name(folder):
    _, _, args = parsed("--config", "tiny/grpo", num_generations=None, generation_batch_size=None)
    assert (args.num_generations, args.generation_batch_size) == (8, 256)
    assert find_config("tiny/grpo") == find_config("tiny/grpo.yaml") == shipped()["tiny/grpo"]
    (folder / "tiny").mkdir()
    (folder / "tiny" / "grpo.yaml").write_text("seed: 9")
    assert find_config("tiny/grpo.yaml").read_text() == "seed: 9"  # the user's own file comes first


def test_an_unknown_name_of_a_config_names_the_nearest():
    with pytest.raises(FileNotFoundError, match=r"config file tiny/gpro does not exist\. Did you mean 'tiny/grpo'\?"):
        find_config("tiny/gpro")
