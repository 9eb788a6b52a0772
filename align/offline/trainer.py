"""What SFT and DPO share: a trainer on images, and the held-out loss."""

import logging
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor

from align.engine.matching import MatchingBatch
from align.engine.trainer import FlowTrainer
from align.models.contract import FlowModel
from align.offline.examples import BucketSampler, DrawnExamples, held_out_batch
from align.offline.latents import Example, LatentStore
from align.offline.settings import MatchingConfig
from preference_data.buckets import make_buckets
from preference_data.images import ImageSource
from rewards import load_rewards

logger = logging.getLogger(__name__)


class MatchingTrainer(FlowTrainer):
    """A trainer on images: SFT and DPO differ in what a row is, and in the loss of a batch.

    Args:
        train_dataset, eval_dataset: iterables of schema objects of ``preference_data``.
        on_bad_row: ``error`` or ``skip``, for an image that cannot be decoded.
        others: see :class:`align.engine.trainer.FlowTrainer`.
    """

    args: MatchingConfig

    def __init__(
        self,
        model: FlowModel | str,
        args: MatchingConfig,
        train_dataset: Iterable[Any],
        eval_dataset: Iterable[Any] | None = None,
        *,
        rewards: list[Any] | None = None,
        on_bad_row: str = "error",
        **others: Any,
    ) -> None:
        if isinstance(model, str):
            from align.models.qwen_image import QwenImage

            model = QwenImage.from_pretrained(model)
        resolution = args.bucket_resolution(model.cell)
        buckets = make_buckets(resolution, model.cell, args.max_aspect_ratio)
        scored_by = load_rewards(rewards) if rewards else []
        super().__init__(model, args, None, eval_dataset, rewards=scored_by, **others)
        self.store = LatentStore(self.flow, args.cache_dir, buckets, on_bad_row)
        self.train_dataset = DrawnExamples(
            self.store.prepare(map(self.images_of, train_dataset), "training data", [args.negative_prompt])
        )
        self.held_out: list[Example] = []
        if eval_dataset is not None:
            self.held_out = self.store.prepare(map(self.images_of, eval_dataset), "held-out data")
        self._report_buckets()

    def images_of(self, record: Any) -> tuple[str, list[ImageSource]]:
        """(prompt, the images that are trained on together) of a record."""
        raise NotImplementedError

    def held_out_errors(self, batch: MatchingBatch) -> Tensor:
        """(levels, values) of one held-out example, from which :meth:`held_out_summary` is made."""
        raise NotImplementedError

    def held_out_summary(self, values: Tensor, prefix: str) -> dict[str, float]:
        """Metrics from (examples, levels, values)."""
        raise NotImplementedError

    def _report_buckets(self) -> None:
        sampler = self._get_train_sampler()
        if self.is_world_process_zero():
            sizes = Counter(example.bucket for example in self.train_dataset.examples)
            shown = ", ".join(f"{b.width}x{b.height}: {count}" for b, count in sorted(sizes.items()))
            logger.info("%d training examples (width x height: %s)", len(self.train_dataset), shown)
            if sampler.repeated > len(self.train_dataset) // 2:
                logger.warning(
                    "%d examples in %d buckets, batches of %d: an epoch repeats %d of them to fill its batches. A smaller "
                    "batch or max_aspect_ratio wastes less",
                    *(len(self.train_dataset), len(sizes), sampler.batch_size, sampler.repeated),
                )

    def _get_train_sampler(self, train_dataset: Any = None) -> BucketSampler:
        args = self.args
        update = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
        seed = args.data_seed if args.data_seed is not None else args.seed
        return BucketSampler([example.bucket for example in self.train_dataset.examples], update, seed)

    def get_train_dataloader(self) -> Any:
        return self._get_dataloader(
            dataset=self.train_dataset,
            description="Training",
            batch_size=self.args.per_device_train_batch_size,
            sampler_fn=self._get_train_sampler,
            is_training=True,
        )

    def held_out_metrics(self, eval_dataset: Any, prefix: str) -> dict[str, float]:
        """The held-out loss, if there is held-out data, and the samples of held-out prompts."""
        examples = self.held_out
        if eval_dataset is not None and eval_dataset is not self.eval_dataset:
            examples = self.store.prepare(map(self.images_of, eval_dataset), "held-out data")
        metrics: dict[str, float] = {}
        if examples:
            metrics = self.held_out_summary(self._measure(examples), prefix)
        return metrics | self.evaluate_samples(self.eval_prompts, prefix)

    @torch.no_grad()
    def _measure(self, examples: Sequence[Example]) -> Tensor:
        """(examples, levels, values) in the order of the data, on every process."""
        mine: dict[int, list[list[float]]] = {}
        index, count = self.args.process_index, self.args.world_size
        # Every process takes as many turns, or a sharded model would wait for forwards that never come.
        for turn in range(-(-len(examples) // count)):
            row = (index + turn * count) % len(examples)
            batch = held_out_batch(examples[row], row, self.store, self.args, self.accelerator.device)
            with self.compute_loss_context_manager():
                mine[row] = self.held_out_errors(batch).tolist()
        rows = {row: values for part in gather_object([mine]) for row, values in part.items()}
        return torch.tensor([rows[row] for row in sorted(rows)], dtype=torch.float64)

    def level_names(self) -> list[str]:
        """The noise levels of the held-out loss, before the schedule's shift, as metrics are called by them."""
        return [f"{(n + 0.5) / self.args.eval_sigmas:.2f}" for n in range(self.args.eval_sigmas)]
