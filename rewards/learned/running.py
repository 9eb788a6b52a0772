"""What the learned rewards share: where a model runs, and how prompts and images become its inputs."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from rewards.hints import nearest

logger = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
#: Mean and standard deviation of red, green and blue, for the CLIPs of OpenAI and LAION and for BLIP.
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class Placement:
    """Where and how a model runs.

    device: None for this process's accelerator, chosen at the first call, or the CPU. dtype: one of :data:`DTYPES`.
    offload: keep the model in main memory, and move it to the device only while it scores. batch_size: images at a
    time.

    Raises:
        ValueError: naming the argument.
    """

    device: str | None = None
    dtype: str = "float32"
    offload: bool = False
    batch_size: int = 16

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ValueError(f"unknown dtype {self.dtype!r}." + nearest(str(self.dtype), DTYPES))
        if isinstance(self.batch_size, bool) or not isinstance(self.batch_size, int) or self.batch_size < 1:
            raise ValueError(f"batch_size must be a positive integer, found {self.batch_size!r}")
        if not isinstance(self.offload, bool):
            raise ValueError(f"offload must be true or false, found {self.offload!r}")
        if self.device is not None:
            try:
                torch.empty(0, device=self.device)
            except (RuntimeError, AssertionError, TypeError) as error:
                reason = str(error).split("\n")[0]
                raise ValueError(f"device {self.device!r} is not available here: {reason}") from error

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    def resolve(self) -> torch.device:
        """Return the device, which is the process's current accelerator if none was named."""
        if self.device is not None:
            return torch.device(self.device)
        return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")

    @contextmanager
    def running(self, *modules: nn.Module) -> Iterator[torch.device]:
        """Move modules to the device and disable gradients; afterwards offload them, if so configured."""
        device = self.resolve()
        for module in modules:
            module.to(device)
        try:
            with torch.inference_mode():
                yield device
        finally:
            if self.offload and device.type != "cpu":
                for module in modules:
                    module.to("cpu")
                if device.type == "cuda":
                    torch.cuda.empty_cache()  # the trainer needs the memory

    def batches(self, total: int) -> Iterator[slice]:
        """Yield slices of ``batch_size`` that cover ``total`` items."""
        for start in range(0, total, self.batch_size):
            yield slice(start, start + self.batch_size)


class Prompts:
    """A tokenizer that cuts prompts at a limit.

    truncated: how many prompts have been cut so far (equal ones within a call count once). They are scored by their
    beginning; the first one is logged as a warning.
    """

    def __init__(
        self, tokenizer: Any, *, reward: str, limit: int, pad: int, vocabulary: int, clean: Callable[[str], str] = str
    ) -> None:
        """Wrap a tokenizer of transformers.

        Args:
            limit: tokens of a prompt that the model reads. pad: the id of the padding up to it. vocabulary: rows of the
                model's token embedding. clean: applied to every prompt first.

        Raises:
            ValueError: the tokenizer has more tokens than the model.
        """
        if len(tokenizer) > vocabulary:
            raise ValueError(
                f"reward {reward!r}: the tokenizer {tokenizer.name_or_path} has {len(tokenizer)} tokens and the model "
                f"{vocabulary}: they do not belong together"
            )
        self._tokenizer, self._clean, self._pad = tokenizer, clean, pad
        self._reward, self.limit, self.truncated = reward, limit, 0

    def __call__(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Return ids and mask (1 for a token, 0 for padding), both (N, limit) and int64.

        Raises:
            TypeError: naming a prompt that is not text.
        """
        for row, prompt in enumerate(prompts):
            if not isinstance(prompt, str):
                raise TypeError(f"prompt {row} is {type(prompt).__name__}, not text")
        ids = self._tokenizer([self._clean(p) for p in prompts], padding=False, truncation=False, verbose=False)
        rows = ids["input_ids"]
        self._count_cut({prompt: len(row) for prompt, row in zip(prompts, rows, strict=True) if len(row) > self.limit})
        # The last token, which marks the end of the text, is kept.
        rows = [row if len(row) <= self.limit else row[: self.limit - 1] + row[-1:] for row in rows]
        filled = [row + [self._pad] * (self.limit - len(row)) for row in rows]
        masks = [[1] * len(row) + [0] * (self.limit - len(row)) for row in rows]
        return torch.tensor(filled, dtype=torch.int64), torch.tensor(masks, dtype=torch.int64)

    def _count_cut(self, cut: Mapping[str, int]) -> None:
        """Count prompts that were cut, given with their lengths, and log the first one."""
        if cut and not self.truncated:
            prompt, length = next(iter(cut.items()))
            logger.warning(
                "reward %r reads only %d tokens of a prompt; this one has %d and is cut (logged once, counted in "
                "`truncated`): %.80r",
                self._reward,
                self.limit,
                length,
                prompt,
            )
        self.truncated += len(cut)


def check_pairs(images: Sequence[Any], prompts: Sequence[Any]) -> None:
    """Raise ValueError unless there is one prompt for each image."""
    if len(images) != len(prompts):
        raise ValueError(f"{len(images)} images and {len(prompts)} prompts: every image needs one prompt")


def crop_long_ends(image: Image.Image, max_aspect: int = 8) -> Image.Image:
    """Crop the long side of an image to `max_aspect` times its short side, for models that use the centre square.

    Otherwise the ends would be enlarged with the rest and then thrown away: 1 x 8000 pixels would take gigabytes.
    """
    width, height = image.size
    keep = max_aspect * min(width, height)
    if max(width, height) <= keep:
        return image
    left, top = max(0, (width - keep) // 2), max(0, (height - keep) // 2)
    return image.crop((left, top, min(width, left + keep), min(height, top + keep)))


def to_tensor(image: Image.Image) -> Tensor:
    """Convert an RGB image to float32 (3, height, width) in [0, 1]."""
    flat = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return flat.view(image.height, image.width, 3).permute(2, 0, 1).float().div_(255)


def normalize(pixels: Tensor) -> Tensor:
    """Subtract CLIP's mean from pixels (3, height, width) in [0, 1], and divide by its standard deviation."""
    mean, std = torch.tensor(CLIP_MEAN)[:, None, None], torch.tensor(CLIP_STD)[:, None, None]
    return (pixels - mean) / std


class LinearStack(nn.Module):
    """Linear layers in sequence: the head of ImageReward and of LAION's predictor, neither of which has activations.

    Sizes are taken from a state dict with the keys ``layers.N.weight`` and ``layers.N.bias``, where N also counts the
    dropout layers, which have no effect here.
    """

    def __init__(self, state: Mapping[str, Tensor]) -> None:
        super().__init__()
        names = [key for key in state if re.fullmatch(r"layers\.\d+\.weight", key) and state[key].ndim == 2]
        names.sort(key=lambda key: int(key.split(".")[1]))
        self.layers = nn.ModuleDict({name.split(".")[1]: nn.Linear(*state[name].shape[::-1]) for name in names})

    def forward(self, features: Tensor) -> Tensor:
        for layer in self.layers.values():
            features = layer(features)
        return features
