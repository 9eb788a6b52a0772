"""Checkpoints: whole or not there, passed over when broken, refused by another run."""

import json
import os
import pickle
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from brightness import score as brightness
from datasets import Dataset
from launched import BIN, GLOO, ROOT, TWO, finish, run, start
from peft import LoraConfig
from safetensors.torch import load_file
from transformers import TrainerCallback

from align import dpo_online, grpo
from align.engine import reports
from align.engine.checkpoints import MANIFEST, UNFINISHED, CheckpointError, fault, find, list_all, written
from align.engine.resume import plan_resume
from align.engine.settings import FlowConfig
from align.grpo import GRPOConfig, GRPOTrainer
from align.models.families import load_model
from align.models.qwen_image import QwenImage
from align.tiny import CHECKPOINT

PROMPTS = Dataset.from_dict({"prompt": ["a circle", "two squares", "red objects", "a blue cross"]})
RUN = {
    "algorithm": {"algorithm": "GRPO"},
    "model": {"name": "tiny"},
    "trained": {"tuning": "LoRA"},
    "fixed_on_resume": {},
}


def trainer(folder: Path, model: str | Path = "tiny", lora: dict | None = None, **overrides) -> GRPOTrainer:
    settings = {
        "output_dir": str(folder), "height": 64, "width": 64, "num_inference_steps": 3, "sde_window_size": 1,
        "num_generations": 2, "generation_batch_size": 4, "per_device_train_batch_size": 4, "max_steps": 4,
        "learning_rate": 1e-3, "save_strategy": "steps", "save_steps": 1, "disable_tqdm": True, "use_cpu": True,
    }  # fmt: skip
    config = GRPOConfig(**(settings | overrides))
    peft = LoraConfig(**({"r": 2, "lora_alpha": 4} | (lora or {})))
    return GRPOTrainer(load_model(model), [brightness], config, PROMPTS, peft_config=peft)


def fill(folder: Path, **files: int) -> None:
    for name, size in files.items():
        (folder / name).write_bytes(b"x" * size)


def make(output_dir: Path, step: int, **options) -> Path:
    final = output_dir / f"checkpoint-{step}"
    with written(final, RUN, True, **options) as folder:
        fill(folder, model=step, optimizer=2 * step)
    return final


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of four updates, each with a checkpoint."""
    run = trainer(tmp_path_factory.mktemp("finished"))
    run.train()
    return run


@pytest.fixture
def copy(finished, tmp_path):
    """The run's folder, to be spoilt."""
    return Path(shutil.copytree(finished.args.output_dir, tmp_path / "run"))


# --- Whole or not there ---


def test_what_is_written_gets_its_name_at_the_end_and_lists_its_files(tmp_path):
    final = tmp_path / "checkpoint-3"
    with written(final, RUN, True) as folder:
        fill(folder, model=10)
        assert not final.exists() and list_all(tmp_path) == []
        (folder / "deeper").mkdir()
        fill(folder / "deeper", shard=7)
    assert fault(final) is None and not (tmp_path / UNFINISHED).exists()
    content = json.loads((final / MANIFEST).read_text())
    assert content["files"] == {"model": 10, "deeper/shard": 7} and content["run"] == RUN and content["format"] == 3


def test_others_may_read_the_checkpoint_of_a_run_that_never_ends(tmp_path):
    """safetensors writes for its owner alone, and only the end of a run sets that right in output_dir."""
    with written(tmp_path / "checkpoint-1", RUN, True) as folder:
        fill(folder, model=10, other=1)
        (folder / "model").chmod(0o600)
    modes = {path.name: path.stat().st_mode for path in (tmp_path / "checkpoint-1").iterdir()}
    assert modes["model"] == modes["other"] == modes[MANIFEST]


