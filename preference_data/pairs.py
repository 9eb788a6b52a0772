"""Pairs of a chosen and a rejected image, made from preferences. Images are read only to tell whether two are equal."""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace

from preference_data.digests import data_digest
from preference_data.hints import nearest
from preference_data.images import ImageSource
from preference_data.schemas import BestWorst, Pair, Preference, Ranked, ReferenceWorst

#: Which pairs are made of a record with more than two images.
STRATEGIES = ("best_worst", "all_pairs")


@dataclass
class PairCounts:
    """Counts of the last pass over a :class:`PairList`.

    records: preferences read. pairs: pairs yielded. ties: pairs dropped because neither image is preferred.
    below_margin, below_confidence: pairs dropped for a minimum. equal_images: pairs dropped because both images are the
    same. unscored: records with fewer than two scored images. without_margin, without_confidence: pairs yielded despite
    a minimum because they have no value to compare with it.
    """

    records: int = 0
    pairs: int = 0
    ties: int = 0
    below_margin: int = 0
    below_confidence: int = 0
    equal_images: int = 0
    unscored: int = 0
    without_margin: int = 0
    without_confidence: int = 0

    def __str__(self) -> str:
        counts = [
            f"{count} {name.replace('_', ' ')}" for name, count in vars(self).items() if count and name != "pairs"
        ]
        return f"{self.pairs} pairs" + (f" ({', '.join(counts)})" if counts else "")


class PairList:
    """Pairs, made while they are iterated, as often as ``records`` can be iterated; ``counts`` is of the last pass."""

    def __init__(self, records: Iterable[Preference], strategy: str, min_margin: float, min_confidence: float) -> None:
        self.records = records
        self.strategy = strategy
        self.min_margin = min_margin
        self.min_confidence = min_confidence
        self.counts = PairCounts()

    def digest(self) -> str | None:
        """Return a digest of the content of what the pairs are made of."""
        return data_digest(self.records)

    def __iter__(self) -> Iterator[Pair]:
        counts = self.counts = PairCounts()
        for record in self.records:
            counts.records += 1
            for pair in _candidates(record, self.strategy, counts):
                if self._passes(pair, counts):
                    counts.pairs += 1
                    yield pair

    def _passes(self, pair: Pair, counts: PairCounts) -> bool:
        if pair.is_tie:
            counts.ties += 1
        elif pair.margin is not None and pair.margin < self.min_margin:
            counts.below_margin += 1
        elif pair.confidence is not None and pair.confidence < self.min_confidence:
            counts.below_confidence += 1
        elif pair.chosen.same_as(pair.rejected):
            counts.equal_images += 1
        else:
            counts.without_margin += bool(self.min_margin and pair.margin is None)
            counts.without_confidence += bool(self.min_confidence and pair.confidence is None)
            return True
        return False


def build_pairs(
    records: Iterable[Preference], strategy: str = "best_worst", *, min_margin: float = 0.0, min_confidence: float = 0.0
) -> PairList:
    """Make pairs from preferences.

    | record | "best_worst" | "all_pairs" |
    |---|---|---|
    | Ranked | best and worst scored image, the first of equal ones | every two images with different scores |
    | BestWorst | (best, worst) | also (best, other) and (other, worst) |
    | ReferenceWorst | (reference, worst) | also (other, worst) |
    | Pair | itself | itself |

    Equal scores, in a Ranked all of them, count as a tie and give no pair.

    Args:
        min_margin: drop pairs with a smaller margin. From 0 on this drops pairs whose scores contradict their label.
        min_confidence: drop pairs with a smaller confidence. Pairs without a margin or confidence are kept and counted.

    Raises:
        ValueError: an unknown strategy, or a minimum that is NaN or out of range.
        TypeError, while iterating: a record that is not a preference.
    """
    if strategy not in STRATEGIES:
        raise ValueError(f"unknown strategy {strategy!r}.{nearest(strategy, STRATEGIES)}")
    for name, value in (("min_margin", min_margin), ("min_confidence", min_confidence)):
        if value != value:
            raise ValueError(f"{name} must be a number, found {value}")
    if not 0 <= min_confidence <= 1:
        raise ValueError(f"min_confidence must lie in [0, 1], found {min_confidence}")
    return PairList(records, strategy, min_margin, min_confidence)


def _candidates(record: Preference, strategy: str, counts: PairCounts) -> Iterator[Pair]:
    if isinstance(record, Pair):
        yield record
    elif isinstance(record, Ranked):
        yield from _pairs_by_score(record, strategy, counts)
    elif isinstance(record, BestWorst):
        yield _pair(record, record.images, record.best, record.worst)
        if strategy == "all_pairs":
            others = [i for i in range(len(record.images)) if i not in (record.best, record.worst)]
            for other in others:
                yield _pair(record, record.images, record.best, other)
            for other in others:
                yield _pair(record, record.images, other, record.worst)
    elif isinstance(record, ReferenceWorst):
        worst = record.images[record.worst]
        yield Pair(record.prompt, record.reference, worst, where=f"{record.where}, reference over {record.worst}")
        if strategy == "all_pairs":
            for other in range(len(record.images)):
                if other != record.worst:
                    yield _pair(record, record.images, other, record.worst)
    else:
        raise TypeError(f"pairs are made from preferences, found {type(record).__name__}")


