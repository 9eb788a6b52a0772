"""Make preferences: sample several images of every prompt, score them, and write a ranked data set to train on.

    accelerate launch align/generate.py --config configs/tiny/generate.yaml

The images are the model's own, drawn by the ODE from different noise, with or without an adapter. What is written,
parquet with a row for each prompt (``prompt, images, scores``, ``scores_NAME`` for each reward, and the columns of the
prompts), is what ``align/dpo.py`` and ``python -m preference_data.inspect`` read. A run that was stopped goes on where it
was when it is started again; each of several processes does its share. A signal (Ctrl-C, or a scheduler's SIGTERM) lets it
finish the batch and write what there is.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import gather_object
from datasets import Dataset
from tqdm.auto import tqdm

from align.cli.arguments import ModelArguments, parse, plain_errors, resolve_dataset
from align.cli.launch import load_model
from align.engine.settings import setting
from align.engine.signals import Interrupt
from align.models.contract import FlowModel
from align.sampling.held_out import check_columns
from align.sampling.ranked import extra_columns, write_groups
from align.sampling.rollout import ImageKey, SamplingPlan, rollout
from align.sampling.scorer import Failure, Scoring
from preference_data.prompts import load_prompts
from preference_data.writer import RankedWriter
from rewards import Reward, RewardError, load_rewards
from rewards.weights import CategoryWeights, shown


@dataclass
class GenerateArguments:
    """Prompts, rewards, and how images are sampled."""

    dataset_name: str = setting("", "Prompts: a file, a folder with train.jsonl, a hub name, or tiny/NAME.")
    rewards: list[str] = field(
        default_factory=list,
        metadata={"help": "Rank the images: built-in names, module:attr or file.py:attr; mappings in a config."},
    )
    output_dir: str = setting("", "Folder of the data set: rows go to its subfolder SPLIT, and go on there.")
    dataset_split: str = setting("train", "Split of the prompts.")
    max_prompts: int | None = setting(None, "Take the first so many prompts. Default: all.")
    num_generations: int = setting(8, "Images per prompt.")
    height: int = setting(512, "Pixels.")
    width: int = setting(512, "Pixels.")
    num_inference_steps: int = setting(30, "Denoising steps.")
    guidance_scale: float = setting(1.0, "True classifier-free guidance; acts above 1, at twice the forwards.")
    negative_prompt: str = setting(" ", "What guidance steers away from.")
    rollout_batch_size: int = setting(16, "Images per forward.")
    prompts_per_file: int = setting(16, "Rows of a parquet file; a crash loses at most so many.")
    max_failed_fraction: float = setting(0.1, "Share of the images a reward may fail on before the run stops.")
    use_cpu: bool = setting(False, "Do not use an accelerator.")
    seed: int = setting(0, "Of the images' noise.")

    def check(self) -> None:
        """Raise ValueError naming the first setting that cannot be."""
        for name in ("dataset_name", "output_dir"):
            if not getattr(self, name):
                raise ValueError(f"{name} is missing: pass --{name}, or `{name}:` in the config")
        least = {"num_generations": 2, "num_inference_steps": 2, "rollout_batch_size": 1, "prompts_per_file": 1}
        for name, low in least.items():
            if getattr(self, name) < low:
                raise ValueError(f"{name} must be at least {low}, found {getattr(self, name)}")
        if self.max_prompts is not None and self.max_prompts < 1:
            raise ValueError(f"max_prompts must be at least 1, found {self.max_prompts}")
        if not 0 <= self.max_failed_fraction <= 1:
            raise ValueError(f"max_failed_fraction must lie in [0, 1], found {self.max_failed_fraction}")

    def plan(self) -> SamplingPlan:
        """How images are sampled."""
        return SamplingPlan(
            height=self.height,
            width=self.width,
            num_inference_steps=self.num_inference_steps,
            guidance_scale=self.guidance_scale,
            negative_prompt=self.negative_prompt,
            batch_size=self.rollout_batch_size,
        )

    def decides(self, model: ModelArguments, rewards: Sequence[Reward]) -> dict[str, Any]:
        """What decides the content of a row: to go on with other values would mix two data sets."""
        names = (
            *("dataset_name", "dataset_split", "num_generations", "height", "width", "num_inference_steps"),
            *("guidance_scale", "negative_prompt", "seed"),
        )
        weights = {r.name: shown(r.weight) if isinstance(r.weight, CategoryWeights) else r.weight for r in rewards}
        settings = {name: getattr(self, name) for name in names}
        return settings | {"model": model.model, "adapter": model.adapter, "rewards": weights}


@dataclass
class Failures:
    """How many of this process's images each reward failed on."""

    allowed: float
    images: int = 0

    def __post_init__(self) -> None:
        self.failed: dict[str, int] = {}

    def count(self, images: int, failed: Sequence[Failure]) -> None:
        """Add one batch; raises RewardError once a reward failed on more than the allowed share of all so far."""
        self.images += images
        for name, count, message in failed:
            self.failed[name] = self.failed.get(name, 0) + count
            share = self.failed[name] / self.images
            if share > self.allowed:
                raise RewardError(
                    f"reward {name!r} failed for {share:.0%} of the images: {message} "
                    f"(max_failed_fraction={self.allowed}). What is written stays; start again to go on"
                )


