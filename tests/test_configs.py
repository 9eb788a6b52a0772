"""Every shipped config is loaded, by the same code that a run uses."""

from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file

from align.cli.arguments import ModelArguments, parse, resolve_dataset
from align.cli.images import CaptionedDataArguments, PreferenceDataArguments
from align.dpo import DPOConfig
from align.dpo_online import OnlineDPOConfig
from align.generate import GenerateArguments
from align.grpo import DataArguments, GRPOConfig
from align.models.families import outline
from align.nft import NFTConfig
from align.online.trainer import check_online_data
from align.sampling.held_out import check_columns
from align.sft import SFTConfig
from preference_data.buckets import make_buckets
from preference_data.prompts import load_prompts
from rewards import load_rewards

ROOT = Path(__file__).parents[1]
GRPO = sorted(path for family in ("tiny", "qwen_image") for path in (ROOT / "configs" / family).glob("grpo*.yaml"))
IMAGES = {"sft": (CaptionedDataArguments, SFTConfig), "dpo": (PreferenceDataArguments, DPOConfig)}
ONLINE = sorted((ROOT / "configs").glob("*/dpo_online*.yaml"))
NFT = sorted((ROOT / "configs").glob("*/nft*.yaml"))
MATCHING = sorted(p for name in IMAGES for p in (ROOT / "configs").glob(f"*/{name}*.yaml") if p not in ONLINE)
GENERATE = sorted((ROOT / "configs").glob("*/generate*.yaml"))
LAUNCHERS = sorted((ROOT / "configs/accelerate").glob("*.yaml"))


def test_there_is_nothing_among_the_configs_that_no_test_loads():
    assert sorted((ROOT / "configs").rglob("*.yaml")) == sorted(
        [*GRPO, *ONLINE, *NFT, *MATCHING, *GENERATE, *LAUNCHERS]
    )


def check_found(data, model, args) -> dict:
    """Prompts, rewards and model of an online trainer fit together; returns what was loaded."""
    found = data.load()
    found["rewards"] = load_rewards(found["rewards"])
    prompts = [d for d in (found["eval_dataset"], *found["guard_datasets"].values()) if d is not None]
    check_columns(found["rewards"], prompts)
    args.check_evaluation(found["eval_dataset"] is not None)
    check_online_data(found["rewards"], args, found["train_dataset"], found["eval_dataset"], found["guard_datasets"])
    outline(model.model).latent_shape(args.height, args.width)
    return found


