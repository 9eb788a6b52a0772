"""DPO for flow-matching image models (Qwen-Image report, arXiv 2508.02324, section 4.1, eq. 3; Diffusion-DPO, 2311.12908).

    accelerate launch align/dpo.py --config configs/tiny/dpo.yaml

A pair of images of one prompt, the chosen and the rejected, is noised to one and the same level with the same noise. The
policy is trained to lower its error on the chosen image, against its error on the rejected one and against a reference
that does not move.

Deviations from the report:

- errors are means over latent dimensions, as in Diffusion-DPO's code, so that published values of beta (2000 to 5000 on
  large models) carry over; the report's norms are sums, whose beta is smaller by the number of dimensions;
- an SFT term on the chosen image can be added (``sft_weight``), against both errors rising together, as TRL's
  loss type ``sft`` does for text;
- noise levels are logit-normal and shifted, as in SFT; the report does not say how it draws them.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from align.cli.images import PreferenceDataArguments
from align.cli.launch import run
from align.engine.matching import MatchingBatch, matching_errors
from align.engine.settings import setting
from align.maths.losses import DPOLoss, DPOLossType, LossResult, dpo_loss
from align.models.contract import FlowModel, Request
from align.offline.examples import Drawn, draw_batch
from align.offline.settings import OfflineConfig
from align.offline.trainer import OfflineTrainer
from align.sampling.held_out import standard_error
from preference_data.images import ImageSource
from preference_data.schemas import Pair

#: Accuracy is logged apart in so many equal parts of the noise levels 0..1.
SIGMA_BINS = 4


@dataclass
class DPOSettings:
    """The objective of DPO, whatever the pairs come from."""

    beta: float = setting(
        2000.0,
        "How strongly the policy is held to the reference, on errors that are means over latent dimensions "
        "(Diffusion-DPO's 2000 to 5000 mean the same here); for errors that are sums divide by tokens x channels.",
        above=0,
    )
    loss_type: DPOLossType = setting("sigmoid", "sigmoid (DPO), hinge (SLiC) or ipo.")
    label_smoothing: float = setting(0.0, "Share of pairs believed to be labelled wrongly (cDPO).", least=0, below=0.5)
    sft_weight: float = setting(
        0.0, "Weight of the flow-matching loss of the chosen image, added to the loss.", least=0
    )

    def check_objective(self) -> None:
        """Raise ValueError for a label smoothing that means nothing."""
        if self.label_smoothing and self.loss_type != "sigmoid":
            raise ValueError(f"label_smoothing belongs to loss_type sigmoid, found loss_type {self.loss_type}")


@dataclass
class DPOConfig(DPOSettings, OfflineConfig):
    """Arguments of :class:`DPOTrainer`. ``per_device_train_batch_size`` counts pairs."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_objective()

    def keeps_reference(self) -> bool:
        return True


def dpo_errors(
    model: FlowModel, batch: MatchingBatch, policy: torch.nn.Module, autocast: Callable[[], AbstractContextManager[Any]]
) -> tuple[Tensor, Tensor]:
    """Return two (P, 2) tensors of errors, chosen and rejected: the policy's, with gradient, and the reference's.

    ``policy``: the launcher's wrapper of the transformer. ``autocast``: the launcher's context for half precision.
    """
    # A frozen copy was made before the launcher wrapped the model in its autocast: give it the same.
    with torch.no_grad(), autocast(), model.reference(policy) as reference:
        errors_ref = matching_errors(model, batch, reference)
    return matching_errors(model, batch, policy), errors_ref


def compare(settings: DPOSettings, errors: Tensor, errors_ref: Tensor) -> DPOLoss:
    """Return the preference loss of (P, 2) errors of chosen and rejected image, under policy and reference."""
    chosen, rejected = errors.unbind(1)
    chosen_ref, rejected_ref = errors_ref.unbind(1)
    return dpo_loss(
        chosen, rejected, chosen_ref, rejected_ref, settings.beta, settings.loss_type, settings.label_smoothing
    )


