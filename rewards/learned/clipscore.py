"""The reward `clipscore`: how well an image and its prompt agree in a CLIP."""

from pathlib import Path

from PIL import Image

from rewards.learned.clip import load_clip
from rewards.learned.running import Placement

CHECKPOINT = "openai/clip-vit-large-patch14"


class ClipScore:
    """100 x the cosine of the image's and the prompt's embedding, in [-100, 100]; about 15 to 35 for real images.

    This is the score of ``torchmetrics``, except that negative values are kept. (Hessel et al. 2021, equation 1, is
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
        """Load a CLIP in transformers' format.

        Args:
            checkpoint: folder or hub name. processor: folder or hub name of the tokenizer and the image processor, if
                they are not with the model. device, dtype, batch_size, offload: see :class:`Placement`.

        Raises:
            FileNotFoundError: a file is missing, with how to get it. ValueError: a checkpoint that is not a CLIP, or an
                argument out of range.
        """
        placement = Placement(device, dtype, offload, batch_size)
        self.clip = load_clip(checkpoint, processor, placement, reward="clipscore")

    @property
    def truncated(self) -> int:
        """How many prompts so far were longer than the model reads."""
        return self.clip.prompts.truncated if self.clip.prompts else 0

    def __call__(self, images: list[Image.Image], prompts: list[str]) -> list[float]:
        return [100 * cosine for cosine in self.clip.cosines(images, prompts)]
