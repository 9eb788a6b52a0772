"""Win and lose pairs out of preferences. Pure: nothing is read but what tells two images apart."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches

from preference_data.images import ImageSource
from preference_data.schemas import BestWorst, Pair, Preference, Ranked, ReferenceWorst

#: Which pairs are made of a record with more than two images.
STRATEGIES = ("best_worst", "all_pairs")


@dataclass
class PairCounts:
    """What the last pass over a :class:`PairList` made.

    records: taken. pairs: yielded. ties: dropped, neither image preferred. below_margin, below_confidence: dropped.
    equal_images: dropped, both images the same. unscored: records of which fewer than two images have a score.
    without_margin, without_confidence: yielded although a minimum was asked for, as they have none to compare.
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
    """Pairs, made as they are asked for; as often as ``records`` can be iterated. ``counts`` tells of the last pass."""

    def __init__(self, records: Iterable[Preference], strategy: str, min_margin: float, min_confidence: float) -> None:
        self.records = records
        self.strategy = strategy
        self.min_margin = min_margin
        self.min_confidence = min_confidence
        self.counts = PairCounts()

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
    """Pairs of preferences.

    A Ranked gives its best and its worst scored image (the first of equal ones; all equal: a tie), or with "all_pairs"
    every two of different scores, the higher one chosen. A BestWorst gives (best, worst), and with "all_pairs" also
    (best, other) and (other, worst); a ReferenceWorst (reference, worst), and also (other, worst). A Pair is passed on.

    Args:
        min_margin: drops pairs of a smaller margin, and so, from 0 on, those whose scores contradict their label.
        min_confidence: drops pairs of a smaller confidence. Pairs that have no margin or confidence are kept, and
            counted as such.

    Raises:
        ValueError: an unknown strategy, or a minimum that is no number. TypeError, on iteration: no preference.
    """
    if strategy not in STRATEGIES:
        close = get_close_matches(strategy, STRATEGIES, n=1, cutoff=0.4)
        hint = f" Did you mean {close[0]!r}?" if close else f" There are: {', '.join(STRATEGIES)}"
        raise ValueError(f"unknown strategy {strategy!r}.{hint}")
    for name, value in (("min_margin", min_margin), ("min_confidence", min_confidence)):
        if value != value:
            raise ValueError(f"{name} is no number")
    if not 0 <= min_confidence <= 1:
        raise ValueError(f"min_confidence {min_confidence} is out of range: 0 to 1")
    return PairList(records, strategy, min_margin, min_confidence)


def _candidates(record: Preference, strategy: str, counts: PairCounts) -> Iterator[Pair]:
    if isinstance(record, Pair):
        yield record
    elif isinstance(record, Ranked):
        yield from _of_scores(record, strategy, counts)
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
        raise TypeError(f"no preference to make pairs of: {type(record).__name__}")


def _pair(
    record: Preference, images: Sequence[ImageSource], chosen: int, rejected: int, margin: float | None = None
) -> Pair:
    where = f"{record.where}, images {chosen} over {rejected}"
    return Pair(record.prompt, images[chosen], images[rejected], margin=margin, where=where)


def _of_scores(record: Ranked, strategy: str, counts: PairCounts) -> Iterator[Pair]:
    scored = [(score, index) for index, score in enumerate(record.scores) if score is not None]
    if len(scored) < 2:
        counts.unscored += 1
        return
    if strategy == "best_worst":
        # `max` and `min` give the first of equal ones. With all equal they are the same image, and no pair.
        best, worst = max(scored, key=lambda s: s[0]), min(scored, key=lambda s: s[0])
        couples = [(best, worst)]
    else:
        couples = [(a, b) for i, a in enumerate(scored) for b in scored[i + 1 :]]
    for a, b in couples:
        if a[0] == b[0]:
            counts.ties += 1
            continue
        (high, chosen), (low, rejected) = (a, b) if a[0] > b[0] else (b, a)
        yield _pair(record, record.images, chosen, rejected, high - low)


class MergedVotes:
    """What :func:`merge_votes` returns; ``merged`` counts the rows that were joined to another in the last pass."""

    def __init__(self, pairs: Iterable[Pair]) -> None:
        self.pairs = pairs
        self.merged = 0

    def __iter__(self) -> Iterator[Pair]:
        self.merged = 0
        votes: dict[tuple[str, str, str], list[float]] = {}  # of the first image, of the second; margins, their number
        for pair in self.pairs:
            key, turned = _same_images(pair)
            sums = votes.setdefault(key, [0.0, 0.0, 0.0, 0.0])
            share = 1.0 if pair.confidence is None else pair.confidence
            sums[turned] += share * pair.annotators
            sums[not turned] += (1 - share) * pair.annotators
            if pair.margin is not None:
                sums[2] += (-pair.margin if turned else pair.margin) * pair.annotators
                sums[3] += pair.annotators
        for pair in self.pairs:
            key, turned = _same_images(pair)
            if key not in votes:
                self.merged += 1
            else:
                yield _majority(pair, votes.pop(key), turned)


def merge_votes(pairs: Iterable[Pair]) -> MergedVotes:
    """Join the pairs of one prompt and the same two images, in either order, by majority.

    Each stands for ``annotators`` votes, of which the share ``confidence`` (all, where it is None) is for ``chosen``.
    The result stands where the first of them stood, with the majority's share as ``confidence`` (0.5 is a tie) and the
    mean margin of those that have one. All rows are needed, so each pass reads ``pairs`` twice, every image included;
    only digests are kept in between.

    Raises:
        TypeError: ``pairs`` can be iterated only once (a generator), or, on iteration, holds other records.
    """
    if iter(pairs) is pairs:
        raise TypeError("merge_votes reads its pairs twice: give a list or what a reader returned, no generator")
    return MergedVotes(pairs)


def _same_images(pair: Pair) -> tuple[tuple[str, str, str], bool]:
    """A key for the prompt and the two images in any order, and whether they stand in the other order than in the key."""
    if not isinstance(pair, Pair):
        raise TypeError(f"only pairs have votes to merge, found {type(pair).__name__}")
    chosen, rejected = pair.chosen.digest(), pair.rejected.digest()
    turned = rejected < chosen
    return (pair.prompt, rejected, chosen) if turned else (pair.prompt, chosen, rejected), turned


def _majority(pair: Pair, sums: list[float], turned: bool) -> Pair:
    own, other = sums[turned], sums[not turned]
    total = own + other
    margin = None if not sums[3] else (-sums[2] if turned else sums[2]) / sums[3]
    merged = replace(pair, margin=margin, confidence=max(own, other) / total, annotators=round(total))
    if other > own:
        margin = None if margin is None else -margin
        merged = replace(merged, chosen=pair.rejected, rejected=pair.chosen, margin=margin)
    return merged