def dpo_objective(
    errors: Tensor, errors_ref: Tensor, sigma: Tensor, settings: DPOSettings, count: int | None = None
) -> LossResult:
    """Return the mean over pairs of report eq. 3, plus ``sft_weight`` times eq. 2 of the chosen image.

    Args:
        errors, errors_ref: (P, 2) of chosen and rejected image, the policy's with gradient and the reference's.
        sigma: (P,) noise level of each pair, for the log.
        count: pairs there would be, by which the sum is divided; P by default.

    The metrics are the implicit rewards, their accuracy, by noise level too, and how well the chosen images are still
    fitted.
    """
    result = compare(settings, errors, errors_ref)
    loss = result.loss + settings.sft_weight * errors[:, 0]
    metrics: dict[str, float | list[float]] = {
        "rewards/chosen": result.chosen_reward.mean().item(),
        "rewards/rejected": result.rejected_reward.mean().item(),
        "rewards/margins": (result.chosen_reward - result.rejected_reward).mean().item(),
        "rewards/accuracies": result.accuracy.mean().item(),
        # Above 1 the policy fits even the chosen images worse than the reference did: damage.
        "chosen_error_to_reference": (errors[:, 0].detach() / errors_ref[:, 0]).mean().item(),
    }
    bins = (sigma * SIGMA_BINS).long().clamp(max=SIGMA_BINS - 1)
    # A value for each pair: logs show the mean over pairs, however many of them a micro-batch or a process had.
    for number in bins.unique().tolist():
        name = f"accuracy_sigma_{number / SIGMA_BINS:.2f}-{(number + 1) / SIGMA_BINS:.2f}"
        metrics[name] = result.accuracy[bins == number].tolist()
    return LossResult(loss.mean() if count is None else loss.sum() / count, metrics)


class DPOTrainer(OfflineTrainer):
    """Direct preference optimisation on pairs of images.

    Args:
        model: what is trained, see :class:`align.models.contract.FlowModel`, its name, or a deferred one. Its
            present weights, an adapter already loaded included, are the reference.
        args: see :class:`DPOConfig`.
        train_dataset: pairs, as ``preference_data.pairs.build_pairs`` gives them.
        eval_dataset: the same, held out; logged as ``eval_loss`` and ``eval_accuracy``.
        rewards, eval_prompts, guard_datasets: samples during training, see :class:`align.engine.trainer.FlowTrainer`.
        peft_config: train this adapter; without it the whole transformer (or the adapter already loaded).
        on_bad_row: ``error`` or ``skip``, for an image that cannot be decoded.

    Raises:
        BadRow: naming file, row and column of a prompt or image that cannot be used.
    """

    args: DPOConfig
    algorithm = "DPO"

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.flow.keep_reference()

    def images_of(self, record: Pair) -> tuple[Request, list[ImageSource]]:
        return Request(record.prompt), [record.chosen, record.rejected]

    def _prepare_inputs(self, inputs: Sequence[Drawn]) -> MatchingBatch:
        with self.metrics.timed("data"):
            return draw_batch(inputs, self.store, self.args, self.accelerator.device)

    def loss(self, model: torch.nn.Module, batch: MatchingBatch) -> LossResult:
        """Return :func:`dpo_objective` of the batch's pairs."""
        errors, errors_ref = dpo_errors(self.flow, batch, model, self.accelerator.autocast)
        self.count_forwards(errors_ref.numel(), trained=False)
        self.count_forwards(errors.numel(), trained=True)
        return dpo_objective(errors, errors_ref, batch.sigma, self.args)

    def held_out_errors(self, batch: MatchingBatch) -> Tensor:
        errors, errors_ref = dpo_errors(self.flow, batch, self.model_wrapped, self.accelerator.autocast)
        self.count_forwards(errors_ref.numel(), trained=False)
        return torch.cat([errors, errors_ref], 1)

    def held_out_summary(self, values: Tensor, prefix: str) -> dict[str, float]:
        pairs, levels, _ = values.shape
        flat = values.flatten(0, 1)
        result = compare(self.args, flat[:, :2], flat[:, 2:])
        loss, accuracy = result.loss.view(pairs, levels), result.accuracy.view(pairs, levels)
        margin = (result.chosen_reward - result.rejected_reward).view(pairs, levels)
        metrics = {
            f"{prefix}_num_pairs": float(pairs),
            f"{prefix}_loss": loss.mean().item(),
            f"{prefix}_loss_se": standard_error(loss.mean(1)),
            # Of single draws, as in training; and of pairs, each judged by its mean over the noise levels.
            f"{prefix}_accuracy": accuracy.mean().item(),
            f"{prefix}_accuracy_se": standard_error(accuracy.mean(1)),
            f"{prefix}_pair_accuracy": ((torch.sign(margin.mean(1)) + 1) / 2).mean().item(),
            f"{prefix}_margin": margin.mean().item(),
            f"{prefix}_chosen_error_to_reference": (flat[:, 0] / flat[:, 2]).mean().item(),
        }
        by_level = zip(self.level_names(), accuracy.mean(0).tolist(), strict=True)
        return metrics | {f"{prefix}_accuracy_at_{level}": value for level, value in by_level}


def main(argv: list[str] | None = None) -> None:
    """Train from a config."""
    run(PreferenceDataArguments, DPOConfig, DPOTrainer, argv)


if __name__ == "__main__":
    # Run by path this file is `__main__`; its classes must be known by their own module's name in what is saved.
    from align.dpo import main as by_name

    by_name()
