"""Supervised fine-tuning of flow-matching image models: a folder of images becomes a LoRA of its style.

    accelerate launch align/sft.py --config configs/tiny/sft_style.yaml

Every image is noised to one level, and the model learns the velocity that leads from it to the noise (Qwen-Image report,
arXiv 2508.02324, eq. 1 and 2). Noise levels are logit-normal, shifted with the resolution as in sampling (Esser et al.,
arXiv 2403.03206, section 3.1 and 5.3.2).

Deviations from common practice, each because it makes runs comparable or exact:

- latents are the mode of the VAE's posterior, not a sample of it: what is cached is what would be encoded anew;
- the held-out loss is taken at fixed noise and evenly spaced noise levels, not at freshly drawn ones.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from align.cli.images import CaptionedDataArguments
from align.cli.launch import run
from align.engine.matching import MatchingBatch, matching_errors
from align.engine.settings import setting
from align.maths.losses import LossResult
from align.models.contract import Request
from align.offline.examples import Drawn, draw_batch
from align.offline.settings import OfflineConfig
from align.offline.trainer import OfflineTrainer
from align.sampling.held_out import standard_error
from preference_data.images import ImageSource
from preference_data.schemas import CaptionedImage


@dataclass
class SFTConfig(OfflineConfig):
    """Arguments of :class:`SFTTrainer`. ``per_device_train_batch_size`` counts images."""

    caption_dropout: float = setting(
        0.1,
        "Share of captions replaced by negative_prompt, which keeps classifier-free guidance working.",
        fixed_on_resume=True,
        least=0,
        most=1,
    )


class SFTTrainer(OfflineTrainer):
    """Flow matching on captioned images.

    Args:
        model: what is trained, see :class:`align.models.contract.FlowModel`, its name, or a deferred one.
        args: see :class:`SFTConfig`.
        train_dataset: captioned images, as ``preference_data.readers.read_captioned`` gives them.
        eval_dataset: the same, held out; logged as ``eval_loss`` with its standard error, and by noise level.
        rewards, eval_prompts, guard_datasets: samples during training, see :class:`align.engine.trainer.FlowTrainer`.
        peft_config: train this adapter; without it the whole transformer (or the adapter already loaded).
        on_bad_row: ``error`` or ``skip``, for an image that cannot be decoded.

    Raises:
        BadRow: naming file, row and column of a caption or image that cannot be used.
    """

    args: SFTConfig
    algorithm = "SFT"

    def images_of(self, record: CaptionedImage) -> tuple[Request, list[ImageSource]]:
        return Request(record.prompt), [record.image]

    def _prepare_inputs(self, inputs: Sequence[Drawn]) -> MatchingBatch:
        with self.metrics.timed("data"):
            return draw_batch(inputs, self.store, self.args, self.accelerator.device, drop=self.args.caption_dropout)

    def loss(self, model: torch.nn.Module, batch: MatchingBatch) -> LossResult:
        """Return report eq. 2: mean || v_theta(x_sigma, sigma, prompt) - (noise - latents) ||^2."""
        errors = matching_errors(self.flow, batch, model)
        self.count_forwards(len(errors), trained=True)
        return LossResult(errors.mean())

    def held_out_errors(self, batch: MatchingBatch) -> Tensor:
        return matching_errors(self.flow, batch, self.model_wrapped)

    def held_out_summary(self, values: Tensor, prefix: str) -> dict[str, float]:
        losses = values[:, :, 0]
        by_level = zip(self.level_names(), losses.mean(0).tolist(), strict=True)
        per_example = losses.mean(1)
        metrics = {f"{prefix}_loss": per_example.mean().item(), f"{prefix}_loss_se": standard_error(per_example)}
        return metrics | {f"{prefix}_loss_at_{level}": value for level, value in by_level}


def main(argv: list[str] | None = None) -> None:
    """Train from a config."""
    run(CaptionedDataArguments, SFTConfig, SFTTrainer, argv)


if __name__ == "__main__":
    # Run by path this file is `__main__`; its classes must be known by their own module's name in what is saved.
    from align.sft import main as by_name

    by_name()
