"""Training images as latents: each is encoded once and kept on disk, under a key of its content.

A first pass over the data, before the first update, encodes what the cache lacks; from then on neither the images nor
the VAE nor the text encoder are needed. Without a cache every batch is encoded when its turn comes, to the same numbers.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from torch import Tensor
from tqdm.auto import tqdm

from align.models.contract import FlowModel, Request
from preference_data.account import Account, Look, looks_of
from preference_data.buckets import Bucket, fit, nearest_bucket
from preference_data.cache import CacheUnusable, TensorCache, cache_key
from preference_data.images import BadRow, ImageSource
from preference_data.pictures import OPENED


@dataclass(frozen=True)
class Example:
    """A request and the images that belong to it, all trained at one size.

    ``keys`` are the cache keys of the images' latents; ``sources`` the images themselves, kept only without a cache.
    """

    request: Request
    bucket: Bucket
    keys: tuple[str, ...]
    sources: tuple[ImageSource, ...] = ()


class LatentStore:
    """Latents of training images.

    Args:
        model: encodes them.
        cache: where they are kept; None keeps nothing on disk.
        buckets: the sizes to train at.
        on_bad_row: ``error`` or ``skip``: what to do when an image cannot be decoded.
    """

    def __init__(
        self, model: FlowModel, cache: TensorCache | None, buckets: Sequence[Bucket], on_bad_row: str = "error"
    ) -> None:
        self.model = model
        self.buckets = buckets
        self.on_bad_row = on_bad_row
        self.cache = cache
        self.skipped: list[str] = []
        self._state = PartialState()

    def prepare(
        self, rows: Iterable[tuple[Request, Sequence[ImageSource], str]], what: str, extra: Sequence[Request] = ()
    ) -> tuple[list[Example], Account]:
        """Read every row once and encode what is not in the cache yet, each process its share.

        Args:
            rows: (request, the images it belongs to, where its text stands); all images of a row go to the bucket of the
                first.
            what: name of the data, for the progress bar and messages.
            extra: further requests that training will need.

        Returns:
            The examples, and the account of the data.

        Raises:
            BadRow: an image that cannot be decoded, on every process alike.
        """
        examples: list[Example | None] = []
        bad: dict[int, tuple[str, str]] = {}
        looked: dict[
            int, tuple[str, list[Look], Bucket]
        ] = {}  # what the account needs of a row, if no process finds it bad
        account = Account(what)
        bar = tqdm(rows, desc=f"encoding {what}", unit=" rows", disable=not self._state.is_main_process, leave=False)
        for number, (request, images, origin) in enumerate(bar):
            example, mine = None, number % self._state.num_processes == self._state.process_index
            try:
                width, height = images[0].size()
                example = self._example(request, images, nearest_bucket(width, height, self.buckets))
                if mine:
                    self._read(example, images)
                if self._state.is_main_process:  # it alone tells
                    looked[number] = origin, looks_of(images), example.bucket
            except BadRow as error:
                bad[number] = (error.where, error.problem)
            examples.append(example)
        for bad_of_process in gather_object([bad]):
            bad |= bad_of_process
        self._report(bad, account, len(examples))
        kept = [e for number, e in enumerate(examples) if e is not None and number not in bad]
        for number in sorted(looked.keys() - bad.keys()):
            account.count(*looked[number])
        account.examples = len(kept)
        if not kept:
            return kept, account
        for example in kept if self._state.is_main_process else ():
            account.count_tokens(*self.model.prompt_tokens(example.request.prompt))
        self._encode_requests([*(e.request for e in kept), *extra])
        self._state.wait_for_everyone()
        return kept, account

    def _read(self, example: Example, images: Sequence[ImageSource]) -> None:
        """Encode what the cache lacks of an example; without a cache decode its images, to know now which are broken."""
        if self.cache is None:
            for image in images:
                image.open()
            return
        for key, image in zip(example.keys, images, strict=True):
            if key not in self.cache:
                self.cache.put(key, self._encode(image, example.bucket))

    def latents(self, example: Example) -> Tensor:
        """Return the (images, tokens, channels) float32 clean latents of an example, on the CPU."""
        latents = []
        for number, key in enumerate(example.keys):
            if self.cache is None:
                latents.append(self._encode(example.sources[number], example.bucket))
                continue
            found, expected = self.cache.get(key), self.model.latent_shape(*example.bucket)
            if found is None:
                raise CacheUnusable(f"the cache {self.cache.folder} has lost an entry that this run made: {key}")
            if tuple(found.shape[1:]) != expected:
                shape = tuple(found.shape[1:])
                raise CacheUnusable(f"{self.cache.path(key)} holds latents of {shape}, not {expected}: remove it")
            latents.append(found)
        return torch.cat(latents)

    def _example(self, request: Request, images: Sequence[ImageSource], bucket: Bucket) -> Example:
        if self.cache is None:
            return Example(request, bucket, tuple("" for _ in images), tuple(images))
        made = {"model": self.model.fingerprint("vae"), "size": list(bucket), "opened": OPENED}
        shared: dict[str, Any] = {"kind": "latents", **made}
        return Example(request, bucket, tuple(cache_key(image=image.digest(), **shared) for image in images))

    def _encode(self, image: ImageSource, bucket: Bucket) -> Tensor:
        # One at a time: in a batch the last bits of an image would depend on its neighbours.
        return self.model.encode_images([fit(image.open(), bucket)], bucket.height, bucket.width).cpu()

    def _encode_requests(self, requests: list[Request]) -> None:
        if self.cache is None:
            return
        distinct = list(dict.fromkeys(requests))
        mine = distinct[self._state.process_index :: self._state.num_processes]
        for request in tqdm(mine, desc="encoding prompts", disable=not self._state.is_main_process, leave=False):
            self.model.encode([request])

    def _report(self, bad: dict[int, tuple[str, str]], account: Account, total: int) -> None:
        """Raise BadRow for the first bad row, or count them all as left out."""
        if bad and self.on_bad_row == "error":
            where, problem = bad[min(bad)]
            raise BadRow(where, f"{problem} ({len(bad)} rows of {total} are bad; on_bad_row: skip leaves them out)")
        self.skipped += [": ".join(bad[number]) for number in sorted(bad)]
        for number in sorted(bad):
            account.leave_out("it cannot be used", ": ".join(bad[number]))