def test_a_checkpoint_leaves_no_file_open(tmp_path):
    """A long run would end when the system gives it no more."""
    before = len(list(Path("/proc/self/fd").iterdir()))
    make(tmp_path, 1)
    assert len(list(Path("/proc/self/fd").iterdir())) == before


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda f: (f / MANIFEST).unlink(), "has no checkpoint.json: its writing was not finished"),
        (lambda f: (f / MANIFEST).write_text('{"files": {"mo'), "has a checkpoint.json that cannot be read"),
        (lambda f: (f / "model").unlink(), "lacks model"),
        (lambda f: os.truncate(f / "optimizer", 5), "is damaged: optimizer has 5 bytes and was written with 12"),
        (lambda f: os.truncate(f / "model", 9), "is damaged: model has 9 bytes and was written with 6"),
    ],
)
def test_a_broken_one_is_passed_over_aloud_and_refused_by_path(tmp_path, caplog, spoil, words):
    for step in (2, 4, 6):
        make(tmp_path, step)
    spoil(tmp_path / "checkpoint-6")
    assert find(str(tmp_path), True) == find(str(tmp_path), "true") == tmp_path / "checkpoint-4"
    assert words in caplog.text and "Going on from" in caplog.text
    with pytest.raises(ValueError, match=r"the last good one beside it is .*checkpoint-4") as caught:
        find(str(tmp_path), str(tmp_path / "checkpoint-6"))
    assert words in str(caught.value)
    for step in (2, 4):
        (tmp_path / f"checkpoint-{step}" / "model").unlink()
    with pytest.raises(ValueError, match=r"no checkpoint in .* is complete: .*checkpoint-6.*checkpoint-4 lacks model"):
        find(str(tmp_path), True)


def test_the_latest_of_ten_checkpoints_is_the_tenth(tmp_path):
    """Sorted as text, checkpoint-9 would be the latest: a run would go back, and the limit would remove the new ones."""
    for step in (8, 9, 10, 100):
        make(tmp_path, step)
    assert [p.name for p in list_all(tmp_path)] == [f"checkpoint-{step}" for step in (100, 10, 9, 8)]
    assert find(str(tmp_path), True) == tmp_path / "checkpoint-100"


def test_nothing_to_resume_is_a_fresh_start_and_a_missing_path_an_error(tmp_path, caplog):
    assert find(str(tmp_path / "none"), True) is None
    with pytest.raises(FileNotFoundError, match="no checkpoint to resume from: elsewhere"):
        find(str(tmp_path), "elsewhere")
    config = FlowConfig(str(tmp_path), resume_from_checkpoint="true", use_cpu=True)
    plan = plan_resume(config, {}, "true")
    assert plan.folder is None
    assert "holds no checkpoint to resume from yet: starting afresh" in caplog.text
    (tmp_path / "trainer_state.json").write_text("{}")
    with pytest.raises(FileExistsError, match=r"holds trainer_state\.json of an earlier run"):
        plan_resume(config, {}, None)


def test_what_a_crash_left_is_removed_and_what_lacks_only_its_name_gets_it(tmp_path):
    make(tmp_path, 1)
    half, whole = tmp_path / UNFINISHED / "checkpoint-2", make(tmp_path, 3)
    half.mkdir(parents=True)
    fill(half, model=1)
    whole.rename(tmp_path / UNFINISHED / "checkpoint-3")  # killed between sealing and naming
    assert find(str(tmp_path), True) == tmp_path / "checkpoint-1"
    make(tmp_path, 4)
    assert [p.name for p in list_all(tmp_path)] == ["checkpoint-4", "checkpoint-3", "checkpoint-1"]
    assert not (tmp_path / UNFINISHED).exists()


def test_the_limit_counts_whole_ones_and_never_takes_the_new_or_the_best(tmp_path):
    for step in (1, 2, 3):
        make(tmp_path, step)
    (tmp_path / "checkpoint-3" / "model").unlink()
    make(tmp_path, 4, limit=3)
    assert [p.name for p in list_all(tmp_path)] == ["checkpoint-4", "checkpoint-2", "checkpoint-1"]
    make(tmp_path, 5, limit=2, best=str(tmp_path / "checkpoint-1"))
    assert [p.name for p in list_all(tmp_path)] == ["checkpoint-5", "checkpoint-1"]
    with pytest.raises(CheckpointError), written(tmp_path / "checkpoint-6", RUN, True, limit=1) as folder:
        raise OSError(28, "No space left on device")
    assert [p.name for p in list_all(tmp_path)] == ["checkpoint-5", "checkpoint-1"] and not folder.exists()
    make(tmp_path, 5, limit=1)  # again, in the place of itself
    assert [p.name for p in list_all(tmp_path)] == ["checkpoint-5"] and fault(tmp_path / "checkpoint-5") is None


# --- A run ---


