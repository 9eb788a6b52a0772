"""The shipped launcher configs on two CPU processes, with real DeepSpeed: against one process, resumed, and exported."""

import json
import os
import pickle
import shutil
import socket
import subprocess
from itertools import product
from pathlib import Path

import namespaces
import pytest
import scaled
import torch
from accelerate.utils import DeepSpeedPlugin
from diffusers import QwenImageTransformer2DModel
from launched import BIN, ROOT, finish, on_cpu, start
from safetensors.torch import load_file
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from align import checkpoints
from align.arguments import check_launch
from align.dpo import DPOConfig
from align.dpo_online import OnlineDPOConfig
from align.grpo_config import GRPOConfig
from align.sft import SFTConfig
from align.sharding import SHARDING, TENSORS_ONLY, check_sharding, check_zero, tensors_only
from align.tiny import CHECKPOINT

pytestmark = pytest.mark.skipif(scaled.why_not() is not None, reason=str(scaled.why_not()))
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("scaled")


@pytest.fixture(scope="module")
def alone(folder):
    """``alone(algorithm)``: its run on one process."""
    runs: dict[str, scaled.Run] = {}

    def once(algorithm: str) -> scaled.Run:
        if algorithm not in runs:
            if algorithm == "dpo":
                scaled.make_pairs(folder)
            runs[algorithm] = scaled.train(folder, algorithm, None, f"{algorithm}-one")
        return runs[algorithm]

    return once


def check_equal(one: scaled.Run, two: scaled.Run) -> None:
    for key in ("loss", "learning_rate"):
        assert two.logged(key) == pytest.approx(one.logged(key), abs=TOLERANCE), key
    assert two.logged("grad_norm") == pytest.approx(one.logged("grad_norm"), rel=1e-2)
    assert min(one.logged("grad_norm")) > 0.001  # so that they were clipped
    assert scaled.largest_difference(one.trained(1), one.trained(scaled.UPDATES)) > 100 * TOLERANCE
    for update in range(1, scaled.UPDATES + 1):
        assert scaled.largest_difference(one.trained(update), two.trained(update)) < TOLERANCE
    assert scaled.largest_difference(one.lora, two.lora) < TOLERANCE


def check_export(run: scaled.Run) -> None:
    loaded = run.loaded_by_stock()
    assert scaled.largest_difference(loaded, run.trained(scaled.UPDATES)) == 0
    assert all(value.any() for value in loaded.values())  # B too, which begins at 0


def check_resumed(whole: scaled.Run, rest: scaled.Run) -> None:
    for key in ("loss", "grad_norm", "learning_rate"):
        assert rest.logged(key, 1) == whole.logged(key, 1), key
    assert scaled.largest_difference(whole.lora, rest.lora) == 0


@pytest.mark.parametrize("launcher", ["zero2", "zero3"])
def test_grpo_on_two_processes_is_the_run_of_one_and_resumes_and_exports(folder, alone, launcher):
    one = alone("grpo")
    two = scaled.train(folder, "grpo", launcher, f"grpo-{launcher}")
    check_equal(one, two)
    first = two.log[0]
    assert first["ratio_deviation_at_start"] == 0 and first["ratio_min"] == first["ratio_max"] == 1
    assert first["kl_total"] == 0 < two.log[1]["kl_total"]  # the reference is the model without its adapter
    check_export(two)
    checkpoint = two.folder / "checkpoint-1"
    base = (ROOT / "align/tiny/checkpoint/transformer/diffusion_pytorch_model.safetensors").stat().st_size
    assert sum(f.stat().st_size for f in checkpoint.glob("global_step1/*model_states.pt")) < base / 4
    check_resumed(two, scaled.resume(folder, "grpo", launcher, two))
    assert {f.stat().st_mode & 0o022 for f in checkpoint.rglob("*")} == {0}  # for others to write into
    with tensors_only():  # all of it passes, and a bomb does not
        for file in checkpoint.glob("global_step1/*.pt"):
            assert torch.load(file, weights_only=False)


NOT_SLOW = [("grpo", "zero2"), ("grpo", "zero3")]  # in the test above
SLOW = [pair for pair in product(scaled.ALGORITHMS, scaled.LAUNCHERS) if pair not in NOT_SLOW]


@pytest.mark.slow
@pytest.mark.parametrize(("algorithm", "launcher"), SLOW)
def test_every_algorithm_under_every_launcher(folder, alone, algorithm, launcher):
    one = alone(algorithm)
    two = scaled.train(folder, algorithm, launcher, f"{algorithm}-{launcher}")
    check_equal(one, two)
    check_export(two)
    check_resumed(two, scaled.resume(folder, algorithm, launcher, two))


@pytest.mark.slow
def test_the_moving_average_of_shared_out_weights(folder):
    """Exported is the average, which under ZeRO-3 is gathered for each step and put into the model's parts."""
    more = ("--ema_decay", "0.5")
    one = scaled.train(folder, "grpo", None, "average-one", *more)
    two = scaled.train(folder, "grpo", "zero3", "average-zero3", *more)
    check_equal(one, two)
    rest = scaled.resume(folder, "grpo", "zero3", two, *more)
    check_resumed(two, rest)
    assert scaled.largest_difference(two.loaded_by_stock(), load_file(two.folder / "checkpoint-3/ema.safetensors")) == 0
    assert scaled.largest_difference(two.loaded_by_stock(), two.trained(3)) > TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["zero2", "zero3"])
