"""What GRPO, NFT and online DPO share: prompts in groups, a rollout and its scores, and going on in the middle of one."""

import logging
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import torch
from datasets import Dataset
from peft import PeftConfig
from torch import Tensor
from transformers import TrainerCallback
from trl.trainer.utils import RepeatSampler

from align.engine import reports
from align.engine.trainer import FlowTrainer
from align.models.contract import FlowModel
from align.online.settings import GroupConfig, check_data
from align.sampling.ranked import extra_columns, write_groups
from align.sampling.rollout import ImageKey, Rollout, first_alike, rollout
from align.sampling.scorer import Scoring, weights_of
from preference_data.writer import RankedWriter
from rewards import load_rewards

logger = logging.getLogger(__name__)

#: Something is wrong with a reward when this many rollouts in a row teach nothing.
ROLLOUTS_TO_WARN = 5


def check_dropout(lora_dropout: float | None) -> None:
    """Raise ValueError for an adapter with dropout: images would be drawn from another policy than is trained."""
    if lora_dropout:
        raise ValueError(
            f"lora_dropout must be 0, found {lora_dropout}: sampling and replay would see two different policies"
        )


class EpochRepeatSampler(RepeatSampler):
    """TRL's RepeatSampler, whose order is a function of (seed, epoch), so that a resumed run goes on in order."""

    def set_epoch(self, epoch: int) -> None:
        self.generator.manual_seed((self.seed or 0) + epoch)


class Sampled(NamedTuple):
    """What :meth:`GroupTrainer.sample` returns.

    rollout: of this process. rewards: (images of all processes, rewards), NaN where there is none. weights: the same
    shape, each reward's share in the sum.
    """

    rollout: Rollout
    rewards: Tensor
    weights: Tensor