def test_a_truncated_checkpoint_is_passed_over_and_the_run_ends_the_same(finished, copy, caplog):
    for step in (3, 4):
        os.truncate(copy / f"checkpoint-{step}" / "optimizer.pt", 100)
    again = trainer(copy)
    again.train(resume_from_checkpoint=True)
    assert again.resumed_from == copy / "checkpoint-2"
    assert "optimizer.pt has 100 bytes" in caplog.text
    for name, parameter in finished.trained_parameters().items():
        assert torch.equal(parameter, again.trained_parameters()[name])
    assert fault(copy / "checkpoint-3") is None  # written again


def test_a_run_keeps_as_many_as_it_is_told(tmp_path):
    trainer(tmp_path, max_steps=3, save_total_limit=1).train()
    assert [p.name for p in list_all(tmp_path)] == ["checkpoint-3"] and not (tmp_path / UNFINISHED).exists()


def test_a_disk_that_fills_up_ends_the_run_and_spares_the_last_checkpoint(tmp_path):
    """The whole path through torch's and safetensors' own writers: no file of this process may grow past the limit."""
    import resource

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    class FillUp(TrainerCallback):
        def on_save(self, *args, **kwargs):
            resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))

    run = trainer(tmp_path, max_steps=2, lora={"r": 16}, save_steps=1)
    run.add_callback(FillUp())
    try:
        with pytest.raises(CheckpointError, match=r"checkpoint-2 could not be written by process 0 \(.*last good one"):
            run.train()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [p.name for p in tmp_path.iterdir() if p.is_dir()] == ["checkpoint-1"]


def test_peak_memory_is_on_every_log_line(finished):
    peaks = [entry["memory_peak_gib"] for entry in finished.state.log_history if "loss" in entry]
    assert len(peaks) == 4 and peaks == sorted(peaks) and 0.1 < peaks[0] < 100


# --- What it belongs to ---


def other_model(folder: Path) -> Path:
    """The embedded model with one transformer weight changed."""
    from safetensors.torch import save_file

    shutil.copytree(CHECKPOINT, folder)
    (file,) = (folder / "transformer").glob("*.safetensors")
    save_file({name: tensor * 1.5 for name, tensor in load_file(file).items()}, file, metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"lora": {"r": 4, "lora_alpha": 4}},
            r"lora_r is 4 and was 2 when .* start a new run, in another output_dir, from its LoRA with --adapter",
        ),
        ({"lora": {"lora_alpha": 8}}, "lora_alpha is 8 and was 4"),
        ({"lora": {"target_modules": ["to_q"]}}, "lora_target_modules is"),
        (
            {"noise_level": 0.5},
            "noise_level is 0.5 and was 0.7 when .*: resume with --noise_level 0.7, or start a new run",
        ),
        (
            {"seed": 7, "sde_window_size": 2, "per_device_train_batch_size": 8},
            "seed is 7 and was 42, sde_window_size is 2 and was 1 .* resume with --seed 42 --sde_window_size 1",
        ),
        (
            {"model": "other"},
            r"the model is .*other and was tiny \(weights is .* resume with the model it was trained on",
        ),
    ],
    ids=["rank", "alpha", "targets", "noise level", "several", "model"],
)
def test_another_run_is_refused_before_training(finished, tmp_path, changes, message):
    if "model" in changes:
        changes = {"model": other_model(tmp_path / "other")}
    checkpoint = str(Path(finished.args.output_dir) / "checkpoint-2")
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path / "run", **changes).train(resume_from_checkpoint=checkpoint)


@pytest.mark.parametrize(
    ("main", "overrides", "message"),
    [
        (grpo.main, {"lora_r": 8}, "lora_r is 8 and was 2"),
        (grpo.main, {"use_peft": False}, "tuning is 'full' and was 'LoRA'"),
        (grpo.main, {"noise_level": 0.3}, "noise_level is 0.3 and was 0.7"),
        (grpo.main, {"model": "other"}, "the model is other and was tiny"),
        (grpo.main, {"adapter": "."}, "adapter is '"),
        (dpo_online.main, {"per_device_train_batch_size": 2}, "algorithm is 'online DPO' and was 'GRPO'"),
    ],
)
def test_the_command_line_refuses_another_run_before_a_model_is_loaded(copy, monkeypatch, main, overrides, message):
    def loaded(*args, **kwargs):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(QwenImage, "load", loaded)
    monkeypatch.chdir(copy)
    other_model(copy / "other")
    shutil.copy("checkpoint-1/pytorch_lora_weights.safetensors", copy)
    words = {
        "dataset_name": "tiny/background", "rewards": "jpeg_size", "output_dir": ".", "height": 64, "width": 64,
        "num_inference_steps": 3, "num_generations": 2, "generation_batch_size": 4, "per_device_train_batch_size": 4,
        "max_steps": 4, "use_cpu": True, "resume_from_checkpoint": True,
    }  # fmt: skip
    words |= {"lora_r": 2, "lora_alpha": 4} if not overrides.keys() & {"use_peft", "adapter"} else {}
    words |= {"sde_window_size": 1} if main is grpo.main else {}
    with pytest.raises(SystemExit, match=message) as caught:
        main([str(word) for name, value in (words | overrides).items() for word in (f"--{name}", value)])
    assert "checkpoint-4 was written: resume with " in str(caught.value)