def test_a_full_fine_tune_of_shared_out_weights(folder, launcher):
    more = ("--use_peft", "false", "--beta", "0")
    out = folder / f"full-{launcher}"
    scaled.train(folder, "grpo", None, f"{out.name}-one", *more)
    scaled.train(folder, "grpo", launcher, out.name, *more)
    scaled.resume(folder, "grpo", launcher, scaled.Run(out), *more)
    one, two, rest, base = (
        QwenImageTransformer2DModel.from_pretrained(place / "transformer").state_dict()
        for place in (Path(f"{out}-one"), out, Path(f"{out}-resumed"), CHECKPOINT)
    )
    assert scaled.largest_difference(one, two) < TOLERANCE < scaled.largest_difference(one, base)
    assert scaled.largest_difference(two, rest) == 0


@pytest.mark.slow
def test_two_launchers_as_on_two_machines_make_one_run(folder, alone):
    one = alone("grpo")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launch = on_cpu(ROOT / "configs/accelerate/multi_node.yaml", folder, port=port)
    words = scaled.words(folder, "grpo", "multi_node", "grpo-nodes")
    machines = [
        start(folder, *launch, "--main_process_ip", "127.0.0.1", "--machine_rank", rank, *words) for rank in (0, 1)
    ]
    for machine in machines:
        finish(machine)
    check_equal(one, scaled.Run(folder / "grpo-nodes"))


@pytest.mark.slow
@pytest.mark.parametrize("rendezvous", ["static", "c10d"])
def test_two_machines_that_share_a_cable_and_a_disk_make_one_run(folder, alone, rendezvous):
    """Each launcher in a network namespace of its own: what one listens on, the other finds by its address alone."""
    missing = namespaces.why_not()
    if missing:
        pytest.skip(missing)
    one = alone("grpo")
    launch = on_cpu(ROOT / "configs/accelerate/multi_node.yaml", folder, port=29500)
    words = scaled.words(folder, "grpo", "multi_node", f"grpo-{rendezvous}")
    with namespaces.two_machines() as machines:
        alone_there = subprocess.run(
            [str(w) for w in machines[1].inside("ip", "-brief", "addr")], capture_output=True, text=True, check=True
        ).stdout
        assert machines[1].address in alone_there and machines[0].address not in alone_there
        launchers = []
        for rank, machine in enumerate(machines):
            reached = ("--main_process_ip", machines[0].address, "--machine_rank", rank)
            command: tuple[object, ...] = (*launch, *reached, *words)
            if rendezvous == "c10d":  # a machine's name leads to no address here: each is told its own, and who is host
                told = ("--rdzv_backend", "c10d", "--rdzv_conf", f"is_host={1 - rank}")
                command = ("env", f"PET_LOCAL_ADDR={machine.address}", *launch, *told, *reached, *words)
            launchers.append(start(folder, *machine.inside(*command)))
        for launcher in launchers:
            finish(launcher)
    check_equal(one, scaled.Run(folder / f"grpo-{rendezvous}"))


# --- Security ---


class Bomb:
    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self):
        return (Path.touch, (self.file,))


def test_a_bomb_is_refused_whatever_deepspeed_asks_for(tmp_path, monkeypatch):
    from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine

    engine, file, went_off = TorchCheckpointEngine(), tmp_path / "optim_states.pt", tmp_path / "went off"
    torch.save({"optimizer_state_dict": Bomb(went_off)}, file)
    monkeypatch.setenv(TENSORS_ONLY, "0")
    with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"), tensors_only():
        engine.load(str(file), map_location="cpu")
    assert not went_off.exists() and os.environ[TENSORS_ONLY] == "0"
    engine.load(str(file), map_location="cpu")
    assert went_off.exists()  # it would have


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["zero2", "zero3"])
@pytest.mark.parametrize("part", ["model_states", "optim_states"])
def test_code_planted_in_a_checkpoint_of_deepspeed_does_not_run(folder, launcher, part):
    base = folder / f"planted-{launcher}"
    if not base.exists():
        scaled.train(folder, "grpo", launcher, base.name, "--max_steps", "1")
    checkpoint = Path(shutil.copytree(base / "checkpoint-1", folder / f"bomb-{launcher}-{part}"))
    went_off = folder / f"went off {launcher} {part}"
    manifest = json.loads((checkpoint / checkpoints.MANIFEST).read_text())
    for file in checkpoint.glob(f"global_step1/*{part}.pt"):
        torch.save(torch.load(file, weights_only=False) | {"planted": Bomb(went_off)}, file)
        manifest["files"][str(file.relative_to(checkpoint))] = file.stat().st_size
    (checkpoint / checkpoints.MANIFEST).write_text(json.dumps(manifest))
    launch = on_cpu(ROOT / f"configs/accelerate/{launcher}.yaml", folder)
    words = scaled.words(folder, "grpo", launcher, f"{checkpoint.name}-resumed")
    process = start(folder, *launch, *words, "--resume_from_checkpoint", checkpoint)
    output, _ = process.communicate(timeout=120)
    assert process.returncode != 0 and "Weights only load failed" in output and not went_off.exists()