class GroupTrainer(FlowTrainer):
    """A trainer on groups of its own samples: algorithms differ in what they keep of a rollout, and in the loss.

    Args:
        model: the policy, see :class:`align.models.contract.FlowModel`, or the name of a Qwen-Image.
        rewards: what ``rewards.load_rewards`` takes: names, mappings, or plain functions.
        args: see :class:`align.online.settings.GroupConfig`.
        train_dataset: a ``prompt`` column and whatever columns the rewards ask for by name.
        eval_dataset: held-out prompts; logged as ``eval_reward`` and ``eval_NAME``.
        guard_datasets: further held-out prompts, watched for damage; logged as ``eval_GUARD_NAME``.
        peft_config: train this adapter; without it the whole transformer (or the adapter already loaded).

    Raises:
        ValueError: rewards, columns and batch sizes that do not fit, before any image is drawn.
    """

    args: GroupConfig
    #: What :meth:`generate` makes.
    buffer_type: type[Any]
    phases = ("rollout", "reward", "update")

    def __init__(
        self,
        model: FlowModel | str,
        rewards: list[Any],
        args: GroupConfig,
        train_dataset: Dataset,
        eval_dataset: Dataset | None = None,
        guard_datasets: dict[str, Dataset] | None = None,
        peft_config: PeftConfig | None = None,
        callbacks: list[TrainerCallback] | None = None,
    ) -> None:
        scored_by = load_rewards(rewards)
        check_data(scored_by, args, train_dataset, eval_dataset, guard_datasets or {})
        args.check_world(args.world_size)
        check_dropout(getattr(peft_config, "lora_dropout", 0))
        if isinstance(model, str):
            from align.models.qwen_image import QwenImage

            model = QwenImage.from_pretrained(model)
        super().__init__(
            model,
            args,
            train_dataset,
            rewards=scored_by,
            eval_prompts=eval_dataset,
            guard_datasets=guard_datasets,
            peft_config=peft_config,
            callbacks=callbacks,
        )
        self._buffer: Any = None
        self._micro_step: int | None = None  # micro-batches taken since the start of the run
        self._writer: RankedWriter | None = None
        self._in_a_row: Counter[str] = Counter()

    # -- what an algorithm says ---------------------------------------------------------------------------------------

    def generate(self, rows: list[dict[str, Any]], update: int) -> Any:
        """A buffer of rollout ``update`` over this process's ``rows``; its ``micro_batch(index)`` is what is trained on."""
        raise NotImplementedError

    def save_buffer(self, folder: Path) -> None:
        """Write the buffer into a checkpoint that is taken in the middle of a rollout; called on every process."""
        self._buffer.save(folder, (self.args.process_index, self.args.world_size))

    def load_buffer(self, folder: Path) -> Any:
        """Read what :meth:`save_buffer` wrote, on as many processes or on others."""
        process = (self.args.process_index, self.args.world_size)
        return self.buffer_type.load(folder, process, self.accelerator.device, **self.parts())

    def parts(self) -> dict[str, Any]:
        """How a buffer of single images is dealt out on this process, as it takes it."""
        return {
            "micro_batches": self.args.micro_batches_per_pass(self.args.world_size),
            "per_update": self.args.gradient_accumulation_steps,
            "keep_one": self.in_step,
        }

    # -- prompts: each rollout's rows are handed out again for every micro-batch taken from it ----------------------

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> RepeatSampler:
        return EpochRepeatSampler(
            data_source=self.train_dataset,
            mini_repeat_count=self.args.num_generations,
            batch_size=self.args.generation_batch_size // self.args.num_generations,
            repeat_count=self.args.micro_batches_per_rollout(self.args.world_size),
            seed=self.args.data_seed if self.args.data_seed is not None else self.args.seed,
        )

    def get_train_dataloader(self) -> Any:
        return self._get_dataloader(
            dataset=self.train_dataset,
            description="Training",
            batch_size=self.args.generation_batch_size // self.args.world_size,
            sampler_fn=self._get_train_sampler,
            is_training=True,
        )

    def _prepare_inputs(self, inputs: list[dict[str, Any]]) -> Any:
        """A micro-batch of the buffer; every so many of them, first a new rollout of the prompts in ``inputs``."""
        per_rollout = self.args.micro_batches_per_rollout(self.args.world_size)
        if self._micro_step is None:
            self._restore()
            assert self._micro_step is not None
        if self._micro_step % per_rollout == 0:
            self._buffer = self.generate(inputs, update=self._micro_step // per_rollout)
        assert self._buffer is not None
        batch = self._buffer.micro_batch(self._micro_step % per_rollout)
        self._micro_step += 1
        return batch

    # -- a rollout and its scores -----------------------------------------------------------------------------------

    def sample(self, rows: list[dict[str, Any]], update: int, num_prefixes: int | None = None) -> Sampled:
        """This process's images, one for each of ``rows``, and the scores of all processes' images.

        ``num_prefixes``: how many initial noises a group has, where not each image its own.
        """
        args = self.args
        with Scoring(self.rewards, rows, self.accelerator.device) as scoring:
            with self.metrics.timed("rollout"):
                result = rollout(
                    self.flow,
                    [row["prompt"] for row in rows],
                    self._image_keys(update, len(rows), num_prefixes),
                    args.plan(update),
                    transformer=self.model_wrapped,
                    show_progress=self.is_world_process_zero() and not args.disable_tqdm,
                    on_images=scoring.add,
                )
            with self.metrics.timed("reward"):  # what is not hidden behind the sampling
                table = scoring.table(args.max_failed_fraction)
        self.metrics.record(seconds_scoring=scoring.seconds)
        rewards = self._gather(torch.tensor(table, dtype=torch.float32).T)
        weights = self._gather(weights_of(self.rewards, rows))
        self.metrics.forward_equivalents += result.forwards
        if args.save_rollouts:
            first = args.process_index * len(rows)
            self._save_rollout(rows, result, rewards[first : first + len(rows)], update)
        return Sampled(result, rewards, weights)

    def _gather(self, values: Tensor) -> Tensor:
        """(images, rewards) of all processes, from this one's."""
        return self.accelerator.gather(values.contiguous().to(self.accelerator.device)).cpu()

    def _image_keys(self, update: int, images: int, num_prefixes: int | None) -> list[ImageKey]:
        """Keys of this process's images by their place in the whole rollout, whatever the number of processes."""
        group, first = self.args.num_generations, self.args.process_index * images
        return [
            ImageKey(self.args.seed, update, i // group, i % group, first_alike(i, group, num_prefixes) % group)
            for i in range(first, first + images)
        ]

    def _save_rollout(self, rows: list[dict[str, Any]], result: Rollout, rewards: Tensor, update: int) -> None:
        """Append this process's groups to ``output_dir/rollouts``; a resumed run finds those that are there."""
        args, groups = self.args, len(rows) // self.args.num_generations
        if self._writer is None:
            columns = [*extra_columns(self.train_dataset), pa.field("update", pa.int64())]
            self._writer = RankedWriter(
                Path(args.output_dir) / "rollouts",
                shard=(args.process_index, args.world_size),
                rows_per_file=groups,
                rewards=[reward.name for reward in self.rewards],
                columns=pa.schema(columns),
            )
        first = update * (args.generation_batch_size // args.num_generations) + args.process_index * groups
        if first not in self._writer.done:
            numbers, table = range(first, first + groups), rewards.T.tolist()
            write_groups(
                self._writer,
                numbers,
                rows,
                result.images,
                self.rewards,
                table,
                args.num_generations,
                {"update": update},
            )

    def record_rewards(self, rewards: Tensor, total: Tensor, dead_groups: float) -> None:
        """Log (images, rewards) scores, (images,) weighted sums, and the share of groups that nothing is learned from."""
        groups = total.view(-1, self.args.num_generations)
        values = {"reward": total.nanmean(), "reward_std": _nanstd(groups).nanmean()}
        for column, reward in zip(rewards.unbind(1), self.rewards, strict=True):
            values[f"rewards/{reward.name}/mean"] = column.nanmean()
            values[f"rewards/{reward.name}/std"] = _nanstd(column[None])[0]
            values[f"rewards/{reward.name}/unscored"] = column.isnan().float().mean()
            cut = getattr(reward.function, "truncated", None)  # prompts longer than it reads, so far
            if cut:
                values[f"rewards/{reward.name}/truncated"] = torch.tensor(float(cut))
        self.metrics.record(dead_groups=dead_groups, **{name: value.item() for name, value in values.items()})
        self.metrics.count_images(len(rewards))
        self._warn_when_often(
            dead_groups == 1.0, "had nothing to learn from: every group's images scored the same, or not at all"
        )
        for column, reward in zip(rewards.unbind(1), self.rewards, strict=True):
            known = column[~column.isnan()]
            self._warn_when_often(not len(known), f"got no score from reward {reward.name!r} for any image")
            same = len(known) > 1 and bool((known == known[0]).all())
            self._warn_when_often(same, f"got one and the same score from reward {reward.name!r} for every image")

    def _warn_when_often(self, happened: bool, what: str) -> None:
        self._in_a_row[what] = self._in_a_row[what] + 1 if happened else 0
        if happened and self._in_a_row[what] % ROLLOUTS_TO_WARN == 0 and self.is_world_process_zero():
            logger.warning("the last %d rollouts %s", self._in_a_row[what], what)

    def no_loss(self) -> Tensor:
        """0, with a gradient of 0 for everything that is trained."""
        return torch.stack([0.0 * p.sum() for p in self.trained_parameters().values()]).sum()

    # -- the run ----------------------------------------------------------------------------------------------------

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> Any:
        self._micro_step, self._buffer = None, None
        self._in_a_row.clear()
        return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)

    def save_progress(self, folder: Path) -> None:
        taken = self.state.global_step * self.args.gradient_accumulation_steps
        if self._buffer is not None and taken % self.args.micro_batches_per_rollout(self.args.world_size):
            self.save_buffer(folder)

    def _restore(self) -> None:
        """Counters, and the rest of a rollout that a checkpoint was taken in the middle of."""
        self._micro_step = self.state.global_step * self.args.gradient_accumulation_steps
        counted = reports.series(self.state.log_history, "forward_equivalents")[1]
        if counted and self.is_world_process_zero():
            self.metrics.forward_equivalents = counted[-1]
        if self._micro_step % self.args.micro_batches_per_rollout(self.args.world_size):
            assert self.resumed_from is not None
            self._buffer = self.load_buffer(Path(self.resumed_from))


def _nanstd(values: Tensor) -> Tensor:
    """(P, G) to (P,) sample standard deviations over what is not NaN."""
    known = ~values.isnan()
    centred = (values - values.nanmean(1, keepdim=True)).masked_fill(~known, 0.0)
    return (centred.pow(2).sum(1) / (known.sum(1) - 1).clamp(min=1)).sqrt()