def generate(
    model: FlowModel,
    dataset: Dataset,
    rewards: list[Reward],
    args: GenerateArguments,
    writer: RankedWriter,
    process: tuple[int, int] = (0, 1),
    interrupt: Interrupt | None = None,
) -> int:
    """Sample, score and write what ``writer`` has not yet of this process's rows; returns how many it wrote.

    Rows are sampled in batches that neither the number of processes nor an interruption changes (what is there
    already of a batch is sampled again, not written), and noise is keyed by seed, row and image: the same images always.
    Once ``interrupt`` has received a signal, no further batch is begun.
    """
    index, count = process
    together = max(1, args.rollout_batch_size // args.num_generations)
    batches = [range(i, min(i + together, len(dataset))) for i in range(0, len(dataset), together)][index::count]
    todo = [batch for batch in batches if not writer.done.issuperset(batch)]
    failures, written = Failures(args.max_failed_fraction), 0
    bar = tqdm(total=sum(map(len, todo)), desc="prompts", disable=index > 0)

    def write(numbers: range, images: list[Any], scoring: Scoring) -> int:
        with scoring:
            table, failed = scoring.local()
        failures.count(len(images), failed)
        there = writer.done
        write_groups(writer, numbers, scoring.rows, images, rewards, table, args.num_generations, skip=there)
        bar.update(len(numbers))
        return len(set(numbers) - there)

    sampled: tuple[range, list[Any], Scoring] | None = None  # and not written yet
    with bar:
        for numbers in todo:
            if interrupt is not None and interrupt.received:
                break
            rows = [dataset[number] for number in numbers for _ in range(args.num_generations)]
            keys = [
                ImageKey(args.seed, "generate", number, n) for number in numbers for n in range(args.num_generations)
            ]
            images = rollout(model, [row["prompt"] for row in rows], keys, args.plan()).images
            if sampled is not None:
                written += write(*sampled)
            scoring = Scoring(rewards, rows, model.device)
            scoring.add(slice(0, len(rows)), images)  # while the next batch is sampled
            sampled = (numbers, images, scoring)
        if sampled is not None:
            written += write(*sampled)
    return written


def main(argv: list[str] | None = None) -> None:
    """Generate from a config; everything that can be known wrong is said before the model is loaded."""
    with plain_errors():
        args, model_args = parse((GenerateArguments, ModelArguments), argv)
        args.check()
        rewards = load_rewards(args.rewards)
        dataset = load_prompts(resolve_dataset(args.dataset_name), args.dataset_split)
        if args.max_prompts is not None:
            dataset = dataset.select(range(min(args.max_prompts, len(dataset))))
        check_columns(rewards, [dataset])
        model_args.check(args.height, args.width)
        state = PartialState(cpu=args.use_cpu)
        writer = RankedWriter(
            Path(args.output_dir) / args.dataset_split,
            shard=(state.process_index, state.num_processes),
            rows_per_file=args.prompts_per_file,
            rewards=[reward.name for reward in rewards],
            columns=extra_columns(dataset),
            settings=args.decides(model_args, rewards),
        )
        state.wait_for_everyone()  # before anybody writes, all have seen what is there
        model: Any = load_model(model_args)
    model.device = state.device
    model.transformer.to(state.device)
    process = (state.process_index, state.num_processes)
    started, there = time.perf_counter(), len(writer.done.intersection(range(len(dataset))))
    try:
        with Interrupt("finishing this batch, then writing what there is.") as interrupt:
            with writer:
                written = generate(model, dataset, rewards, args, writer, process, interrupt)
            written = sum(gather_object([written]))  # waits for everyone
    except RewardError as error:
        raise SystemExit(f"stopped: {error}") from error
    if state.is_main_process:
        print(f"{written} prompts x {args.num_generations} images in {time.perf_counter() - started:.0f} s", end="")
        print(f", {there} prompts were there already: {writer.folder}")
        if there + written < len(dataset):
            print(f"interrupted; go on with the same command: {len(dataset) - there - written} prompts are left")


if __name__ == "__main__":
    # Run by path this file is `__main__`; its classes must be known by their own module's name in what is saved.
    from align.generate import main as run

    run()
