"""Each algorithm on one process, and on two under each shipped launcher config: the same updates, small enough for a CPU."""

import json
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path

import torch
import yaml
from diffusers import QwenImagePipeline, QwenImageTransformer2DModel
from launched import ROOT, finish, here, on_cpu, run, start
from safetensors import safe_open
from safetensors.torch import load_file

from align.models.adapters import LORA_FILE
from align.tiny import CHECKPOINT

LAUNCHERS = ("ddp", "zero1", "zero2", "zero3", "zero3_offload")
ALGORITHMS = ("sft", "dpo", "dpo_online", "grpo", "nft")
REWARD = ("--rewards", ROOT / "tests/helpers/brightness.py:score")
UPDATES = 3
#: One run after the other in the same processes; what went wrong is noted, by output_dir.
CHAIN = """
import json, sys
from importlib import import_module
from pathlib import Path
from accelerate.state import AcceleratorState
wrong = {}
for script, *words in json.loads(Path(sys.argv[1]).read_text()):
    AcceleratorState._reset_state()
    try:
        import_module("align." + Path(script).stem).main(words)
    except (Exception, SystemExit) as error:
        print(repr(error))
        wrong[words[words.index("--output_dir") + 1]] = f"{error}" or repr(error)
Path(sys.argv[1]).with_suffix(".wrong").write_text(json.dumps(wrong))
"""
#: Adam's first steps amplify rounding to the learning rate, sgd does not. Every gradient is clipped, the rate changes.
TRAIN = (
    *("--optim", "sgd", "--learning_rate", "30", "--max_grad_norm", "0.001", "--lr_scheduler_type", "linear"),
    *("--warmup_steps", "0", "--max_steps", UPDATES, "--gradient_accumulation_steps", "2"),
    *("--eval_strategy", "no", "--eval_on_start", "false", "--num_generations_eval", "1"),
    *("--save_strategy", "steps", "--save_steps", "1", "--disable_tqdm", "true"),
)
#: Two updates a rollout, so that the first checkpoint lies in the middle of one.
GROUPS = ("--num_generations", "4", "--num_iterations", "2", "--num_inference_steps", "3")
#: Two transitions of each image, which has nothing in common with the others of its group, so that they can be cut up.
TWO_STEPS = ("--sde_window_size", "2", "--num_prefixes", "4")
#: DiffusionNFT with a sampling policy that is not the trained one.
SLOW_POLICY = ("--num_train_sigmas", "2", "--sampling_decay_rate", "0.3")
#: (settings, examples of an update) of each algorithm.
SETTINGS = {
    "sft": (("--config", "sft_style", "--num_inference_steps", "2"), 8),
    "dpo": (("--config", "dpo", "--num_inference_steps", "2"), 8),
    "dpo_online": (("--config", "dpo_online", *GROUPS, "--generation_batch_size", "32"), 8),
    "grpo": (("--config", "grpo", *GROUPS, *TWO_STEPS, "--generation_batch_size", "8", "--beta", "0.1"), 16),
    "nft": (("--config", "nft", *GROUPS, "--generation_batch_size", "8", *SLOW_POLICY, "--beta", "0.1"), 16),
}


def why_not() -> str | None:
    """Why DeepSpeed cannot run here, if it cannot."""
    if find_spec("deepspeed") is None:
        return "deepspeed is not installed: pip install flow-align[deepspeed]"
    if shutil.which("c++") is None and shutil.which("g++") is None:
        return "there is no C++ compiler, with which DeepSpeed builds what its processes talk by"
    return None


def unfolded(state: dict[str, torch.Tensor], folder: Path) -> dict[str, torch.Tensor]:
    """A LoRA from a run's export as it is trained: B without the alpha that the export has put into it."""
    with safe_open(folder / LORA_FILE, "pt") as stored:
        alpha = json.loads(stored.metadata()["flow_align_lora"])["lora_alpha"]
    return {name: value / (alpha / value.shape[1]) if "lora_B" in name else value for name, value in state.items()}


def loaded_by_stock(folder: Path) -> dict[str, torch.Tensor]:
    """What was trained, in a stock pipeline that has loaded a run's LoRA, by the names it is trained by."""
    pipeline = QwenImagePipeline.from_pretrained(CHECKPOINT)
    pipeline.load_lora_weights(folder, adapter_name="default")
    named = pipeline.transformer.named_parameters()
    return unfolded({name: p.detach() for name, p in named if ".default." in name}, folder)


@dataclass
class Run:
    """A finished run, by its output_dir."""

    folder: Path
    #: What it printed.
    output: str = ""

    @cached_property
    def log(self) -> list[dict]:
        entries = json.loads((self.folder / "trainer_state.json").read_text())["log_history"]
        return [entry for entry in entries if "loss" in entry]

    @cached_property
    def lora(self) -> dict[str, torch.Tensor]:
        return unfolded(load_file(self.folder / LORA_FILE), self.folder)

    @cached_property
    def exported(self) -> dict[str, torch.Tensor]:
        """The LoRA, or the whole transformer of a full fine-tune."""
        whole = self.folder / "transformer"
        return QwenImageTransformer2DModel.from_pretrained(whole).state_dict() if whole.is_dir() else self.lora

    def trained(self, update: int) -> dict[str, torch.Tensor]:
        """What the checkpoint of an update says the trained weights are."""
        return load_file(self.folder / f"checkpoint-{update}/model.safetensors")

    def logged(self, key: str, first: int = 0) -> list[float]:
        return [entry[key] for entry in self.log[first:]]

    def loaded_by_stock(self) -> dict[str, torch.Tensor]:
        """What was trained, in a stock pipeline that has loaded this run's export, by the names it is trained by."""
        if (self.folder / "transformer").is_dir():
            return self.exported
        return loaded_by_stock(self.folder)


