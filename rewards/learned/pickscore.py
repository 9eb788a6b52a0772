"""The reward `pickscore` (Kirstain et al. 2023): a CLIP ViT-H/14 trained on which of two images people preferred."""

from pathlib import Path

from PIL import Image

from rewards.learned import weight_files
from rewards.learned.clip import load_clip
from rewards.learned.running import Placement

CHECKPOINT = "yuvalkirstain/PickScore_v1"
#: Its tokenizer and image processor, as in the authors' code.
PROCESSOR = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"


class PickScore:
    """exp(logit scale) x cosine / `divide_by`.

    Without the division it is the authors' score, about 16 to 26 with their checkpoint. Public reinforcement-learning
    code divides by 26 to get close to 1, and so does this; ``divide_by: 1`` gives the authors' score.
    """

    def __init__(
        self,
        checkpoint: str | Path = CHECKPOINT,
        processor: str | Path | None = None,
        divide_by: float = 26.0,
        device: str | None = None,
        dtype: str = "float32",
        batch_size: int = 16,
        offload: bool = False,
    ) -> None:
        """Load the CLIP.

        Args:
            checkpoint: folder or hub name. processor: folder or hub name of the tokenizer and the image processor; None
                takes those in the checkpoint's folder, or :data:`PROCESSOR`. device, dtype, batch_size, offload: see
                :class:`Placement`.

        Raises:
            FileNotFoundError: a file is missing, with how to get it. ValueError: a checkpoint that is not a CLIP, or an
                argument out of range.
        """
        if isinstance(divide_by, bool) or not isinstance(divide_by, (int, float)) or not divide_by > 0:
            raise ValueError(f"divide_by must be a positive number, found {divide_by!r}")
        placement = Placement(device, dtype, offload, batch_size)
        processor_files = {**weight_files.TOKENIZER_FILES, **weight_files.IMAGE_PROCESSOR_FILES}
        if processor is None and not weight_files.has_files(checkpoint, processor_files):
            processor = PROCESSOR
        self.clip = load_clip(checkpoint, processor, placement, reward="pickscore")
        self.scale = self.clip.model.logit_scale.float().exp().item() / divide_by

    @property
    def truncated(self) -> int:
        """How many prompts so far were longer than the model reads."""
        return self.clip.prompts.truncated if self.clip.prompts else 0

    def __call__(self, images: list[Image.Image], prompts: list[str]) -> list[float]:
        return [self.scale * cosine for cosine in self.clip.cosines(images, prompts)]
