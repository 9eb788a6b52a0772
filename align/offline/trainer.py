"""What SFT and DPO share: a trainer on images, and the held-out loss."""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor

from align.engine.matching import MatchingBatch
from align.engine.resume import describe_inputs
from align.engine.trainer import FlowTrainer, ModelSource
from align.models.contract import Request
from align.models.families import Deferred
from align.offline.examples import BucketSampler, DrawnExamples, held_out_batch
from align.offline.latents import Example, LatentStore
from align.offline.settings import OfflineConfig
from preference_data.buckets import make_buckets
from preference_data.cache import TensorCache
from preference_data.images import BadRow, ImageSource


class OfflineTrainer(FlowTrainer):
    """A trainer on images: SFT and DPO differ in what a row is, and in the loss of a batch.

    Args:
        model: see :class:`align.engine.trainer.FlowTrainer`.
        train_dataset, eval_dataset: iterables of schema objects of ``preference_data``.
        on_bad_row: ``error`` or ``skip``, for an image that cannot be decoded.
        others: see :class:`align.engine.trainer.FlowTrainer`.
    """

    args: OfflineConfig

    def __init__(
        self,
        model: ModelSource,
        args: OfflineConfig,
        train_dataset: Iterable[Any],
        eval_dataset: Iterable[Any] | None = None,
        *,
        on_bad_row: str = "error",
        **others: Any,
    ) -> None:
        cache = TensorCache(args.cache_dir) if args.cache_dir else None
        if cache is not None:
            cache.check()
        model = Deferred.of(model, others.get("peft_config"))
        cell = model.outline.cell
        buckets = make_buckets(args.bucket_resolution(cell), cell, args.max_aspect_ratio)
        super().__init__(model, args, None, eval_dataset, **others)
        self.inputs.fixed.update(describe_inputs(train_dataset, []).fixed)
        self.flow.condition_cache = cache
        self.store = LatentStore(self.flow, cache, buckets, on_bad_row)
        examples = self._prepare(train_dataset, "training data", [Request(args.negative_prompt)])
        self.train_dataset = DrawnExamples(examples)
        self.held_out: list[Example] = []
        if eval_dataset is not None:
            self.held_out = self._prepare(eval_dataset, "held-out data")

    def images_of(self, record: Any) -> tuple[Request, list[ImageSource]]:
        """Return (request, the images that are trained on together) of a record."""
        raise NotImplementedError

    def held_out_errors(self, batch: MatchingBatch) -> Tensor:
        """Return the (levels, values) of one held-out example, from which :meth:`held_out_summary` is made."""
        raise NotImplementedError

    def held_out_summary(self, values: Tensor, prefix: str) -> dict[str, float]:
        """Return metrics from (examples, levels, values)."""
        raise NotImplementedError

    def _prepare(self, data: Iterable[Any], what: str, extra: Sequence[Request] = ()) -> list[Example]:
        """Return the examples of a data set, and tell what of it is used and what becomes of it.

        Raises:
            BadRow: see :meth:`LatentStore.prepare`; or nothing is left to train on.
        """
        files: list[Path] = []

        def rows() -> Iterator[tuple[Request, list[ImageSource], str]]:
            for record in data:
                request, images = self.images_of(record)
                files.extend(image.path for image in images if image.path is not None)
                yield request, images, getattr(record, "origin", "")

        examples, account = self.store.prepare(rows(), what, extra)
        if self.is_world_process_zero() or not examples:
            account.leave_out_of(data, files)
        if not examples:
            raise BadRow(what, "; ".join(["holds nothing to train on", *account.lines()[1:]]))
        self.tell(account.lines())
        return examples

    def _get_train_sampler(self, train_dataset: Any = None) -> BucketSampler:
        buckets = [example.bucket for example in self.train_dataset.examples]
        return BucketSampler(buckets, self.args.rows_per_update(), self.args.order_seed())

    def get_train_dataloader(self) -> Any:
        return self._get_dataloader(
            dataset=self.train_dataset,
            description="Training",
            batch_size=self.args.per_device_train_batch_size,
            sampler_fn=self._get_train_sampler,
            is_training=True,
        )

    def held_out_metrics(self, eval_dataset: Any, prefix: str) -> dict[str, float]:
        """Measure the held-out loss, if there is held-out data, and the samples of held-out prompts."""
        examples = self.held_out
        if eval_dataset is not None and eval_dataset is not self.eval_dataset:
            examples = self._prepare(eval_dataset, "held-out data")
        metrics: dict[str, float] = {}
        if examples:
            metrics = self.held_out_summary(self._measure(examples), prefix)
        return metrics | self.evaluate_samples(self.eval_prompts, prefix)

    @torch.no_grad()
    def _measure(self, examples: Sequence[Example]) -> Tensor:
        """Return (examples, levels, values) in the order of the data, on every process."""
        mine: dict[int, list[list[float]]] = {}
        index, count = self.args.process_index, self.args.world_size
        # Every process takes as many turns, or a sharded model would wait for forwards that never come.
        for turn in range(-(-len(examples) // count)):
            row = (index + turn * count) % len(examples)
            batch = held_out_batch(examples[row], row, self.store, self.args, self.accelerator.device)
            with self.compute_loss_context_manager():
                mine[row] = self.held_out_errors(batch).tolist()
        rows = {row: values for of_process in gather_object([mine]) for row, values in of_process.items()}
        return torch.tensor([rows[row] for row in sorted(rows)], dtype=torch.float64)

    def level_names(self) -> list[str]:
        """Return the noise levels of the held-out loss, before the schedule's shift, as they stand in the metrics' names."""
        return [f"{(n + 0.5) / self.args.eval_sigmas:.2f}" for n in range(self.args.eval_sigmas)]