@pytest.mark.parametrize("number", [2, 4])
def test_another_format_names_the_version_that_reads_it(finished, copy, number):
    file = copy / "checkpoint-4" / MANIFEST
    file.write_text(json.dumps(json.loads(file.read_text()) | {"format": number, "version": "7.1"}))
    with pytest.raises(
        ValueError, match=rf"by flow-align 7\.1 in format {number}, .* reads format 3: resume with that .*--adapter"
    ):
        trainer(copy).train(resume_from_checkpoint=True)


def test_settings_that_may_change_are_named_when_they_do(finished, copy, caplog):
    run = trainer(copy, max_steps=5, epsilon=2e-4, beta=0.1)
    run.train(resume_from_checkpoint=True)
    table = [line.split()[:5] for line in caplog.text.splitlines() if line.startswith("  ")]
    assert ["epsilon", "0.0001", "0.0002", "taken", "over"] in table and [
        "beta",
        "0.0",
        "0.1",
        "taken",
        "over",
    ] in table
    caplog.clear()
    trainer(copy, max_steps=5, epsilon=2e-4, beta=0.1).train(resume_from_checkpoint=True)
    assert "what differs" not in caplog.text


# --- Security ---


class Bomb:
    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self):
        return (Path.touch, (self.file,))


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_code_planted_in_a_checkpoint_does_not_run(copy, tmp_path, name):
    folder = copy / "checkpoint-4"
    torch.save({"planted": Bomb(tmp_path / "went off")}, folder / name)
    content = json.loads((folder / MANIFEST).read_text())
    content["files"][name] = (folder / name).stat().st_size
    (folder / MANIFEST).write_text(json.dumps(content))
    with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
        trainer(copy, max_steps=5).train(resume_from_checkpoint=True)
    assert not (tmp_path / "went off").exists()
    torch.load(folder / name, weights_only=False)
    assert (tmp_path / "went off").exists()  # it would have


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077])
def test_files_get_the_modes_of_the_umask(tmp_path, umask):
    before = os.umask(umask)
    try:
        run = trainer(tmp_path / "run", max_steps=1, save_rollouts=True)
        run.train()
        run.finish("tiny", "prompts")
    finally:
        os.umask(before)
    paths = list((tmp_path / "run").rglob("*"))
    assert {"checkpoint.json", "optimizer.pt", "README.md", "pytorch_lora_weights.safetensors"} <= {
        p.name for p in paths
    }
    modes = {p.relative_to(tmp_path).as_posix(): p.stat().st_mode & 0o777 for p in paths}
    odd = {n: oct(m) for n, m in modes.items() if m != ((0o777 if (tmp_path / n).is_dir() else 0o666) & ~umask)}
    assert not odd


def test_no_secret_is_written_anywhere(tmp_path, monkeypatch, offline_wandb):
    """Not in checkpoints, card and state, nor by the trackers, which are told the whole config."""
    names = ("HF_TOKEN", "WANDB_API_KEY", "FLOW_ALIGN_TOKEN", "OPENAI_API_KEY", "hub_token")
    secrets = {name: f"{place}" * 24 + "5ec3e7f00d5ec3e7" for place, name in enumerate(names)}
    for name in names[:-1]:
        monkeypatch.setenv(name, secrets[name])
    monkeypatch.chdir(tmp_path)
    run = trainer(tmp_path / "run", max_steps=1, report_to=["wandb", "tensorboard"], hub_token=secrets["hub_token"])
    run.train()
    run.finish("tiny", "prompts", reports.changed_settings(run.args))
    offline_wandb.finish()  # it writes in the background
    written = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert any(path.suffix == ".wandb" for path in written) and any("tfevents" in path.name for path in written)
    assert any(b"num_generations" in content for content in written.values())
    found = [(n, p) for n, secret in secrets.items() for p, content in written.items() if secret.encode() in content]
    assert not found


