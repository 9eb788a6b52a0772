"""The account of a data set: what is used and what is left out, and what becomes of the images and captions."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from preference_data.buckets import Bucket, cropped_share, enlargement
from preference_data.images import ImageSource
from preference_data.places import shortened

#: An image that loses more than this share of its area to cropping is counted.
MUCH_CROPPED = 0.2
#: Counts of :class:`preference_data.pairs.PairCounts` that are of pairs not trained on.
PAIRS_LEFT_OUT = ("ties", "below_margin", "below_confidence", "equal_images", "unscored")
_EXAMPLES = 3  # named of what is left out, for each reason

#: An image's width, height and :meth:`~preference_data.images.ImageSource.looked_at`.
Look = tuple[int, int, bytes]


def looks_of(images: Sequence[ImageSource]) -> list[Look]:
    """Return what an account needs of images, which need not be kept for it."""
    return [(*image.size(), image.looked_at()) for image in images]


@dataclass
class Account:
    """What of a data set is used, and what becomes of it; as text, a line for each thing that there is to say.

    what: name of the data. examples: what is trained on, an image or a pair. images: of the examples. left_out: files and
    rows by reason, with the first few of each in ``named``. captions: by where they stand. cut: texts that are longer
    than ``tokens_read`` tokens, the longest of them of ``longest``. pixels, cropped: of the images, at their own size.
    """

    what: str
    examples: int = 0
    images: int = 0
    left_out: Counter[str] = field(default_factory=Counter)
    named: dict[str, list[str]] = field(default_factory=dict)
    captions: Counter[str] = field(default_factory=Counter)
    cut: int = 0
    tokens_read: int = 0
    longest: int = 0
    buckets: Counter[Bucket] = field(default_factory=Counter)
    pixels: float = 0.0
    cropped: float = 0.0
    much_cropped: int = 0
    enlarged: int = 0
    largest_enlargement: float = 1.0
    duplicates: int = 0
    _seen: set[bytes] = field(default_factory=set, repr=False)

    def leave_out(self, reason: str, what: str = "", count: int = 1) -> None:
        """Count files or rows that are not used; ``what``: the first of them."""
        self.left_out[reason] += count
        named = self.named.setdefault(reason, [])
        if what and len(named) < _EXAMPLES:
            named.append(what)

    def leave_out_of(self, data: Any, used: Iterable[Path]) -> None:
        """Count the rows that were left out in reading, and the files beside a data set's that are none of it.

        Args:
            data: what a reader of this package returned, after a pass over it; of anything else nothing is known.
            used: the files of its images.
        """
        while not hasattr(data, "source") and (hasattr(data, "records") or hasattr(data, "pairs")):
            counts = getattr(data, "counts", None)
            for name in PAIRS_LEFT_OUT if counts is not None else ():
                if getattr(counts, name):
                    self.leave_out(f"pairs: {name.replace('_', ' ')}", count=getattr(counts, name))
            if getattr(data, "merged", 0):
                self.leave_out("pairs: votes joined to an earlier one", count=data.merged)
            data = data.records if hasattr(data, "records") else data.pairs
        if not hasattr(data, "source"):
            return
        if data.report.bad:
            self.leave_out("bad rows", data.report.skipped[0], data.report.bad)
        if data.report.unlabelled:
            self.leave_out("rows that nobody judged", count=data.report.unlabelled)
        source = getattr(data.source, "source", data.source)  # with columns under other names
        if hasattr(source, "left_out"):
            for reason, file in source.left_out(set(used)):
                self.leave_out(reason, file)

    def add(self, origin: str, images: Sequence[ImageSource], bucket: Bucket) -> None:
        """Count an example, all of whose images are trained at the size of ``bucket``; ``origin``: of its caption."""
        self.count(origin, looks_of(images), bucket)

    def count(self, origin: str, looks: Sequence[Look], bucket: Bucket) -> None:
        """Count an example as :meth:`add` does, whose images were looked at before."""
        self.examples += 1
        self.captions[origin or "a column"] += 1
        self.buckets[bucket] += 1
        for width, height, look in looks:
            share, larger = cropped_share(width, height, bucket), enlargement(width, height, bucket)
            self.images += 1
            self.pixels += width * height
            self.cropped += share * width * height
            self.much_cropped += share > MUCH_CROPPED
            self.enlarged += larger > 1
            self.largest_enlargement = max(self.largest_enlargement, larger)
            self.duplicates += look in self._seen
            self._seen.add(look)

    def count_tokens(self, length: int, read: int) -> None:
        """Count a text of ``length`` tokens, of which at most ``read`` are read."""
        self.tokens_read = read
        self.cut += length > read
        self.longest = max(self.longest, length)

    def lines(self) -> list[str]:
        """Return what there is to say."""
        pairs = self.images > self.examples
        of = f" ({self.images} images, {self.images - self.duplicates} different ones)" if pairs else ""
        said = [f"{self.what}: {self.examples}{of}"]
        if self.captions:
            said.append("captions from " + ", ".join(f"{origin}: {n}" for origin, n in self.captions.most_common()))
        if self.cut:
            said.append(
                f"{self.cut} texts are longer than the {self.tokens_read} tokens that are read, the longest {self.longest}: "
                "what comes after has no effect"
            )
        if self.buckets:
            sizes = ", ".join(f"{b.width}x{b.height}: {count}" for b, count in sorted(self.buckets.items()))
            said.append(f"trained at (width x height) {sizes}")
        if self.cropped:
            much = f"; {self.much_cropped} images lose more than {MUCH_CROPPED:.0%}" if self.much_cropped else ""
            said.append(f"{self.cropped / self.pixels:.1%} of the pixels are cropped away{much}")
        if self.enlarged:
            said.append(f"{self.enlarged} images are enlarged, the smallest {self.largest_enlargement:.1f} times")
        if self.duplicates and not pairs:  # an image may well be in several pairs
            said.append(f"{self.duplicates} images are the same as an earlier one")
        for reason, count in self.left_out.most_common():
            first = ", ".join(
                [
                    *(shortened(name, 240) for name in self.named[reason]),
                    *(["..."] if count > len(self.named[reason]) else []),
                ]
            )
            said.append(f"left out, {reason}: {count}" + (f" ({first})" if self.named[reason] else ""))
        return said

    def __str__(self) -> str:
        return "\n  ".join(self.lines())