@pytest.mark.parametrize("path", GRPO, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_grpo_config_parses_and_its_sums_come_out(path):
    processes = 1 if path.parent.name == "tiny" else 8  # as its header says
    flags = [] if path.parent.name == "tiny" else ["--bf16", "false"]  # refused on a machine without an accelerator
    _, model, args = parse((DataArguments, ModelArguments, GRPOConfig), ["--config", str(path), *flags])
    args.check_world(processes)
    updates = args.micro_batches_per_rollout(processes) / args.gradient_accumulation_steps
    assert updates == int(updates) >= 1
    assert len(args.window.steps(0)) == args.window.width
    assert (model.peft_config() is not None) == model.use_peft


@pytest.mark.parametrize("path", [p for p in GRPO if p.parent.name == "tiny"], ids=lambda path: path.stem)
def test_tiny_config_finds_its_data_rewards_and_model(path):
    data, model, args = parse((DataArguments, ModelArguments, GRPOConfig), ["--config", str(path)])
    check_found(data, model, args)


@pytest.mark.parametrize("path", ONLINE, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_online_dpo_config_finds_its_data_and_its_sums_come_out(path):
    data, model, args = parse((DataArguments, ModelArguments, OnlineDPOConfig), ["--config", str(path)])
    check_found(data, model, args)
    args.check_world(1)
    assert args.micro_batches_per_pass(1) % args.gradient_accumulation_steps == 0


@pytest.mark.parametrize("path", NFT, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_nft_config_finds_its_data_and_its_sums_come_out(path):
    tiny = path.parent.name == "tiny"
    flags = [] if tiny else ["--bf16", "false"]  # refused on a machine without an accelerator
    data, model, args = parse((DataArguments, ModelArguments, NFTConfig), ["--config", str(path), *flags])
    processes = 1 if tiny else 8  # as its header says
    args.check_world(processes)
    assert args.micro_batches_per_rollout(processes) % args.gradient_accumulation_steps == 0
    if tiny:
        check_found(data, model, args)


RECIPES = yaml.safe_load((ROOT / "tests/bench/recipes.yaml").read_text())


@pytest.mark.parametrize(("task", "name"), [(task, name) for task in RECIPES for name in RECIPES[task]["recipes"]])
def test_recipe_of_the_benchmark_overrides_its_config_and_its_sums_come_out(tmp_path, task, name):
    task, recipe = RECIPES[task], RECIPES[task]["recipes"][name]
    shipped = yaml.safe_load((ROOT / recipe.get("config", task["config"])).read_text())
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(shipped | task["settings"] | recipe.get("settings", {})))
    config_type = NFTConfig if recipe.get("script") == "align/nft.py" else GRPOConfig
    found = parse((DataArguments, ModelArguments, config_type), ["--config", str(path)])
    found[2].check_world(1)
    loaded = check_found(*found)
    guards, measures = loaded["guard_datasets"], {reward.name for reward in loaded["rewards"]}
    assert set(task["targets"]) <= measures
    assert set(task["guards"]) <= measures | {"diversity"} | {f"full_{name}" for name in measures if guards}


def identify(path: Path) -> str:
    return f"{path.parent.name}-{path.stem}"


@pytest.mark.parametrize("path", MATCHING, ids=identify)
def test_config_of_a_trainer_on_images_parses_and_its_sizes_fit(path):
    flags = [] if path.parent.name == "tiny" else ["--bf16", "false"]  # refused on a machine without an accelerator
    data_type, config_type = IMAGES[path.stem.split("_")[0]]
    data, model, args = parse((data_type, ModelArguments, config_type), ["--config", str(path), *flags])
    assert make_buckets(args.bucket_resolution(16), 16, args.max_aspect_ratio)
    assert data.dataset_name and (model.peft_config() is not None) == model.use_peft
    if path.parent.name == "tiny":
        samples = data.load_samples()
        assert load_rewards(samples["rewards"]) and samples["eval_prompts"] is not None
        outline(model.model).latent_shape(args.height, args.width)
    if path == ROOT / "configs/tiny/sft_style.yaml":  # its images travel with the package
        found = data.load()
        assert len(list(found["train_dataset"])) == 160 and len(list(found["eval_dataset"])) == 40


@pytest.mark.parametrize("path", GENERATE, ids=identify)
def test_config_that_makes_preferences_finds_its_prompts_and_rewards(path):
    args, model = parse((GenerateArguments, ModelArguments), ["--config", str(path)])
    args.check()
    if path.parent.name != "tiny":
        return  # its prompts, reward and model are the user's
    outline(model.model).latent_shape(args.height, args.width)
    check_columns(load_rewards(args.rewards), [load_prompts(resolve_dataset(args.dataset_name), args.dataset_split)])


@pytest.mark.parametrize("path", [*GRPO, *ONLINE, *NFT, *MATCHING, *GENERATE, *LAUNCHERS], ids=lambda path: path.stem)
def test_header_of_a_config_says_its_command(path):
    header = [line for line in path.read_text().splitlines() if line.startswith("#")]
    assert any("accelerate launch" in line for line in header)


@pytest.mark.parametrize("path", LAUNCHERS, ids=lambda path: path.stem)
def test_launcher_config_is_one_that_accelerate_reads(path):
    assert load_config_from_file(str(path)).num_processes == yaml.safe_load(path.read_text())["num_processes"]