# --- Signals and real processes ---


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_a_schedulers_warning_ends_the_run_with_a_checkpoint(tmp_path, number):
    class Warned(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 1:
                os.kill(os.getpid(), number)

    warned = trainer(tmp_path, save_strategy="no")
    warned.add_callback(Warned())
    before = signal.getsignal(number)
    warned.train()
    assert warned.interrupted and warned.state.global_step == 2 and signal.getsignal(number) is before
    assert find(str(tmp_path), True) == tmp_path / "checkpoint-2"


def test_a_signal_in_the_last_update_does_not_undo_the_end(tmp_path):
    """A run that is whole would call itself interrupted, and leave its weights unexported."""

    class Warned(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == state.max_steps - 1:
                os.kill(os.getpid(), signal.SIGTERM)

    warned = trainer(tmp_path, save_strategy="no", max_steps=2)
    warned.add_callback(Warned())
    warned.train()
    assert warned.state.global_step == 2 and not warned.interrupted


def test_every_process_group_gets_the_time_out(tmp_path):
    """Also those that were made with another one, as DeepSpeed's are."""
    script = (
        "import torch.distributed as d\nfrom datetime import timedelta\nfrom align.engine.signals import bound_waiting\n"
        f"d.init_process_group('gloo', init_method='file://{tmp_path}/store', rank=0, world_size=1)\n"
        "other = d.new_group([0], timeout=timedelta(seconds=999))\nbound_waiting(7)\n"
        "print([g._get_backend(__import__('torch').device('cpu')).options._timeout.total_seconds() "
        "for g in (d.group.WORLD, other)])"
    )
    assert "[7.0, 7.0]" in run(tmp_path, sys.executable, "-c", script)


WORDS = [
    *(ROOT / "align/grpo.py", "--config", ROOT / "configs/tiny/grpo.yaml", "--eval_strategy", "no", *GLOO),
    *("--eval_on_start", "false", "--num_generations", "4", "--generation_batch_size", "8"),
    *("--num_inference_steps", "4", "--sde_window_size", "2", "--num_prefixes", "4"),
    *("--per_device_train_batch_size", "4", "--gradient_accumulation_steps", "2", "--disable_tqdm", "true"),
    *("--rewards", "jpeg_size", "--save_strategy", "steps", "--save_steps", "2", "--resume_from_checkpoint", "true"),
]


def wait_for_updates(process: subprocess.Popen, count: int) -> str:
    """Read the log until ``count`` updates were logged; returns what was read."""
    read = ""
    while read.count("'loss'") < count:
        line = process.stdout.readline()
        assert line, read[-3000:]
        read += line
    return read


def workers(launcher: subprocess.Popen) -> list[int]:
    """The processes that a launcher started."""
    children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
    return [int(pid) for pid in children if b"grpo.py" in Path(f"/proc/{pid}/cmdline").read_bytes()]


def test_two_processes_signalled_through_their_launcher_leave_one_good_checkpoint(tmp_path):
    """As Slurm's --signal does it; the launcher waits for them. Then the same run goes on."""
    handled = ["--signals-to-handle", "SIGTERM,SIGINT,SIGUSR1"]
    process = start(
        tmp_path, *TWO, *handled, *WORDS, "--save_steps", "500", "--max_steps", "400", "--output_dir", "out"
    )
    output = wait_for_updates(process, 2)
    assert "out holds no checkpoint to resume from yet: starting afresh" in output
    process.send_signal(signal.SIGUSR1)
    rest, _ = process.communicate(timeout=60)
    assert rest.count("SIGUSR1: finishing this update") == 2 and process.returncode == 1  # torchrun's own
    (folder,) = list_all(tmp_path / "out")
    assert fault(folder) is None and f"--resume_from_checkpoint out/{folder.name}" in rest
    assert {"rng_state_0.pth", "rng_state_1.pth"} <= {p.name for p in folder.iterdir()}
    done = int(folder.name.rpartition("-")[2])
    run(tmp_path, *TWO, *WORDS, "--max_steps", done + 1, "--output_dir", "out")
    state = json.loads((tmp_path / "out/trainer_state.json").read_text())
    assert [entry["step"] for entry in state["log_history"] if "loss" in entry] == list(range(1, done + 2))


#: `accelerate launch`, on two processes of this machine's CPU.
ACCELERATE = [
    *(BIN / "accelerate", "launch", "--config_file", ROOT / "configs/accelerate/ddp.yaml"),
    *("--num_processes", "2", "--mixed_precision", "no", "--main_process_port", "0"),
]
LASTING = [*WORDS, "--save_steps", "500", "--max_steps", "400", "--output_dir", "out"]


def check_stopped(folder: Path, process: subprocess.Popen, name: str, code: int) -> None:
    output, _ = process.communicate(timeout=60)
    assert process.returncode == code and output.count(f"{name}: finishing this update") == 2, output[-3000:]
    (saved,) = list_all(folder / "out")
    assert fault(saved) is None and f"--resume_from_checkpoint out/{saved.name}" in output


def test_a_step_that_a_scheduler_signals_whole_ends_with_0(tmp_path):
    """Slurm's `--signal=USR1@...` reaches every process of a step: here the launcher does not heed it."""
    process = start(tmp_path, "sh", "-c", "trap '' USR1; exec \"$@\"", "sh", *ACCELERATE, *LASTING)
    wait_for_updates(process, 2)
    for pid in (process.pid, *workers(process)):
        os.kill(pid, signal.SIGUSR1)
    check_stopped(tmp_path, process, "SIGUSR1", 0)


@pytest.mark.slow
@pytest.mark.parametrize("launch", [TWO, ACCELERATE], ids=["torchrun", "accelerate"])
def test_processes_that_are_signalled_without_their_launcher_end_it_with_0(tmp_path, launch):
    process = start(tmp_path, *launch, *LASTING)
    wait_for_updates(process, 2)
    subprocess.run(["pkill", "-USR1", "-P", str(process.pid)], check=True)
    check_stopped(tmp_path, process, "SIGUSR1", 0)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_accelerate_hands_on_signals_as_torchrun_does_and_ends_with_1(tmp_path, monkeypatch, number):
    monkeypatch.setenv("PET_SIGNALS_TO_HANDLE", "SIGTERM,SIGINT,SIGUSR1")
    process = start(tmp_path, *ACCELERATE, *LASTING)
    wait_for_updates(process, 2)
    process.send_signal(number)
    check_stopped(tmp_path, process, number.name, 1)


RESTARTED = [BIN / "torchrun", "--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0", "--nproc_per_node", "2"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "says"), [(signal.SIGKILL, "reset by peer|closed"), (signal.SIGSTOP, "Timed out waiting 20000ms")]
)
def test_a_process_that_dies_or_hangs_is_answered_by_a_restart_to_the_same_end(tmp_path, monkeypatch, number, says):
    monkeypatch.setenv("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    words = [*WORDS, "--max_steps", "8", "--ddp_timeout", "20", "--output_dir"]
    run(tmp_path, *TWO, *words, "whole")
    process = start(tmp_path, *RESTARTED, "--max_restarts", "2", *words, "out")
    wait_for_updates(process, 3)
    os.kill(workers(process)[1], number)
    output = finish(process)
    assert re.search(says, output)
    assert "8 updates in" in output
    one, other = (load_file(tmp_path / name / "pytorch_lora_weights.safetensors") for name in ("whole", "out"))
    assert all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_a_full_file_system_ends_the_run_with_a_sentence(tmp_path, processes):
    """On a tmpfs of 3 MiB in a mount namespace of its own; a checkpoint takes 2."""
    allowed = subprocess.run(["unshare", "-rm", "mount", "-t", "tmpfs", "none", "/mnt"], capture_output=True, text=True)
    if allowed.returncode:
        pytest.skip(f"no tmpfs can be mounted here: {allowed.stderr.strip()}")
    (tmp_path / "small").mkdir()
    launch = [BIN / "torchrun", "--standalone", "--nproc_per_node", processes, *WORDS, "--output_dir", "small/run"]
    command = shlex.join(map(str, [*launch, "--per_device_train_batch_size", 8 // processes, "--max_steps", 6]))
    script = f"mount -t tmpfs -o size=3m none small; {command}; echo rc $?; find small/run -type d; ls small/run/*"
    output = run(tmp_path, "unshare", "-rm", "sh", "-c", script)
    assert "stopped at update 4: small/run/checkpoint-4 could not be written by process 0" in output
    assert "was removed: the last good one is small/run/checkpoint-2" in output
    assert output.split("rc 1\n")[1].splitlines()[:2] == ["small/run", "small/run/checkpoint-2"]
    assert "checkpoint.json" in output.split("rc 1\n")[1]
