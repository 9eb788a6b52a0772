"""DPO for flow-matching image models (Qwen-Image report, arXiv 2508.02324, section 4.1, eq. 3; Diffusion-DPO, 2311.12908).

    accelerate launch align/dpo.py --config configs/tiny/dpo.yaml

A pair of images of one prompt, the chosen and the rejected, is noised to one and the same level with the same noise. The
policy is trained to lower its error on the chosen image, against its error on the rejected one and against a reference
that does not move.

Deviations from the report:

- errors are means over latent dimensions, as in Diffusion-DPO's code, so that published values of beta (2000 to 5000 on
  large models) carry over; the report's norms are sums, whose beta is smaller by the number of dimensions;
- an SFT term on the chosen image can be added (``sft_weight``), against both errors rising together, as TRL's
  ``rpo_alpha`` does for text;
- noise levels are logit-normal and shifted, as in SFT; the report does not say how it draws them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from align.cli.data import PreferenceDataArguments
from align.cli.launch import run_on_images
from align.engine.matching import MatchingBatch, matching_errors
from align.engine.metrics import RunMetrics
from align.engine.settings import FlowConfig, setting
from align.engine.trainer import FlowTrainer
from align.maths.losses import DPOLoss, DPOLossType, dpo_loss
from align.offline.examples import Drawn, draw_batch
from align.offline.settings import MatchingConfig
from align.offline.trainer import MatchingTrainer
from align.sampling.held_out import standard_error
from preference_data.images import ImageSource
from preference_data.schemas import Pair

#: Accuracy is logged apart in so many equal parts of the noise levels 0..1.
SIGMA_BINS = 4


@dataclass
class DPOSettings(FlowConfig):
    """The objective of DPO, whatever the pairs come from."""

    beta: float = setting(
        2000.0,
        "How strongly the policy is held to the reference, on errors that are means over latent dimensions "
        "(Diffusion-DPO's 2000 to 5000); for errors that are sums divide by tokens x channels.",
    )
    loss_type: DPOLossType = setting("sigmoid", "sigmoid (DPO), hinge (SLiC) or ipo.")
    label_smoothing: float = setting(0.0, "Share of pairs believed to be labelled wrongly (cDPO), in [0, 0.5).")
    sft_weight: float = setting(0.0, "Weight of the flow-matching loss of the chosen image, added to the loss.")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_choices(loss_type=DPOLossType)
        self.check_positive("beta")
        self.check_least("sft_weight", 0)
        if not 0 <= self.label_smoothing < 0.5:
            raise ValueError(f"label_smoothing must lie in [0, 0.5), found {self.label_smoothing}")
        if self.label_smoothing and self.loss_type != "sigmoid":
            raise ValueError(f"label_smoothing belongs to loss_type sigmoid, found loss_type {self.loss_type}")

    def keeps_reference(self) -> bool:
        return True


@dataclass
class DPOConfig(DPOSettings, MatchingConfig):
    """Arguments of :class:`DPOTrainer`. ``per_device_train_batch_size`` counts pairs."""


def dpo_errors(trainer: FlowTrainer, batch: MatchingBatch, model: torch.nn.Module) -> tuple[Tensor, Tensor]:
    """(P, 2) errors of chosen and rejected image: the policy's, with gradient, and the reference's."""
    # A frozen copy was made before the launcher wrapped the model in its autocast: give it the same.
    with torch.no_grad(), trainer.accelerator.autocast(), trainer.flow.reference(model) as reference:
        errors_ref = matching_errors(trainer.flow, batch, reference)
    trainer.count_forwards(errors_ref.numel(), trained=False)
    return matching_errors(trainer.flow, batch, model), errors_ref


def compare(args: DPOSettings, errors: Tensor, errors_ref: Tensor) -> DPOLoss:
    """The preference loss of (P, 2) errors of chosen and rejected image, under the policy and under the reference."""
    chosen, rejected = errors.unbind(1)
    chosen_ref, rejected_ref = errors_ref.unbind(1)
    return dpo_loss(chosen, rejected, chosen_ref, rejected_ref, args.beta, args.loss_type, args.label_smoothing)


def dpo_objective(trainer: FlowTrainer, args: DPOSettings, batch: MatchingBatch, model: torch.nn.Module) -> Tensor:
    """(P,) report eq. 3, and ``sft_weight`` times eq. 2 of the chosen image, of every pair; logs what they are made of."""
    errors, errors_ref = dpo_errors(trainer, batch, model)
    trainer.count_forwards(errors.numel(), trained=True)
    result = compare(args, errors, errors_ref)
    record_pairs(trainer.metrics, result, errors.detach(), errors_ref, batch.sigma)
    return result.loss + args.sft_weight * errors[:, 0]


def record_pairs(metrics: RunMetrics, result: DPOLoss, errors: Tensor, errors_ref: Tensor, sigma: Tensor) -> None:
    """Log implicit rewards, their accuracy, by noise level too, and how well the chosen images are still fitted."""
    metrics.record(
        **{
            "rewards/chosen": result.chosen_reward.mean().item(),
            "rewards/rejected": result.rejected_reward.mean().item(),
            "rewards/margins": (result.chosen_reward - result.rejected_reward).mean().item(),
            "rewards/accuracies": result.accuracy.mean().item(),
            # Above 1 the policy fits even the chosen images worse than the reference did: damage.
            "chosen_error_to_reference": (errors[:, 0] / errors_ref[:, 0]).mean().item(),
        }
    )
    bins = (sigma * SIGMA_BINS).long().clamp(max=SIGMA_BINS - 1)
    # One value a pair: logs show the mean over pairs, however many of them a micro-batch or a process had.
    for part, accuracy in zip(bins.tolist(), result.accuracy.tolist(), strict=True):
        metrics.record(**{f"accuracy_sigma_{part / SIGMA_BINS:.2f}-{(part + 1) / SIGMA_BINS:.2f}": accuracy})


class DPOTrainer(MatchingTrainer):
    """Direct preference optimisation on pairs of images.

    Args:
        model: what is trained, see :class:`align.models.contract.FlowModel`, or the name of a Qwen-Image. Its present
            weights, an adapter already loaded included, are the reference.
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

    def images_of(self, record: Pair) -> tuple[str, list[ImageSource]]:
        return record.prompt, [record.chosen, record.rejected]

    def _prepare_inputs(self, inputs: Sequence[Drawn]) -> MatchingBatch:
        with self.metrics.timed("data"):
            return draw_batch(inputs, self.store, self.args, self.accelerator.device)

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: MatchingBatch,
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Tensor:
        """The mean of :func:`dpo_objective` over the batch's pairs."""
        return dpo_objective(self, self.args, inputs, model).mean()

    def held_out_errors(self, batch: MatchingBatch) -> Tensor:
        return torch.cat(dpo_errors(self, batch, self.model_wrapped), 1)

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
    run_on_images(PreferenceDataArguments, DPOConfig, DPOTrainer, argv)


if __name__ == "__main__":
    # Run by path this file is `__main__`; its classes must be known by their own module's name in what is saved.
    from align.dpo import main as run

    run()
