"""What a model must offer to be trained here. Trainers and the rollout know nothing else of it."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from PIL import Image
from torch import Tensor, nn

from preference_data.cache import TensorCache


class FlowModel(Protocol):
    """A flow-matching image model: a denoiser that is trained, and frozen parts around it.

    ``Condition`` below is whatever :meth:`encode_prompts` returns for one prompt; callers only hand it back.
    Latents are normalised and packed, (B, tokens, channels), float32.
    """

    #: The denoiser, the only part that is trained.
    transformer: nn.Module
    #: Whether an adapter is attached (and is what is trained).
    adapter: bool
    #: Where the frozen parts do their work. The trainer sets it; the transformer is placed by its launcher.
    device: torch.device
    #: Where encoded prompts are kept on disk, if anywhere.
    prompt_cache: TensorCache | None

    def parts(self) -> dict[str, list[nn.Module]]:
        """The modules that do the computing, by what they are called in the log: ``transformer``, ``vae``, ..."""
        ...

    @property
    def cell(self) -> int:
        """Pixels along the side of one latent token: height and width are multiples of it."""
        ...

    def encode_prompts(self, prompts: list[str]) -> list[Any]:
        """One condition per prompt. Each distinct prompt is encoded once and remembered.

        Conditions of one call belong together: rows of them, batched in any way, give the same velocities.
        """
        ...

    def encode_images(self, images: list[Image.Image], height: int, width: int) -> Tensor:
        """(B, tokens, channels) clean latents of ``images``."""
        ...

    def decode_latents(self, latents: Tensor, height: int, width: int) -> list[Image.Image]:
        """The images of clean ``latents``."""
        ...

    def latent_shape(self, height: int, width: int) -> tuple[int, int]:
        """(tokens, channels) of one image. Raises ValueError when the resolution does not divide."""
        ...

    def sigmas(self, num_inference_steps: int, height: int, width: int) -> Tensor:
        """(steps + 1,) decreasing noise levels, from 1 to 0, as the model's own sampler uses at this resolution."""
        ...

    def shift_sigma(self, sigma: Tensor, height: int, width: int) -> Tensor:
        """Noise levels in (0, 1) drawn for training, shifted as the model's schedule is at this resolution."""
        ...

    def fingerprint(self, part: str) -> str:
        """Hex digest of all that ``part`` (``vae`` or ``text_encoder``) computes from: weights and settings."""
        ...

    def identity(self) -> dict[str, dict[str, Any]]:
        """What a checkpoint belongs to: ``model``, the transformer it started from, and ``trained``, what of it is."""
        ...

    def velocity(
        self,
        latents: Tensor,
        sigma: Tensor,
        conditions: list[Any],
        *,
        height: int,
        width: int,
        guidance_scale: float = 1.0,
        negative: Any | None = None,
        transformer: nn.Module | None = None,
    ) -> Tensor:
        """(B, tokens, channels) float32 velocity at noise level ``sigma`` (B,), guided when guidance_scale > 1.

        ``transformer`` is the launcher's wrapper of :attr:`transformer` (DDP, a DeepSpeed engine), or a reference.
        """
        ...

    def add_lora(self, config: Any) -> list[str]:
        """Freeze the base and attach a fresh adapter; returns the names of targets left out because they are dead."""
        ...

    def load_adapter(self, folder: str) -> None:
        """Go on training the adapter saved in ``folder``."""
        ...

    def unfreeze(self) -> list[str]:
        """Make the whole transformer trainable; returns the names of parameters that cannot receive a gradient."""
        ...

    def keep_reference(self) -> None:
        """Remember the present weights as the reference: free with an adapter, a frozen copy without one."""
        ...

    def share_reference(self, share: Callable[[nn.Module], nn.Module]) -> None:
        """Put what ``share`` makes of the reference's frozen copy in its place, if it is one."""
        ...

    def reference(self, transformer: nn.Module) -> AbstractContextManager[nn.Module]:
        """Within it, the module to give :meth:`velocity` for the reference's velocity."""
        ...

    def save(self, folder: str, state_dict: dict[str, Tensor]) -> None:
        """Write the adapter, or the whole transformer where none is attached, in the form that the family's stock loader
        reads; ``state_dict`` has its tensors by the transformer's names for them.
        """
        ...
