"""Make preferences: sample several images of every prompt, score them, and write a ranked data set to train on.

    accelerate launch align/generate.py --config configs/tiny/generate.yaml

The images are the model's own, drawn by the ODE from different noise, with or without an adapter. What is written,
parquet with a row for each prompt (``prompt, images, scores``, ``scores_NAME`` for each reward, and the columns of the
prompts), is what ``align/dpo.py`` and ``flow-align inspect`` read. Without rewards there is nothing to rank: the images
are PNG files with a ``metadata.jsonl``, to look at, or for ``align/sft.py``. A run that was stopped goes on where it
was when it is started again; each of several processes does its share. A signal (Ctrl-C, or a scheduler's SIGTERM) lets it
finish the batch and write what there is.
"""

import time
from collections.abc import Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import gather_object
from datasets import Dataset
from tqdm.auto import tqdm

from align.cli.arguments import ModelArguments, parse, plain_errors, resolve_dataset
from align.cli.data import named
from align.cli.launch import defer_model, try_attention_backend
from align.engine.checks import check_writable
from align.engine.settings import check_settings, plan_of, setting, values_of
from align.engine.signals import Interrupt
from align.models.adapters import find_adapter
from align.models.contract import FlowModel, NotFinite
from align.models.loading import digest_file
from align.parallel.sharding import check_world_size
from align.sampling.held_out import check_columns
from align.sampling.noise import ImageKey
from align.sampling.ranked import extra_columns, write_groups
from align.sampling.scored import ScoredSamples, sample_and_score
from align.sampling.scorer import Failures
from preference_data.image_writer import ImageWriter
from preference_data.prompts import load_prompts
from preference_data.writer import RankedWriter
from rewards import Reward, RewardError, load_rewards


@dataclass
class GenerateArguments:
    """Prompts, rewards, and how images are sampled. A data set that is gone on with needs the same fixed ones."""

    dataset_name: str = setting(
        "", "Prompts: a file, a folder with train.jsonl, a hub name, or tiny/NAME.", fixed_on_resume=True
    )
    rewards: list[str] = setting(
        [],
        "Rank the images: built-in names, module:attr or file.py:attr; mappings in a config. None: plain images.",
        mappings=True,
    )
    output_dir: str = setting("", "Folder of the data set: rows or images go to its subfolder SPLIT.")
    dataset_split: str = setting("train", "Split of the prompts.", fixed_on_resume=True)
    max_prompts: int | None = setting(None, "Take the first so many prompts. Default: all.", least=1)
    num_generations: int = setting(8, "Images per prompt.", fixed_on_resume=True, least=1)
    height: int = setting(512, "Pixels.", fixed_on_resume=True, above=0)
    width: int = setting(512, "Pixels.", fixed_on_resume=True, above=0)
    num_inference_steps: int = setting(30, "Denoising steps.", fixed_on_resume=True, least=2)
    guidance_scale: float = setting(
        1.0, "True classifier-free guidance; acts above 1, at twice the forwards.", fixed_on_resume=True, least=0
    )
    negative_prompt: str = setting(" ", "What guidance steers away from.", fixed_on_resume=True)
    rollout_batch_size: int = setting(16, "Images per forward.", least=1)
    prompts_per_file: int = setting(16, "Rows of a parquet file; a crash loses at most so many.", least=1)
    max_failed_fraction: float = setting(
        0.1, "Share of the images a reward may fail on before the run stops.", least=0, most=1
    )
    use_cpu: bool = setting(False, "Do not use an accelerator.")
    seed: int = setting(0, "Of the images' noise.", fixed_on_resume=True)

    def check(self) -> None:
        """Raise ValueError naming the first setting that cannot be."""
        named(self.dataset_name)
        if not self.output_dir:
            raise ValueError("output_dir is missing: pass --output_dir, or `output_dir:` in the config")
        check_settings(self)
        if self.dataset_split in ("", "..") or Path(self.dataset_split).name != self.dataset_split:
            raise ValueError(f"dataset_split must be a name, which a folder gets too, found {self.dataset_split!r}")
        if self.rewards and self.num_generations < 2:
            raise ValueError(f"num_generations must be at least 2 for rewards to rank, found {self.num_generations}")

    def decides(self, model: ModelArguments, rewards: Sequence[Reward]) -> dict[str, Any]:
        """Return what decides the content of a row: to go on with other values would mix two data sets."""
        adapter = model.adapter and digest_file(find_adapter(model.adapter))
        settings = values_of(self, fixed_on_resume=True)
        return settings | {"model": model.model, "adapter": adapter, "rewards": [r.described() for r in rewards]}


