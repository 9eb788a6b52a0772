"""What GRPO, NFT and online DPO share: prompts in groups, a rollout and its scores, going on in the middle of one."""

import logging
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate.utils import gather_object
from datasets import Dataset
from peft import PeftConfig
from torch import Tensor
from transformers import TrainerCallback
from trl.trainer.utils import RepeatSampler, disable_dropout_in_model

from align.engine import reports
from align.engine.trainer import FlowTrainer, ModelSource
from align.maths.losses import LossResult
from align.online.buffers import Batching
from align.online.settings import OnlineConfig
from align.sampling.held_out import as_prompts, check_columns
from align.sampling.noise import ImageKey, first_of_start
from align.sampling.rollout import Rollout, Velocity, velocity_fn
from align.sampling.scored import requests_of, sample_and_score
from align.sampling.scorer import weights_of
from rewards import Reward

logger = logging.getLogger(__name__)

#: Something is wrong with a reward when this many rollouts in a row teach nothing.
ROLLOUTS_TO_WARN = 5


def check_online_data(
    rewards: list[Reward], args: OnlineConfig, train: Dataset, evaluation: Dataset | None, guards: dict[str, Dataset]
) -> None:
    """Raise ValueError when prompts, columns or sizes cannot work, before anything is loaded."""
    check_columns(rewards, [train])
    wanted = args.groups_per_rollout
    if len(train) < wanted:
        raise ValueError(
            f"a rollout takes {wanted} prompts (generation_batch_size {args.generation_batch_size} / num_generations "
            f"{args.num_generations}) and the data holds {len(train)}"
        )
    if not any(reward.weight for reward in rewards):
        raise ValueError("every reward has weight 0: nothing would be trained on")
    if guards and evaluation is None:
        raise ValueError("guard data sets are evaluated beside held-out prompts: give --eval_dataset_name too")


class EpochRepeatSampler(RepeatSampler):
    """TRL's RepeatSampler, whose order is a function of (seed, epoch), so that a resumed run goes on in order."""

    def set_epoch(self, epoch: int) -> None:
        self.generator.manual_seed((self.seed or 0) + epoch)


def _gathered(values: Tensor) -> Tensor:
    """Gather (images, rewards) of all processes, from this one's, in float64, which not every accelerator has."""
    return torch.tensor(gather_object(values.tolist()), dtype=torch.float64)


class Sampled(NamedTuple):
    """What :meth:`OnlineTrainer.sample` returns.

    rollout: of this process. rewards: (images of all processes, rewards) float64, NaN where there is none. weights: the same
    shape, each reward's share in the sum.
    """

    rollout: Rollout
    rewards: Tensor
    weights: Tensor


