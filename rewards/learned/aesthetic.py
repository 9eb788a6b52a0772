"""LAION's aesthetic predictor (improved-aesthetic-predictor): how much people would like a picture, prompt or not."""

from pathlib import Path

from PIL import Image

from rewards.learned import weight_files
from rewards.learned.clip import load_clip
from rewards.learned.running import LinearStack, Placement

CLIP = "openai/clip-vit-large-patch14"
#: LAION's sac+logos+ava1-l14-linearMSE.pth, which is not on the hub under its own name.
HEAD = "trl-lib/ddpo-aesthetic-predictor:aesthetic-model.pth"


class Aesthetic:
    """The unit embedding of CLIP ViT-L/14 through LAION's head: about 1 to 10, most pictures 4 to 7."""

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
        """See :class:`Aesthetic`.

        Args:
            head: a ``.pth`` or ``.safetensors`` file, or ``owner/name:file`` on the hub. checkpoint: folder or hub name
                of the CLIP under it. allow_pickle: see :func:`rewards.learned.weight_files.read_state_dict`. device, dtype,
                batch_size, offload: see :class:`Placement`; the head always runs in float32.

        Raises:
            FileNotFoundError: naming what to get. ValueError: files that are not these, or an arg out of range.
        """
        placement = Placement(device, dtype, offload, batch_size)
        path = weight_files.find_file(head, reward="aesthetic", arg="head")
        state = weight_files.read_state_dict(path, reward="aesthetic", allow_pickle=allow_pickle)
        width = weight_files.need(state, "layers.0.weight", reward="aesthetic", source=path)[-1]
        self.head = LinearStack(state).eval().requires_grad_(False)
        weight_files.load_weights(self.head, state, reward="aesthetic", source=path)
        self.clip = load_clip(checkpoint, None, placement, reward="aesthetic", text=False)
        found = self.clip.model.config.projection_dim
        if found != width:
            raise ValueError(
                f"reward 'aesthetic': {path} reads embeddings of {width}, and those of {checkpoint} are {found}"
            )

    def __call__(self, images: list[Image.Image], prompts: list[str]) -> list[float]:
        if not images:
            return []
        with self.clip.placement.running(self.clip.model, self.head) as device:
            return self.head(self.clip.embed_images(images, device))[:, 0].tolist()
