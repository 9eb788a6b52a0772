"""What a model must offer to be trained here. Trainers and the rollout know nothing else of it."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from PIL import Image
from torch import Tensor, nn

from align.parallel.memory import Counts
from preference_data.cache import TensorCache
from preference_data.images import ImageSource


@dataclass(frozen=True)
class Request:
    """What an image is generated from: a prompt, and the input images of an edit."""

    prompt: str
    images: tuple[ImageSource, ...] = ()


class NotFinite(FloatingPointError):
    """Weights, a loss or pixels are NaN or infinite: nothing that follows would mean anything."""


class FlowModel(Protocol):
    """A flow-matching image model: a denoiser that is trained, and frozen modules around it.

    ``Condition`` below is whatever :meth:`encode` returns for one request; callers only hand it back.
    Latents are normalised and packed, (B, tokens, channels), float32.
    """

    #: The denoiser, the only module that is trained.
    transformer: nn.Module
    #: Whether an adapter is attached (and is what is trained).
    adapter: bool
    #: Where the frozen modules do their work. The trainer sets it; the transformer is placed by its launcher.
    device: torch.device
    #: Where encoded requests are kept on disk, if anywhere. The trainer sets it.
    condition_cache: TensorCache | None

    def timed_modules(self) -> dict[str, list[nn.Module]]:
        """Return the modules whose time is logged, by their names in the log: ``transformer``, ``vae``, ..."""
        ...

    def parameter_counts(self) -> Counts:
        """Return the numbers of parameters that the memory sums are made from."""
        ...

    # -- frozen modules --------------------------------------------------------------------------------------------

    def encode(self, requests: Sequence[Request]) -> list[Any]:
        """Return one condition per request. Each distinct request is encoded once and remembered.

        Conditions of one call belong together: rows of them, batched in any way, give the same velocities.
        """
        ...

    def prompt_tokens(self, prompt: str) -> tuple[int, int]:
        """Return how many tokens a prompt has, those of its template behind it included, and how many are read."""
        ...

    def encode_images(self, images: list[Image.Image], height: int, width: int) -> Tensor:
        """Return the (B, tokens, channels) clean latents of ``images``."""
        ...

    def decode_latents(self, latents: Tensor, height: int, width: int) -> list[Image.Image]:
        """Return the images of clean ``latents``.

        Raises:
            NotFinite: some pixel is NaN or infinite, which would pass for black.
        """
        ...

    def fingerprint(self, module: str) -> str:
        """Return a hex digest of all that ``module`` (``vae`` or ``text_encoder``) computes from."""
        ...

    # -- geometry and schedule -------------------------------------------------------------------------------------

    @property
    def cell(self) -> int:
        """Pixels along the side of one latent token: height and width are multiples of it."""
        ...

    def latent_shape(self, height: int, width: int) -> tuple[int, int]:
        """Return (tokens, channels) of one image.

        Raises:
            ValueError: the resolution does not divide; it names the nearest sizes that do.
        """
        ...

    def sigmas(self, num_inference_steps: int, height: int, width: int) -> Tensor:
        """Return the (steps + 1,) noise levels, from 1 down to 0, of the model's own sampler at this resolution."""
        ...

    def shift_sigma(self, sigma: Tensor, height: int, width: int) -> Tensor:
        """Shift noise levels in (0, 1), drawn for training, as the model's schedule is at this resolution."""
        ...

    # -- velocity --------------------------------------------------------------------------------------------------

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
        """Return the (B, tokens, channels) float32 velocity at noise level ``sigma`` (B,).

        It is guided where ``guidance_scale`` is above 1. ``transformer`` is the launcher's wrapper of
        :attr:`transformer` (DDP, a DeepSpeed engine), or a reference.
        """
        ...

    # -- what is trained -------------------------------------------------------------------------------------------

    def add_lora(self, config: Any) -> list[str]:
        """Freeze the base and attach a fresh adapter; return the targets left out because no gradient reaches them."""
        ...

    def load_adapter(self, path: str | Path) -> None:
        """Load the adapter in a file, or in its folder, to train it further."""
        ...

    def unfreeze(self) -> list[str]:
        """Make the whole transformer trainable; return the parameters left out because no gradient reaches them."""
        ...

    def keep_reference(self) -> None:
        """Keep the present weights as the reference: free with an adapter, a frozen copy without one."""
        ...

    def share_reference(self, share: Callable[[nn.Module], nn.Module]) -> None:
        """Replace the reference's frozen copy, if there is one, by what ``share`` makes of it."""
        ...

    def reference(self, transformer: nn.Module) -> AbstractContextManager[nn.Module]:
        """Enter a context that gives the module whose velocity is the reference's."""
        ...

    def identity(self) -> dict[str, dict[str, Any]]:
        """Return what a checkpoint belongs to: ``model``, the transformer it started from, and ``trained``."""
        ...

    def save(self, folder: str | Path, state_dict: dict[str, Tensor]) -> None:
        """Write the adapter, or without one the whole transformer, as the family's stock loader reads it.

        ``state_dict`` holds the tensors under the transformer's names for them.
        """
        ...

    def loading_code(self, base_model: str, folder: str) -> str:
        """Return Python code that loads what :meth:`save` wrote to ``folder`` into stock diffusers."""
        ...