def generate(
    model: FlowModel,
    dataset: Dataset,
    rewards: list[Reward],
    args: GenerateArguments,
    writer: RankedWriter | ImageWriter,
    process: tuple[int, int] = (0, 1),
    interrupt: Interrupt | None = None,
) -> int:
    """Sample, score and write this process's rows that ``writer`` lacks; return how many were written.

    Without rewards ``writer`` is an ImageWriter.

    Rows are sampled in batches that neither the number of processes nor an interruption changes (rows of a batch that
    exist already are sampled again, but not written again), and noise is keyed by seed, row and image: the same images always.
    Once ``interrupt`` has received a signal, no further batch is begun.
    """
    index, count = process
    together = max(1, args.rollout_batch_size // args.num_generations)
    batches = [range(i, min(i + together, len(dataset))) for i in range(0, len(dataset), together)][index::count]
    missing = [batch for batch in batches if not writer.done.issuperset(batch)]
    failures, total = Failures(args.max_failed_fraction), 0
    bar = tqdm(total=sum(map(len, missing)), desc="prompts", disable=index > 0)

    def write(numbers: range, samples: ScoredSamples) -> int:
        table, failed = samples.local_scores()
        failures.add(len(samples.rollout.images), failed)
        failures.check()
        before = writer.done
        write_rows(writer, numbers, samples, table, args.num_generations, skip=before)
        bar.update(len(numbers))
        return len(set(numbers) - before)

    batch: tuple[range, ScoredSamples] | None = None  # sampled and not written yet: it is scored meanwhile
    newest: ScoredSamples | None = None
    try:
        for numbers in missing:
            if interrupt is not None and interrupt.received:
                break
            rows = [dataset[number] for number in numbers for _ in range(args.num_generations)]
            keys = [
                ImageKey(args.seed, "generate", number, n) for number in numbers for n in range(args.num_generations)
            ]
            after = None if newest is None else newest.scorer
            newest = sample_and_score(model, rewards, rows, keys, plan_of(args), after=after)
            if batch is not None:
                total += write(*batch)
            batch = (numbers, newest)
        if batch is not None:
            total += write(*batch)
    finally:
        bar.close()
        for samples in (newest, None if batch is None else batch[1]):
            if samples is not None:  # after an error rewards are not called for what will not be written
                samples.scorer.end()
    return total


def write_rows(
    writer: RankedWriter | ImageWriter,
    numbers: Sequence[int],
    samples: ScoredSamples,
    table: list[list[float]],
    num_generations: int,
    skip: Set[int],
) -> None:
    """Write the rows of these numbers but those in ``skip``: with their scores, or their images alone."""
    rows, images, rewards = samples.scorer.rows, samples.rollout.images, samples.scorer.rewards
    if isinstance(writer, RankedWriter):
        write_groups(writer, numbers, rows, images, rewards, table, num_generations, skip=skip)
        return
    for place, number in enumerate(numbers):
        if number not in skip:
            writer.write(number, images[place * num_generations : (place + 1) * num_generations])


def open_writer(
    args: GenerateArguments,
    dataset: Dataset,
    rewards: list[Reward],
    settings: dict[str, Any],
    process: tuple[int, int],
) -> RankedWriter | ImageWriter:
    """Open the folder that a run writes to, which holds what was written before under the same ``settings``."""
    folder = Path(args.output_dir) / args.dataset_split
    if not rewards:
        return ImageWriter(folder, dataset, args.num_generations, settings=settings, shard=process)
    writer = RankedWriter(
        folder,
        shard=process,
        rows_per_file=args.prompts_per_file,
        rewards=[reward.name for reward in rewards],
        columns=extra_columns(dataset),
        settings=settings,
    )
    writer.check_prompts(dataset["prompt"])
    return writer


def main(argv: list[str] | None = None) -> None:
    """Generate from a config; every mistake that can be detected before the model loads is reported then."""
    with plain_errors():
        args, model_args = parse((GenerateArguments, ModelArguments), argv, "generate")
        args.check()
        rewards = load_rewards(args.rewards) if args.rewards else []
        dataset = load_prompts(resolve_dataset(args.dataset_name), args.dataset_split)
        if args.max_prompts is not None:
            dataset = dataset.select(range(min(args.max_prompts, len(dataset))))
        check_columns(rewards, [dataset])
        check_writable(args.output_dir)
        deferred = defer_model(model_args)
        deferred.outline.latent_shape(args.height, args.width)
        state = PartialState(cpu=args.use_cpu)
        try_attention_backend(model_args, deferred.outline, state.device)
        check_world_size(state.num_processes, "--use_cpu true")
        process = (state.process_index, state.num_processes)
        writer = open_writer(args, dataset, rewards, args.decides(model_args, rewards), process)
        state.wait_for_everyone()  # before anybody writes, all have seen what is there
        model: Any = deferred.load()
    model.device = state.device
    model.transformer.to(state.device)
    started, before = time.perf_counter(), len(writer.done.intersection(range(len(dataset))))
    try:
        with Interrupt("finishing this batch, then writing what there is.") as interrupt:
            with writer:
                written = generate(model, dataset, rewards, args, writer, process, interrupt)
            written = sum(gather_object([written]))  # waits for everyone
    except (RewardError, NotFinite) as error:
        raise SystemExit(f"stopped: {error}. What is written stays; start again to go on") from error
    if state.is_main_process:
        writer.close()  # once more: others may have written after this process had
        print(f"{written} prompts x {args.num_generations} images in {time.perf_counter() - started:.0f} s", end="")
        print(f", {before} prompts were there already: {writer.folder}")
        if before + written < len(dataset):
            print(f"interrupted; go on with the same command: {len(dataset) - before - written} prompts are left")


if __name__ == "__main__":
    # Run by path this file is `__main__`; its classes must be known by their own module's name in what is saved.
    from align.generate import main as by_name

    by_name()