# --- What cannot be is said before a model is loaded ---


def test_a_full_fine_tune_with_a_reference_ends_under_zero3_before_the_model_is_loaded(folder):
    launch = on_cpu(ROOT / "configs/accelerate/zero3.yaml", folder, processes=1)
    words = scaled.words(folder, "grpo", "zero3", "refused")
    process = start(folder, *launch, *words, "--use_peft", "false", "--per_device_train_batch_size", "8")
    output, _ = process.communicate(timeout=120)
    assert process.returncode != 0 and not (folder / "refused").exists()
    assert "error: beta > 0 has nothing to refer to: a full fine-tune needs a frozen copy of the model" in output
    assert "Train an adapter, or use ZeRO-2" in output and "Loading pipeline" not in output


@pytest.fixture
def settings(tmp_path):
    """``settings(type, stage, **others)``: arguments as under a launcher that asks for this ZeRO stage."""

    def make(config_type: type, stage: int, **others):
        args = config_type(output_dir=str(tmp_path / "out"), use_cpu=True, report_to="none", **others)
        args.deepspeed_plugin = DeepSpeedPlugin(zero_stage=stage) if stage else None
        return args

    return make


@pytest.mark.parametrize(
    ("config_type", "others", "problem"),
    [
        (GRPOConfig, {"beta": 0.1}, "beta > 0 has nothing to refer to"),
        (DPOConfig, {}, "DPO has nothing to refer to"),
        (OnlineDPOConfig, {}, "online DPO has nothing to refer to"),
        (SFTConfig, {"ema_decay": 0.9}, "ema_decay 0.9 would keep a second, whole copy"),
    ],
)
def test_what_a_full_fine_tune_cannot_do_under_zero3(settings, config_type, others, problem):
    args = settings(config_type, 3, **others)
    with pytest.raises(ValueError, match=problem):
        check_zero(args, adapter=False)
    check_zero(args, adapter=True)
    check_zero(settings(config_type, 2, **others), adapter=False)
    check_zero(settings(SFTConfig, 3), adapter=False)


@pytest.mark.parametrize(
    ("written", "stage", "problem"),
    [
        ((3, 2), 3, r"ZeRO-3 on 2 processes, and this run is under DeepSpeed ZeRO-3 on 1 .*--num_processes 2"),
        ((2, 1), 3, r"ZeRO-2 on 1 processes, and this run is under DeepSpeed ZeRO-3 on 1 .*accelerate/zero2.yaml"),
        ((2, 1), 0, r"ZeRO-2 on 1 processes, and this run is without DeepSpeed: .*zero2.yaml and --num_processes 1"),
        (None, 2, r"written without DeepSpeed, and this run is under DeepSpeed ZeRO-2 on 1 .*ddp.yaml or single.yaml"),
    ],
)
def test_a_checkpoint_of_another_sharding_is_refused_with_what_would_resume_it(
    settings, tmp_path, written, stage, problem
):
    args = settings(SFTConfig, stage, resume_from_checkpoint=str(tmp_path))
    if written:
        note = dict(zip(("zero_stage", "processes"), written, strict=True))
        (tmp_path / SHARDING).write_text(json.dumps(note))
    (tmp_path / checkpoints.MANIFEST).write_text(json.dumps({"files": {}}))  # a whole checkpoint
    with pytest.raises(ValueError, match=problem):
        args.checkpoint_to_resume()
    if written and written[1] == 1:
        check_sharding(tmp_path, settings(SFTConfig, written[0]))


def test_fsdp_is_refused_with_what_there_is_instead(settings, monkeypatch):
    args = settings(SFTConfig, 0)
    check_launch(args)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ValueError, match=r"FSDP, .* launch with configs/accelerate/zero2.yaml or zero3.yaml"):
        check_launch(args)


def test_fsdp2_ends_before_the_model_is_loaded(tmp_path):
    launch = [BIN / "accelerate", "launch", "--use_fsdp", "--fsdp_version", "2", "--num_processes", "1"]
    words = ["--config", ROOT / "configs/tiny/grpo.yaml", "--rewards", "jpeg_size", "--output_dir", "refused"]
    output, _ = start(tmp_path, *launch, ROOT / "align/grpo.py", *words).communicate(timeout=120)
    assert "error: the launcher asks for FSDP" in output and "zero2.yaml or zero3.yaml" in output
    assert "Loading pipeline" not in output and not (tmp_path / "refused").exists()


def test_transformers_loads_its_models_whole_under_zero3(settings):
    plugin = DeepSpeedPlugin(zero_stage=3)
    plugin.set_deepspeed_weakref()  # as transformers' own arguments do
    assert is_deepspeed_zero3_enabled()
    settings(SFTConfig, 0)
    assert not is_deepspeed_zero3_enabled()
