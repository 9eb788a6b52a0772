"""The reward `aesthetic`: LAION's improved-aesthetic-predictor, which rates an image without regard to its prompt."""

from pathlib import Path

from PIL import Image

from rewards.learned import weight_files
from rewards.learned.clip import load_clip
from rewards.learned.running import LinearStack, Placement

CLIP = "openai/clip-vit-large-patch14"
#: LAION's sac+logos+ava1-l14-linearMSE.pth, which the hub has only under this name.
HEAD = "trl-lib/ddpo-aesthetic-predictor:aesthetic-model.pth"


class Aesthetic:
    """The output of LAION's head for the unit embedding of CLIP ViT-L/14: about 1 to 10, for most images 4 to 7."""

    def __init__(
        self,
        head: str | Path = HEAD,
        checkpoint: str | Path = CLIP,
        device: str | None = None,
        dtype: str = "float32",
        batch_size: int = 16,
        offload: bool = False,
        allow_pickle: bool = False,
    ) -> None:
        """Load the CLIP and the head.

        Args:
            head: a ``.pth`` or ``.safetensors`` file, or ``owner/name:file`` on the hub. checkpoint: folder or hub name
                of the CLIP. allow_pickle: see :func:`rewards.learned.weight_files.read_state_dict`. device, dtype,
                batch_size, offload: see :class:`Placement`; the head always runs in float32.

        Raises:
            FileNotFoundError: a file is missing, with how to get it. ValueError: a file of another model, or an
                argument out of range.
        """
        placement = Placement(device, dtype, offload, batch_size)
        path = weight_files.find_file(head, reward="aesthetic", arg="head")
        state = weight_files.read_state_dict(path, reward="aesthetic", allow_pickle=allow_pickle)
        width = weight_files.shape_of(state, "layers.0.weight", reward="aesthetic", source=path)[-1]
        self.head = LinearStack(state).eval().requires_grad_(False)
        weight_files.load_weights(self.head, state, reward="aesthetic", source=path)
        self.clip = load_clip(checkpoint, None, placement, reward="aesthetic", text=False)
        clip_width = self.clip.model.config.projection_dim
        if clip_width != width:
            raise ValueError(
                f"reward 'aesthetic': {path} needs embeddings of width {width}, and {checkpoint} gives {clip_width}"
            )

    def __call__(self, images: list[Image.Image], prompts: list[str]) -> list[float]:
        if not images:
            return []
        with self.clip.placement.running(self.clip.model, self.head) as device:
            return self.head(self.clip.embed_images(images, device))[:, 0].tolist()
