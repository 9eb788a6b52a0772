"""Pairs out of preferences: which are made, which are dropped and how they are counted, and how votes are merged."""

import random

import pytest
from preference_files import encoded

from preference_data.images import ImageSource
from preference_data.pairs import STRATEGIES, build_pairs, merge_votes
from preference_data.schemas import BestWorst, CaptionedImage, Pair, Ranked, ReferenceWorst

IMAGES = [ImageSource(str(number), data=encoded(number)) for number in range(12)]


def made(records, strategy="best_worst", **options) -> list:
    return [(int(p.chosen.where), int(p.rejected.where), p.margin) for p in build_pairs(records, strategy, **options)]


def ranked(*scores) -> Ranked:
    return Ranked("p", IMAGES[: len(scores)], scores)


def pair(chosen=0, rejected=1, prompt="p", **others) -> Pair:
    return Pair(prompt, IMAGES[chosen], IMAGES[rejected], **others)


# --- Which pairs ---


def test_the_best_against_the_worst():
    assert made([ranked(1, 3, 0.5, 3)]) == [(1, 2, 2.5)]
    assert made([ranked(2, None, 5)]) == [(2, 0, 3)]
    assert made([ranked(5, 1, 1)]) == [(0, 1, 4)]  # the first of equal ones, both times


def test_ties_and_unscored_lists_are_dropped_and_counted():
    pairs = build_pairs([ranked(1, 1, 1), ranked(1, None), ranked(None, None), ranked(3), ranked(1, 2)])
    assert len(list(pairs)) == 1
    assert (pairs.counts.records, pairs.counts.ties, pairs.counts.unscored, pairs.counts.pairs) == (5, 1, 3, 1)


@pytest.mark.parametrize("seed", range(20))
def test_all_pairs_are_exactly_those_of_different_scores_the_higher_chosen(seed):
    random_ = random.Random(seed)
    scores = [random_.choice([None, -1.5, 0, 0.25, 2, random_.random()]) for _ in range(random_.randint(2, 12))]
    pairs = build_pairs([ranked(*scores)], "all_pairs")
    found = [(int(p.chosen.where), int(p.rejected.where)) for p in pairs]
    known = [index for index, score in enumerate(scores) if score is not None]
    expected = {(i, j) for i in known for j in known if scores[i] > scores[j]}
    assert len(found) == len(set(found)) and set(found) == expected
    assert all(p.margin == scores[int(p.chosen.where)] - scores[int(p.rejected.where)] > 0 for p in pairs)
    ties = sum(scores[i] == scores[j] for n, i in enumerate(known) for j in known[n + 1 :])
    assert pairs.counts.ties == ties and pairs.counts.unscored == (len(known) < 2)


def test_best_and_worst_marked():
    record = BestWorst("p", IMAGES[:4], best=2, worst=1)
    assert made([record]) == [(2, 1, None)]
    assert made([record], "all_pairs") == [(2, 1, None), (2, 0, None), (2, 3, None), (0, 1, None), (3, 1, None)]


def test_a_reference_against_the_worst():
    record = ReferenceWorst("p", IMAGES[9], IMAGES[:3], worst=1)
    assert made([record]) == [(9, 1, None)]
    assert made([record], "all_pairs") == [(9, 1, None), (0, 1, None), (2, 1, None)]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_pairs_pass_through_unless_they_are_ties(strategy):
    records = [pair(), pair(margin=2.0, confidence=0.9), pair(confidence=0.5), pair(margin=0.0)]
    pairs = build_pairs(records, strategy)
    assert list(pairs) == records[:2] and pairs.counts.ties == 2


def test_a_pair_says_where_it_is_from():
    (found,) = build_pairs([Ranked("p", IMAGES[:3], [1, 2, 0], where="a.parquet, row 7")])
    assert found.where == "a.parquet, row 7, images 1 over 2" and found.prompt == "p"


# --- Minimums ---


def test_a_minimum_margin_drops_and_counts():
    records = [ranked(0, 1), ranked(0, 0.5), pair(margin=0.2), pair(margin=-3.0), pair()]
    pairs = build_pairs(records, min_margin=0.5)
    assert len(list(pairs)) == 3  # 0.5 itself is enough
    assert (pairs.counts.below_margin, pairs.counts.without_margin) == (2, 1)
    contradicted = build_pairs(records)
    assert len(list(contradicted)) == 4 and contradicted.counts.below_margin == 1


def test_a_minimum_confidence_drops_and_counts():
    pairs = build_pairs([pair(confidence=0.6), pair(confidence=0.8), pair()], min_confidence=0.8)
    assert len(list(pairs)) == 2
    assert (pairs.counts.below_confidence, pairs.counts.without_confidence) == (1, 1)
    assert str(pairs.counts) == "2 pairs (3 records, 1 below confidence, 1 without confidence)"


