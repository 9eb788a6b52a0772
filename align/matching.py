"""What SFT and DPO share: batches of one size, the noise they are trained at, and the flow-matching error.

All that is random about an example is keyed by the run's seed and by its place in the order of the whole run, so a
resumed run, or one on another number of processes, trains on the same noise.
"""

import logging
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.utils.data import Dataset, Sampler

from align.flow import add_noise, logit_normal_sigma, velocity_target
from align.flow_config import FlowConfig, setting
from align.latents import Example, LatentStore
from align.losses import flow_matching_loss
from align.models.base import FlowModel
from align.rollout import seeded_generator, seeded_noise
from align.trainer import FlowTrainer
from preference_data.buckets import Bucket, make_buckets
from preference_data.images import ImageSource
from rewards import load_rewards

logger = logging.getLogger(__name__)

#: (example, its place in the order of the run)
Drawn = tuple[Example, int]


@dataclass
class NoiseLevels(FlowConfig):
    """Arguments of all that trains on the flow-matching error: how noise levels are drawn."""

    logit_mean: float = setting(0.0, "Noise levels are sigmoid(N(mean, std^2)), then shifted by the schedule.")
    logit_std: float = setting(1.0, "See logit_mean.")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_positive("logit_std")

    def draw_sigma(self, streams: Sequence[torch.Generator], model: FlowModel, bucket: Bucket) -> Tensor:
        """(B,) noise levels, each from a random stream of its own, shifted as the model's schedule is at this size."""
        drawn = [logit_normal_sigma(1, self.logit_mean, self.logit_std, stream) for stream in streams]
        return model.shift_sigma(torch.cat(drawn), *bucket)


@dataclass
class MatchingConfig(NoiseLevels):
    """Arguments that training on images shares: sizes, the cache."""

    resolution: int | None = setting(
        None, "Images are trained at about resolution x resolution pixels. Default: the side of height x width."
    )
    max_aspect_ratio: float = setting(2.0, "Longest to shortest side of the aspect-ratio buckets; 1: square alone.")
    cache_dir: str | None = setting(
        "~/.cache/flow-align", "Latents and prompt embeddings are kept here, by content. none: encode every time."
    )
    eval_sigmas: int = setting(5, "Noise levels at which the held-out loss is measured, the same in every run.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if str(self.cache_dir).lower() in ("none", "null", ""):
            self.cache_dir = None
        if self.max_aspect_ratio < 1:
            raise ValueError(f"max_aspect_ratio must be at least 1, found {self.max_aspect_ratio}")
        self.check_positive("resolution")
        self.check_least("eval_sigmas", 1)

    def bucket_resolution(self, cell: int) -> int:
        """``resolution``, or the side of the square of height x width, in multiples of ``cell``."""
        return self.resolution or max(cell, round(math.sqrt(self.height * self.width) / cell) * cell)


class DrawnExamples(Dataset):
    """Examples by (index, place in the run), as :class:`BucketSampler` asks for them."""

    def __init__(self, examples: Sequence[Example]) -> None:
        self.examples = examples

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, drawn: tuple[int, int]) -> Drawn:
        index, place = drawn
        return self.examples[index], place