def _pair(
    record: Preference, images: Sequence[ImageSource], chosen: int, rejected: int, margin: float | None = None
) -> Pair:
    where = f"{record.where}, images {chosen} over {rejected}"
    return Pair(record.prompt, images[chosen], images[rejected], margin=margin, where=where)


def _pairs_by_score(record: Ranked, strategy: str, counts: PairCounts) -> Iterator[Pair]:
    scored = [(score, index) for index, score in enumerate(record.scores) if score is not None]
    if len(scored) < 2:
        counts.unscored += 1
        return
    if strategy == "best_worst":
        # `max` and `min` give the first of equal ones: if all are equal both are the same image, which counts as a tie.
        best, worst = max(scored, key=lambda s: s[0]), min(scored, key=lambda s: s[0])
        couples = [(best, worst)]
    else:
        couples = list(itertools.combinations(scored, 2))
    for (score, index), (other_score, other_index) in couples:
        if score == other_score:
            counts.ties += 1
        elif score > other_score:
            yield _pair(record, record.images, index, other_index, score - other_score)
        else:
            yield _pair(record, record.images, other_index, index, other_score - score)


@dataclass
class _Votes:
    """The votes on two images: for the first and the second one of the key, and the margins in favour of the first."""

    for_images: list[float] = field(default_factory=lambda: [0.0, 0.0])
    margin_sum: float = 0.0
    margin_weight: float = 0.0

    def add(self, pair: Pair, swapped: bool) -> None:
        """Count a pair's votes; ``swapped``: its chosen image is the key's second one."""
        share = 1.0 if pair.confidence is None else pair.confidence
        self.for_images[swapped] += share * pair.annotators
        self.for_images[not swapped] += (1 - share) * pair.annotators
        if pair.margin is not None:
            self.margin_sum += (-pair.margin if swapped else pair.margin) * pair.annotators
            self.margin_weight += pair.annotators

    def majority(self, pair: Pair, swapped: bool) -> Pair:
        """Return the pair with the outcome of all votes, chosen and rejected exchanged if most votes are against it."""
        for_pair, against = self.for_images[swapped], self.for_images[not swapped]
        total = for_pair + against
        margin = None
        if self.margin_weight:
            margin = (-self.margin_sum if swapped else self.margin_sum) / self.margin_weight
        chosen, rejected = pair.chosen, pair.rejected
        if against > for_pair:
            chosen, rejected = rejected, chosen
            margin = None if margin is None else -margin
        return replace(
            pair,
            chosen=chosen,
            rejected=rejected,
            margin=margin,
            confidence=max(for_pair, against) / total,
            annotators=round(total),
        )


class MergedVotes:
    """The result of :func:`merge_votes`; ``merged`` counts the pairs that the last pass joined to an earlier one."""

    def __init__(self, pairs: Iterable[Pair]) -> None:
        self.pairs = pairs
        self.merged = 0

    def digest(self) -> str | None:
        """Return a digest of the content of what the pairs are made of."""
        return data_digest(self.pairs)

    def __iter__(self) -> Iterator[Pair]:
        self.merged = 0
        votes: dict[_Key, _Votes] = {}
        keys: list[tuple[_Key, bool]] = []  # of each pair, so that the second round reads no image again
        for pair in self.pairs:
            key, swapped = _image_key(pair)
            votes.setdefault(key, _Votes()).add(pair, swapped)
            keys.append((key, swapped))
        for pair, (key, swapped) in zip(self.pairs, keys, strict=True):
            if key in votes:
                yield votes.pop(key).majority(pair, swapped)
            else:
                self.merged += 1


def merge_votes(pairs: Iterable[Pair]) -> MergedVotes:
    """Join the pairs of one prompt and the same two images, in either order, by majority.

    Each pair stands for ``annotators`` votes, of which the share ``confidence`` (all, where it is None) is for
    ``chosen``. The result takes the place of the first of them. Its ``confidence`` is the majority's share (0.5 is a
    tie), its margin the mean of those that have one. A pass iterates ``pairs`` twice and reads every image once; only
    digests are kept in between.

    Raises:
        TypeError: ``pairs`` can be iterated only once (a generator), or, while iterating, holds something else.
    """
    if iter(pairs) is pairs:
        raise TypeError("merge_votes iterates its pairs twice: pass a list or what a reader returned, not a generator")
    return MergedVotes(pairs)


#: A prompt and the digests of two images, the smaller one first.
_Key = tuple[str, str, str]


def _image_key(pair: Pair) -> tuple[_Key, bool]:
    """Return a key that does not depend on the order of the images, and whether the key has them swapped."""
    if not isinstance(pair, Pair):
        raise TypeError(f"only pairs have votes to merge, found {type(pair).__name__}")
    chosen, rejected = pair.chosen.digest(), pair.rejected.digest()
    if rejected < chosen:
        return (pair.prompt, rejected, chosen), True
    return (pair.prompt, chosen, rejected), False
