"""CLIPScore: how near a picture and its prompt are in a CLIP."""

from pathlib import Path

from PIL import Image

from rewards.learned.clip import load_clip
from rewards.learned.running import Placement

CHECKPOINT = "openai/clip-vit-large-patch14"


class ClipScore:
    """100 x the cosine of the image's and the prompt's embedding, in [-100, 100]; about 15 to 35 for real pictures.

    As ``torchmetrics`` gives it, but that a negative one stays negative. (Hessel et al. 2021, equation 1, takes
    2.5 x max(cosine, 0).)
    """

    def __init__(
        self,
        checkpoint: str | Path = CHECKPOINT,
        processor: str | Path | None = None,
        device: str | None = None,
        dtype: str = "float32",
        batch_size: int = 16,
        offload: bool = False,
    ) -> None:
        """Any CLIP in transformers' format.

        Args:
            checkpoint: folder or hub name. processor: folder or hub name of the tokenizer and the image processor,
                where they are not with the model. device, dtype, batch_size, offload: see :class:`Placement`.

        Raises:
            FileNotFoundError: naming what to get. ValueError: a checkpoint that is no CLIP, or an arg out of range.
        """
        placement = Placement(device, dtype, offload, batch_size)
        self.clip = load_clip(checkpoint, processor, placement, reward="clipscore")

    @property
    def truncated(self) -> int:
        """Prompts that were longer than the model reads, so far."""
        return self.clip.prompts.truncated if self.clip.prompts else 0

    def __call__(self, images: list[Image.Image], prompts: list[str]) -> list[float]:
        return [100 * cosine for cosine in self.clip.cosines(images, prompts)]