def largest_difference(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """Of all elements of two states of the same names and shapes."""
    assert one.keys() == other.keys()
    assert all(one[name].shape == other[name].shape and one[name].numel() for name in one)
    return max((one[name] - other[name]).abs().max().item() for name in one)


def make_pairs(folder: Path) -> None:
    """Preferences for DPO, in ``folder``/pairs."""
    config = ("--config", ROOT / "configs/tiny/generate.yaml", "--max_prompts", "6", "--num_generations", "4")
    words = (*config, "--num_inference_steps", "3", *REWARD, "--use_cpu", "true", "--output_dir", "pairs")
    here(folder, ROOT / "align/generate.py", *words)


#: What fine-tunes the whole transformer.
FULL = ("--use_peft", "false")


def words(
    folder: Path, algorithm: str, launcher: str | None, out: str, processes: int = 1, more: Sequence[object] = ()
) -> list[object]:
    """What a trainer is started with, on so many processes under a launcher; pairs and cache lie in ``folder``."""
    (flag, config, *settings), examples = SETTINGS[algorithm]
    (folder / "prompts.txt").write_text("a red circle\ntwo blue squares\n")
    file = ROOT / f"configs/tiny/{config}.yaml"
    if set(FULL) <= set(more):  # for which a config must say nothing of an adapter
        kept = {key: value for key, value in yaml.safe_load(file.read_text()).items() if not key.startswith("lora_")}
        file = folder / f"{config}-full.yaml"
        file.write_text(yaml.safe_dump(kept))
    found: list[object] = [flag, file, *settings, *TRAIN, *REWARD, "--output_dir", out]
    found += ["--per_device_train_batch_size", examples // 2 // processes]
    if algorithm == "dpo":
        found += ["--dataset_name", "pairs", "--eval_dataset_name", "pairs/train"]
    # What is held out is evaluated when the run ends.
    found += ["--eval_prompts_name" if algorithm in ("sft", "dpo") else "--eval_dataset_name", "prompts.txt"]
    found += ["--cache_dir", "cache"] if algorithm in ("sft", "dpo") else []
    found += ["--guard_dataset_names", "prompts.txt"] if algorithm != "sft" else []
    found += ["--use_cpu", "true"] if launcher in (None, "single", "ddp") else []
    found += ["--ddp_backend", "gloo"] if processes > 1 else []
    return [ROOT / f"align/{algorithm}.py", *found, *more]


def train(
    folder: Path, algorithm: str, launcher: str | None, out: str, *more: object, processes: int | None = None
) -> Run:
    """``algorithm`` on one process, or under a shipped launcher config, on two if not said otherwise."""
    count = processes or (1 if launcher is None else 2)
    found = words(folder, algorithm, launcher, out, count, more)
    if launcher is None:
        return Run(folder / out, here(folder, *found))
    return Run(folder / out, run(folder, *on_cpu(ROOT / f"configs/accelerate/{launcher}.yaml", folder, count), *found))


def resume(
    folder: Path, algorithm: str, launcher: str | None, whole: Run, *more: object, processes: int | None = None
) -> Run:
    """Go on from the first checkpoint of ``whole``, on as many processes as :func:`train` or on others."""
    # The same folder may be resumed from in several ways.
    out = f"{whole.folder.name}-on-{launcher or 'one'}-{processes or ''}"
    return train(folder, algorithm, launcher, out, *_from_first(whole.folder.name), *more, processes=processes)


def _from_first(out: str) -> tuple[object, ...]:
    """The words that go on from the first checkpoint of the run in ``out``."""
    return ("--save_strategy", "no", "--resume_from_checkpoint", f"{out}/checkpoint-1")


def train_and_resume(folder: Path, algorithm: str, launcher: str, out: str, *more: object) -> tuple[Run, Run]:
    """``algorithm`` on two processes, and the run that goes on from its first checkpoint, by one launch for both."""
    whole = words(folder, algorithm, launcher, out, 2, more)
    rest = words(folder, algorithm, launcher, f"{out}-rest", 2, [*_from_first(out), *more])
    wrong = chain(folder, launcher, [whole, rest], 2)
    assert not wrong, wrong
    return Run(folder / out), Run(folder / f"{out}-rest")


def chain(folder: Path, launcher: str | None, runs: list[list[object]], processes: int) -> dict[str, str]:
    """Runs, given as :func:`words`, one after the other in one launch of processes: what went wrong, by output_dir."""
    (folder / "chain.py").write_text(CHAIN)
    (folder / "chain.json").write_text(json.dumps([[str(word) for word in run] for run in runs]))
    begin: list[object] = [sys.executable]
    if launcher is not None:
        begin = on_cpu(ROOT / f"configs/accelerate/{launcher}.yaml", folder, processes)
    finish(start(folder, *begin, folder / "chain.py", folder / "chain.json"), timeout=3000)
    return json.loads((folder / "chain.wrong").read_text())
