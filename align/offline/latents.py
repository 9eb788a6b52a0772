"""Training images as latents: each is encoded once, and kept on disk by its content.

A first pass over the data, before the first update, encodes what the cache lacks; from then on neither the images nor
the VAE nor the text encoder are needed. Without a cache every batch is encoded when its turn comes, to the same numbers.
"""

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from torch import Tensor
from tqdm.auto import tqdm

from align.models.contract import FlowModel
from preference_data.buckets import Bucket, cropped_share, fit, nearest_bucket
from preference_data.cache import TensorCache, cache_key
from preference_data.images import BadRow, ImageSource

logger = logging.getLogger(__name__)

#: Images that lose more than this share of their area to cropping are counted in the log.
MUCH_CROPPED = 0.2


@dataclass(frozen=True)
class Example:
    """A prompt and the images that belong to it, all trained at one size.

    ``keys`` are the cache keys of the images' latents; ``sources`` the images themselves, kept only without a cache.
    """

    prompt: str
    bucket: Bucket
    keys: tuple[str, ...]
    sources: tuple[ImageSource, ...] = ()


class LatentStore:
    """Latents of training images.

    Args:
        model: encodes them.
        cache_dir: folder of the cache; None keeps nothing on disk.
        buckets: the sizes to train at.
        on_bad_row: ``error`` or ``skip``: what to do when an image cannot be decoded.
    """

    def __init__(
        self, model: FlowModel, cache_dir: str | Path | None, buckets: Sequence[Bucket], on_bad_row: str = "error"
    ) -> None:
        self.model = model
        self.buckets = buckets
        self.on_bad_row = on_bad_row
        self.cache = TensorCache(cache_dir) if cache_dir else None
        self.skipped: list[str] = []
        model.prompt_cache = self.cache
        self._state = PartialState()

    def prepare(
        self, rows: Iterable[tuple[str, Sequence[ImageSource]]], what: str, extra_prompts: Sequence[str] = ()
    ) -> list[Example]:
        """Read every row once and encode what is not in the cache yet, each process its share.

        Args:
            rows: (prompt, its images); all images of a row go to the bucket of the first.
            what: name of the data, for the progress bar and messages.
            extra_prompts: further prompts that training will need.

        Raises:
            BadRow: an image that cannot be decoded, on every process alike; or nothing is left to train on.
        """
        examples: list[Example | None] = []
        bad: dict[int, tuple[str, str]] = {}
        cropped = 0
        bar = tqdm(rows, desc=f"encoding {what}", unit=" rows", disable=not self._state.is_main_process, leave=False)
        for number, (prompt, images) in enumerate(bar):
            example, mine = None, number % self._state.num_processes == self._state.process_index
            try:
                example = self._example(prompt, images)
                width, height = images[0].size()
                cropped += cropped_share(width, height, example.bucket) > MUCH_CROPPED
                if self.cache is not None and mine:
                    for key, image in zip(example.keys, images, strict=True):
                        if key not in self.cache:
                            self.cache.put(key, self._encode(image, example.bucket))
                elif mine:
                    for image in images:
                        image.open()  # to be known now as broken, not in the middle of a run
            except BadRow as error:
                bad[number] = (error.where, error.problem)
            examples.append(example)
        for part in gather_object([bad]):
            bad |= part
        self._report(bad, what, cropped, len(examples))
        kept = [e for number, e in enumerate(examples) if e is not None and number not in bad]
        if not kept:
            raise BadRow(what, "holds nothing to train on")
        self._encode_prompts([*(e.prompt for e in kept), *extra_prompts])
        self._state.wait_for_everyone()
        return kept

    def latents(self, example: Example) -> Tensor:
        """(images, tokens, channels) float32 clean latents of an example, on the CPU."""
        parts = []
        for number, key in enumerate(example.keys):
            found = self.cache.get(key) if self.cache is not None else None
            if found is None and not example.sources:
                raise FileNotFoundError(f"the cache {self._folder()} has lost an entry that this run made: {key}")
            parts.append(found if found is not None else self._encode(example.sources[number], example.bucket))
        return torch.cat(parts)

    def _folder(self) -> str:
        return str(self.cache.folder) if self.cache is not None else "(none)"

    def _example(self, prompt: str, images: Sequence[ImageSource]) -> Example:
        bucket = nearest_bucket(*images[0].size(), self.buckets)
        if self.cache is None:
            return Example(prompt, bucket, tuple("" for _ in images), tuple(images))
        made_of = {"kind": "latents", "model": self.model.fingerprint("vae"), "size": list(bucket)}
        return Example(prompt, bucket, tuple(cache_key(image=image.digest(), **made_of) for image in images))

    def _encode(self, image: ImageSource, bucket: Bucket) -> Tensor:
        # One at a time: in a batch the last bits of an image would depend on its neighbours.
        return self.model.encode_images([fit(image.open(), bucket)], bucket.height, bucket.width).cpu()

    def _encode_prompts(self, prompts: list[str]) -> None:
        if self.cache is None:
            return
        distinct = list(dict.fromkeys(prompts))
        mine = distinct[self._state.process_index :: self._state.num_processes]
        for prompt in tqdm(mine, desc="encoding prompts", disable=not self._state.is_main_process, leave=False):
            self.model.encode_prompts([prompt])

    def _report(self, bad: dict[int, tuple[str, str]], what: str, cropped: int, total: int) -> None:
        if bad and self.on_bad_row == "error":
            where, problem = bad[min(bad)]
            raise BadRow(where, f"{problem} ({len(bad)} rows of {total} are bad; on_bad_row: skip leaves them out)")
        self.skipped += [": ".join(bad[number]) for number in sorted(bad)]
        if bad and self._state.is_main_process:
            listed = "\n  ".join(self.skipped[-len(bad) :][:20])
            logger.warning("%s: %d of %d rows skipped:\n  %s", what, len(bad), total, listed)
        if cropped and self._state.is_main_process:
            logger.warning(
                "%s: %d of %d images lose more than %d %% of their area to the nearest bucket: raise max_aspect_ratio",
                *(what, cropped, total, round(MUCH_CROPPED * 100)),
            )
