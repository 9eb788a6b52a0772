"""Every shipped config is loaded, by the same code that a run uses."""

from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file

from align.arguments import ModelArguments, parse
from align.grpo import DataArguments, GRPOConfig, check_data
from rewards import load_rewards

ROOT = Path(__file__).parents[1]
GRPO = sorted(path for family in ("tiny", "qwen_image") for path in (ROOT / "configs" / family).glob("grpo*.yaml"))
LAUNCHERS = sorted((ROOT / "configs/accelerate").glob("*.yaml"))


def test_there_is_nothing_among_the_configs_that_no_test_loads():
    assert sorted((ROOT / "configs").rglob("*.yaml")) == sorted([*GRPO, *LAUNCHERS])


@pytest.mark.parametrize("path", GRPO, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_grpo_config_parses_and_its_sums_come_out(path):
    processes = 1 if path.parent.name == "tiny" else 8  # as its header says
    flags = [] if path.parent.name == "tiny" else ["--bf16", "false"]  # refused on a machine without an accelerator
    _, model, args = parse((DataArguments, ModelArguments, GRPOConfig), ["--config", str(path), *flags])
    args.check_world(processes)
    updates = args.micro_batches_per_rollout(processes) / args.gradient_accumulation_steps
    assert updates == int(updates) >= 1
    assert len(args.sde_steps(0)) == args.window_size
    assert (model.peft_config() is not None) == model.use_peft


@pytest.mark.parametrize("path", [p for p in GRPO if p.parent.name == "tiny"], ids=lambda path: path.stem)
def test_tiny_config_finds_its_data_rewards_and_model(path):
    data, model, args = parse((DataArguments, ModelArguments, GRPOConfig), ["--config", str(path)])
    check_data(load_rewards(data.rewards), args, *data.load())
    model.check(args.height, args.width)


@pytest.mark.parametrize("path", [*GRPO, *LAUNCHERS], ids=lambda path: path.stem)
def test_header_of_a_config_says_its_command(path):
    header = [line for line in path.read_text().splitlines() if line.startswith("#")]
    assert any("accelerate launch" in line for line in header)


@pytest.mark.parametrize("path", LAUNCHERS, ids=lambda path: path.stem)
def test_launcher_config_is_one_that_accelerate_reads(path):
    assert load_config_from_file(str(path)).num_processes == yaml.safe_load(path.read_text())["num_processes"]