def test_equal_images_are_dropped_and_counted():
    twins = [IMAGES[0], ImageSource("copy", data=encoded(0)), IMAGES[2]]
    pairs = build_pairs([Ranked("p", twins, [3, 1, 2])], "all_pairs")
    assert [p.rejected.where for p in pairs] == ["2", "copy"]  # 0 over 2, and 2 over the copy
    assert pairs.counts.equal_images == 1


def test_wrong_settings_say_what_would_do():
    with pytest.raises(ValueError, match=r"unknown strategy 'all_pair'\. Did you mean 'all_pairs'\?"):
        build_pairs([], "all_pair")
    with pytest.raises(ValueError, match=r"unknown strategy 'x'\. There are: all_pairs, best_worst"):
        build_pairs([], "x")
    with pytest.raises(ValueError, match=r"min_confidence must lie in \[0, 1\], found 80"):
        build_pairs([], min_confidence=80)
    with pytest.raises(ValueError, match="min_margin must be a number, found nan"):
        build_pairs([], min_margin=float("nan"))
    with pytest.raises(TypeError, match="pairs are made from preferences, found CaptionedImage"):
        list(build_pairs([CaptionedImage("p", IMAGES[0])]))


def test_pairs_are_made_as_they_are_asked_for():
    taken = []

    def records():
        for number in range(5):
            taken.append(number)
            yield ranked(0, 1)

    pairs = iter(build_pairs(records()))
    assert taken == []
    next(pairs)
    assert taken == [0]


def test_each_pass_counts_from_the_start():
    pairs = build_pairs([ranked(0, 1), ranked(1, 1)])
    assert (
        list(map(str, (list(pairs) and pairs.counts, list(pairs) and pairs.counts)))
        == ["1 pairs (2 records, 1 ties)"] * 2
    )


# --- Several annotators ---


def test_the_majority_decides_in_whatever_order_the_images_stand():
    merged = merge_votes([pair(0, 1), pair(1, 0), pair(1, 0), pair(0, 1, prompt="q"), pair(2, 1)])
    found = [(p.prompt, int(p.chosen.where), int(p.rejected.where), p.confidence, p.annotators) for p in merged]
    assert found == [("p", 1, 0, 2 / 3, 3), ("q", 0, 1, 1.0, 1), ("p", 2, 1, 1.0, 1)]
    assert merged.merged == 2


def test_as_many_votes_for_either_are_a_tie():
    (tie,) = merge_votes([pair(0, 1), pair(1, 0)])
    assert tie.confidence == 0.5 and tie.is_tie
    pairs = build_pairs(merge_votes([pair(0, 1), pair(1, 0)]))
    assert list(pairs) == [] and pairs.counts.ties == 1


def test_votes_are_weighed_by_confidence_and_annotators():
    (found,) = merge_votes([pair(0, 1, confidence=0.75, annotators=4), pair(1, 0), pair(0, 1, confidence=0.5)])
    assert (int(found.chosen.where), found.annotators) == (0, 6)
    assert found.confidence == pytest.approx((3 + 0.5) / 6)


def test_margins_are_averaged_in_the_direction_of_the_majority():
    (found,) = merge_votes([pair(0, 1, margin=2.0), pair(1, 0, margin=1.0), pair(1, 0, margin=4.0), pair(1, 0)])
    assert (int(found.chosen.where), found.margin) == (1, pytest.approx((-2 + 1 + 4) / 3))


@pytest.mark.parametrize("seed", range(10))
def test_merging_depends_on_no_order(seed):
    random_ = random.Random(seed)
    votes = [pair(*random_.sample(range(3), 2), margin=random_.random()) for _ in range(30)]
    results = []
    for _ in range(2):
        random_.shuffle(votes)
        merged = merge_votes(votes)
        results.append({(p.chosen.digest(), p.rejected.digest()): p for p in merged if not p.is_tie})
    assert results[0].keys() == results[1].keys()
    for key, one in results[0].items():
        other = results[1][key]
        assert (one.confidence, one.annotators) == (other.confidence, other.annotators)
        assert one.margin == pytest.approx(other.margin)


def test_merging_needs_what_can_be_read_twice():
    with pytest.raises(TypeError, match="merge_votes iterates its pairs twice: pass a list"):
        merge_votes(pair() for _ in range(2))
    with pytest.raises(TypeError, match="only pairs have votes to merge, found Ranked"):
        list(merge_votes([ranked(1, 2)]))