class BucketSampler(Sampler):
    """Every example once an epoch, in an order that is a function of (seed, epoch), in batches of one bucket.

    ``batch_size`` is that of an optimizer update over all processes: however it is split, every part has one size. A
    bucket that does not fill its last batch fills it with examples drawn from it again (:attr:`repeated` of them).
    """

    def __init__(self, buckets: Sequence[Bucket], batch_size: int, seed: int) -> None:
        self.batch_size, self.seed, self.epoch = batch_size, seed, 0
        self._members: dict[Bucket, list[int]] = {}
        for index, bucket in enumerate(buckets):
            self._members.setdefault(bucket, []).append(index)
        self._length = sum(-(-len(m) // batch_size) * batch_size for m in self._members.values())
        self.repeated = self._length - len(buckets)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[tuple[int, int]]:
        generator = seeded_generator((self.seed, "order", self.epoch))
        batches = []
        for members in self._members.values():
            order = [members[i] for i in torch.randperm(len(members), generator=generator)]
            missing = -len(order) % self.batch_size
            order += [members[i] for i in torch.randint(len(members), (missing,), generator=generator)]
            batches += [order[i : i + self.batch_size] for i in range(0, len(order), self.batch_size)]
        shuffled = [batches[i] for i in torch.randperm(len(batches), generator=generator)]
        for place, index in enumerate(index for batch in shuffled for index in batch):
            yield index, self.epoch * self._length + place


@dataclass
class MatchingBatch:
    """B examples of one size. latents: (B, images of an example, tokens, channels). noise: (B, tokens, channels), the
    same for all images of an example. sigma: (B,). prompts: B.
    """

    latents: Tensor
    noise: Tensor
    sigma: Tensor
    prompts: list[str]
    bucket: Bucket

    @classmethod
    def draw(
        cls, rows: Sequence[Drawn], store: LatentStore, args: MatchingConfig, device: torch.device, drop: float = 0.0
    ) -> "MatchingBatch":
        """Latents, noise and noise levels of the drawn examples; a share ``drop`` of the prompts becomes negative."""
        bucket = rows[0][0].bucket
        latents = torch.stack([store.latents(example) for example, _ in rows])
        streams = [seeded_generator((args.seed, "sigma", place)) for _, place in rows]
        sigma = args.draw_sigma(streams, store.model, bucket)
        dropped = [torch.rand((), generator=stream).item() < drop for stream in streams]
        prompts = [args.negative_prompt if d else e.prompt for d, (e, _) in zip(dropped, rows, strict=True)]
        noise = torch.stack([seeded_noise((args.seed, "noise", place), latents.shape[2:]) for _, place in rows])
        return cls(latents.to(device), noise.to(device), sigma.to(device), prompts, bucket)

    @classmethod
    def held_out(
        cls, example: Example, row: int, store: LatentStore, args: MatchingConfig, device: torch.device
    ) -> "MatchingBatch":
        """One held-out example at ``eval_sigmas`` evenly spaced noise levels, with noise that no run changes."""
        levels, bucket = args.eval_sigmas, example.bucket
        latents = store.latents(example)[None].expand(levels, -1, -1, -1)
        noise = torch.stack(
            [seeded_noise((args.eval_seed, "held out", row, n), latents.shape[2:]) for n in range(levels)]
        )
        sigma = store.model.shift_sigma((torch.arange(levels) + 0.5) / levels, *bucket)
        return cls(latents.to(device), noise.to(device), sigma.to(device), [example.prompt] * levels, bucket)


def matching_errors(model: FlowModel, batch: MatchingBatch, transformer: nn.Module) -> Tensor:
    """(B, images of an example) flow-matching loss of every image, all in one forward. Report eq. 2."""
    images = batch.latents.shape[1]
    clean = batch.latents.flatten(0, 1)  # an example's images next to each other
    noise, sigma = batch.noise.repeat_interleave(images, 0), batch.sigma.repeat_interleave(images, 0)
    prompts = [prompt for prompt in batch.prompts for _ in range(images)]
    velocity = model.velocity(
        add_noise(clean, noise, sigma),
        sigma,
        model.encode_prompts(prompts),
        height=batch.bucket.height,
        width=batch.bucket.width,
        transformer=transformer,
    )
    return flow_matching_loss(velocity, velocity_target(clean, noise)).view(-1, images)


class MatchingTrainer(FlowTrainer):
    """A trainer on images: SFT and DPO differ in what a row is, and in the loss of a batch.

    Args:
        train_dataset, eval_dataset: iterables of schema objects of ``preference_data``.
        on_bad_row: ``error`` or ``skip``, for an image that cannot be decoded.
        others: see :class:`align.trainer.FlowTrainer`.
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
            batch = MatchingBatch.held_out(examples[row], row, self.store, self.args, self.accelerator.device)
            with self.compute_loss_context_manager():
                mine[row] = self.held_out_errors(batch).tolist()
        rows = {row: values for part in gather_object([mine]) for row, values in part.items()}
        return torch.tensor([rows[row] for row in sorted(rows)], dtype=torch.float64)

    def level_names(self) -> list[str]:
        """The noise levels of the held-out loss, before the schedule's shift, as metrics are called by them."""
        return [f"{(n + 0.5) / self.args.eval_sigmas:.2f}" for n in range(self.args.eval_sigmas)]