class OnlineTrainer(FlowTrainer):
    """A trainer on groups of its own samples: algorithms differ in what they keep of a rollout, and in the loss.

    Args:
        model: the policy, see :class:`align.models.contract.FlowModel`, its name, or a :class:`~align.models.families.Deferred` one.
        rewards: what ``rewards.load_rewards`` takes: names, mappings, or plain functions.
        args: see :class:`align.online.settings.OnlineConfig`.
        train_dataset: a ``prompt`` column and whatever columns the rewards ask for by name; or a list of such rows.
        eval_dataset: held-out prompts, the same; logged as ``eval_reward`` and ``eval_NAME``.
        guard_datasets: further held-out prompts, watched for damage; logged as ``eval_GUARD_NAME``.
        peft_config: train this adapter; without it the whole transformer (or the adapter already loaded).

    Raises:
        ValueError: rewards, columns and batch sizes that do not fit, before the model is loaded.
    """

    args: OnlineConfig
    #: What :meth:`collect` makes.
    buffer_type: type[Any]
    phases = ("rollout", "reward", "update")

    def __init__(
        self,
        model: ModelSource,
        rewards: list[Any],
        args: OnlineConfig,
        train_dataset: Dataset | list[dict[str, Any]],
        eval_dataset: Dataset | list[dict[str, Any]] | None = None,
        guard_datasets: dict[str, Any] | None = None,
        peft_config: PeftConfig | None = None,
        callbacks: list[TrainerCallback] | None = None,
    ) -> None:
        dropout = getattr(peft_config, "lora_dropout", 0)
        if dropout:
            raise ValueError(
                f"lora_dropout must be 0, found {dropout}: sampling and replay would see two different policies"
            )
        args.check_world(args.world_size)
        train_dataset = as_prompts(train_dataset, "train_dataset")
        if not rewards:
            raise ValueError("rewards is empty: a trainer needs at least one, as load_rewards(...) returns them")
        super().__init__(
            model,
            args,
            train_dataset,
            rewards=rewards,
            eval_prompts=eval_dataset,
            guard_datasets=guard_datasets,
            peft_config=peft_config,
            callbacks=callbacks,
        )
        dropped = max((m.p for m in self.flow.transformer.modules() if isinstance(m, torch.nn.Dropout)), default=0)
        if dropped:
            disable_dropout_in_model(self.flow.transformer)
            logger.warning(
                "the adapter's dropout of %s is left out: sampling and replay would see two policies", dropped
            )
        self.tell_of_prompts(train_dataset, "training prompts")
        self._buffer: Any = None
        self._micro_step: int | None = None  # micro-batches taken since the start of the run
        self._writer: Any = None  # of what save_rollouts keeps
        self._in_a_row: Counter[str] = Counter()

    def check_data(self, args: OnlineConfig, train_dataset: Dataset) -> None:
        check_online_data(self.rewards, args, train_dataset, self.eval_prompts, self.guard_datasets)

    # -- what an algorithm says ---------------------------------------------------------------------------------------

    def collect(self, rows: list[dict[str, Any]], rollout_index: int) -> Any:
        """Sample and score this process's ``rows``; return a buffer whose ``micro_batch(index)`` is trained on."""
        raise NotImplementedError

    def batching(self) -> Batching:
        """Return how a buffer is split on this process."""
        args = self.args
        return Batching(
            micro_batches=args.micro_batches_per_pass(args.world_size),
            per_update=args.gradient_accumulation_steps,
            process=(args.process_index, args.world_size),
            keep_in_step=self.in_step,
            saves=args.should_save,
        )

    # -- prompts: each rollout's rows are given again for every micro-batch that is taken from it --------------------

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> RepeatSampler:
        return EpochRepeatSampler(
            data_source=self.train_dataset,
            mini_repeat_count=self.args.num_generations,
            batch_size=self.args.groups_per_rollout,
            repeat_count=self.args.micro_batches_per_rollout(self.args.world_size),
            seed=self.args.order_seed(),
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
        """Return a micro-batch of the buffer; when it is used up, first a new rollout of the prompts in ``inputs``."""
        per_rollout = self.args.micro_batches_per_rollout(self.args.world_size)
        if self._micro_step is None:
            self._restore()
            assert self._micro_step is not None
        if self._micro_step % per_rollout == 0:
            self._buffer = self.collect(inputs, rollout_index=self._micro_step // per_rollout)
        assert self._buffer is not None
        batch = self._buffer.micro_batch(self._micro_step % per_rollout)
        self._micro_step += 1
        return batch

    # -- a rollout and its scores -----------------------------------------------------------------------------------

    def sample(self, rows: list[dict[str, Any]], rollout_index: int, num_prefixes: int | None = None) -> Sampled:
        """Draw this process's images, one for each of ``rows``, and gather the scores of all processes' images.

        ``num_prefixes``: how many initial noises a group has, where not each image its own.
        """
        args = self.args
        with self.metrics.timed("rollout"):
            samples = sample_and_score(
                self.flow,
                self.rewards,
                rows,
                self._image_keys(rollout_index, len(rows), num_prefixes),
                args.plan(rollout_index),
                transformer=self.model_wrapped,
                show_progress=self.is_world_process_zero() and not args.disable_tqdm,
                step=self.state.global_step,
            )
        with self.metrics.timed("reward"):  # what is not hidden behind the sampling
            table = samples.agreed_scores(args.max_failed_fraction)
        self.metrics.record(seconds_scoring=samples.scorer.seconds)
        self.metrics.record(**{f"rewards/{name}": values for name, values in samples.scorer.extras.items()})
        rewards = _gathered(torch.tensor(table, dtype=torch.float64).T)
        weights = _gathered(weights_of(self.rewards, rows))
        self.metrics.forward_equivalents += samples.rollout.forwards
        if args.save_rollouts:
            first = args.process_index * len(rows)
            own_rewards = rewards[first : first + len(rows)]
            self._rollout_writer().write(rollout_index, rows, samples.rollout.images, own_rewards)
        return Sampled(samples.rollout, rewards, weights)

    def _image_keys(self, rollout_index: int, images: int, num_prefixes: int | None) -> list[ImageKey]:
        """Return keys of this process's images by their place in the rollout, whatever the number of processes."""
        seed, group, first = self.args.seed, self.args.num_generations, self.args.process_index * images
        return [
            ImageKey(seed, rollout_index, i // group, i % group, first_of_start(i, group, num_prefixes) % group)
            for i in range(first, first + images)
        ]

    def _rollout_writer(self) -> Any:
        if self._writer is None:
            from align.sampling.ranked import RolloutWriter  # pyarrow: not for a run that keeps nothing

            args = self.args
            self._writer = RolloutWriter(
                Path(args.output_dir) / "rollouts",
                self.train_dataset,
                self.rewards,
                args.num_generations,
                args.groups_per_rollout,
                (args.process_index, args.world_size),
            )
        return self._writer

    def record_rewards(self, rewards: Tensor, total: Tensor, dead_groups: float) -> None:
        """Log (images, rewards) scores, (images,) weighted sums, and the share of groups that nothing is learned from."""
        groups = total.view(-1, self.args.num_generations)
        values = {"reward": total.nanmean(), "reward_std": _nanstd(groups).nanmean()}
        for column, reward in zip(rewards.unbind(1), self.rewards, strict=True):
            values[f"rewards/{reward.name}/mean"] = column.nanmean()
            values[f"rewards/{reward.name}/std"] = _nanstd(column[None])[0]
            values[f"rewards/{reward.name}/unscored"] = column.isnan().float().mean()
            cut = reward.truncated  # prompts longer than it reads, so far
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

    def image_buffer(self, rows: list[dict[str, Any]], informative: Tensor, rollout_index: int, **tensors: Any) -> Any:
        """Make a :class:`~align.online.buffers.RolloutBuffer` of this process's images.

        ``informative``: (images of all processes,) bool, which carry gradient.
        """
        requests = requests_of(rows)
        return self.buffer_type(
            requests=requests,
            conditions=self.flow.encode(requests),  # of the whole rollout, as when it was sampled
            informative=informative,
            first=self.args.process_index * len(rows),
            rollout_index=rollout_index,
            seed=self.args.seed,
            batching=self.batching(),
            **tensors,
        )

    # -- what losses share ------------------------------------------------------------------------------------------

    def policy_velocity(self, transformer: torch.nn.Module) -> Velocity:
        """Return the velocity function that sampling, replay and reference share; its size and guidance never change."""
        return velocity_fn(self.flow, self.args.plan(0), transformer)

    def no_loss(self) -> LossResult:
        """Return 0, with a gradient of 0 for everything that is trained."""
        return LossResult(torch.stack([0.0 * p.sum() for p in self.trained_parameters().values()]).sum())

    # -- the run ----------------------------------------------------------------------------------------------------

    def train(self, *args: Any, **kwargs: Any) -> Any:
        self._micro_step, self._buffer, self._writer = None, None, None
        self._in_a_row.clear()
        return super().train(*args, **kwargs)

    def save_progress(self, folder: Path) -> None:
        taken = self.state.global_step * self.args.gradient_accumulation_steps
        if self._buffer is not None and taken % self.args.micro_batches_per_rollout(self.args.world_size):
            self._buffer.save(folder)

    def _restore(self) -> None:
        """Set the counters, and read the rest of a rollout that a checkpoint was taken in the middle of."""
        self._micro_step = self.state.global_step * self.args.gradient_accumulation_steps
        counted = reports.series(self.state.log_history, "forward_equivalents")[1]
        if counted and self.is_world_process_zero():
            self.metrics.forward_equivalents = counted[-1]
        if self._micro_step % self.args.micro_batches_per_rollout(self.args.world_size):
            assert self.resumed_from is not None
            device = self.accelerator.device
            self._buffer = self.buffer_type.load(self.resumed_from, self.batching(), device, self.flow.encode)


def _nanstd(values: Tensor) -> Tensor:
    """Return the (P,) sample standard deviations of (P, G) values, over what is not NaN."""
    known = ~values.isnan()
    centred = (values - values.nanmean(1, keepdim=True)).masked_fill(~known, 0.0)
    return (centred.pow(2).sum(1) / (known.sum(1) - 1).clamp(min=1)).sqrt()
