"""Settings of the algorithms that learn from images: SFT and DPO."""

import math
from dataclasses import dataclass

from align.engine.matching import NoiseLevels
from align.engine.settings import FlowConfig, setting


@dataclass
class OfflineConfig(NoiseLevels, FlowConfig):
    """Arguments that training on images shares: sizes, the cache."""

    resolution: int | None = setting(
        None,
        "Images are trained at about resolution x resolution pixels. Default: the side of height x width.",
        fixed_on_resume=True,
        above=0,
    )
    max_aspect_ratio: float = setting(
        2.0,
        "Longest to shortest side of the aspect-ratio buckets; 1: square alone.",
        fixed_on_resume=True,
        least=1,
        most=100,
    )
    cache_dir: str | None = setting(
        "~/.cache/flow-align", "Latents and prompt embeddings are kept here, by content. none: encode every time."
    )
    eval_sigmas: int = setting(
        5,
        "Noise levels at which the held-out loss is measured, the same in every run.",
        fixed_on_resume=True,
        least=1,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if str(self.cache_dir).lower() in ("none", "null", ""):
            self.cache_dir = None

    def bucket_resolution(self, cell: int) -> int:
        """Return ``resolution``, or the side of the square of height x width, in multiples of ``cell``."""
        return self.resolution or max(cell, round(math.sqrt(self.height * self.width) / cell) * cell)
