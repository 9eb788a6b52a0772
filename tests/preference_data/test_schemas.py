"""What the schemas refuse, and how they name it."""

import pytest
from preference_files import encoded

from preference_data.images import BadRow, ImageSource
from preference_data.schemas import BestWorst, CaptionedImage, Pair, Ranked, ReferenceWorst

ONE, TWO, THREE = (ImageSource("x", data=encoded(number)) for number in (1, 2, 3))
ROW = "a.jsonl, row 4"


def bad(column, problem):
    return pytest.raises(BadRow, match=rf"^a\.jsonl, row 4, column '{column}': {problem}")


FORMS = [
    lambda prompt: CaptionedImage(prompt, ONE, where=ROW),
    lambda prompt: Pair(prompt, ONE, TWO, where=ROW),
    lambda prompt: Ranked(prompt, [ONE], [1.0], where=ROW),
    lambda prompt: BestWorst(prompt, [ONE, TWO], 0, 1, where=ROW),
    lambda prompt: ReferenceWorst(prompt, ONE, [TWO], 0, where=ROW),
]


@pytest.mark.parametrize("form", FORMS)
def test_every_form_has_a_prompt_and_images(form):
    record = form("a prompt")
    record.check()
    assert record.prompt == "a prompt" and record.where == ROW and ONE in record.sources()
    for empty in ("", "  \n"):
        with bad("prompt", "the prompt is empty"):
            form(empty)
    with bad("prompt", "expected text, found NoneType"):
        form(None)


@pytest.mark.parametrize("form", FORMS)
def test_half_an_emoji_in_a_prompt_is_a_bad_row(form):
    """It ended everything at the first use of the text, without the row's name and where bad rows are skipped too."""
    with bad("prompt", "the text is not valid Unicode: a character is cut in half"):
        form("a cat \ud83d")
    assert form("a cat \U0001f63a").prompt


@pytest.mark.parametrize("form", ["Pair", "Ranked", "BestWorst", "ReferenceWorst", "CaptionedImage"])
def test_a_missing_file_is_found_by_check(tmp_path, form):
    gone = ImageSource(f"{ROW}, column 'x'", path=tmp_path / "gone.png")
    record = {
        "Pair": Pair("p", ONE, gone, where=ROW),
        "Ranked": Ranked("p", [ONE, gone], [1, 2], where=ROW),
        "BestWorst": BestWorst("p", [ONE, TWO, gone], 0, 1, where=ROW),
        "ReferenceWorst": ReferenceWorst("p", gone, [ONE], 0, where=ROW),
        "CaptionedImage": CaptionedImage("p", gone, where=ROW),
    }[form]
    with bad("x", r"the image .*gone\.png does not exist"):
        record.check()


def test_equal_images_are_found_by_check_whatever_their_place(tmp_path):
    (tmp_path / "copy.png").write_bytes(encoded(1))
    copy = ImageSource("x", path=tmp_path / "copy.png")
    with bad("chosen", "chosen and rejected are the same image"):
        Pair("p", ONE, copy, where=ROW).check()
    with bad("worst", "best and worst are the same image"):
        BestWorst("p", [TWO, ONE, copy], 1, 2, where=ROW).check()
    with bad("worst", "the worst is the same image as the reference"):
        ReferenceWorst("p", copy, [TWO, ONE], 1, where=ROW).check()
    Ranked("p", [ONE, copy], [1, 2], where=ROW).check()  # a generator that repeats itself is no bad row


@pytest.mark.parametrize("value", [-0.01, 1.01, float("nan"), float("inf")])
def test_a_confidence_is_a_share(value):
    with bad("confidence", "nan is not a finite|inf is not a finite|.* is out of range: 0 to 1"):
        Pair("p", ONE, TWO, confidence=value, where=ROW)


def test_margins_and_scores_are_finite():
    for value in (float("nan"), float("inf")):
        with bad("margin", f"{value} is not a finite number"):
            Pair("p", ONE, TWO, margin=value, where=ROW)
        with bad("scores", f"{value} is not a finite number"):
            Ranked("p", [ONE, TWO], [1.0, value], where=ROW)
    with bad("annotators", "0 is out of range"):
        Pair("p", ONE, TWO, annotators=0, where=ROW)


def test_images_and_scores_go_together():
    with bad("scores", "2 images have 1 scores"):
        Ranked("p", [ONE, TWO], [1.0], where=ROW)
    with bad("images", "there is no image"):
        Ranked("p", [], [], where=ROW)


@pytest.mark.parametrize("index", [-1, 2, 1.0, True, None, "0"])
def test_an_index_is_of_an_image(index):
    for column, form in (
        ("best", lambda: BestWorst("p", [ONE, TWO], index, 1, where=ROW)),
        ("worst", lambda: BestWorst("p", [ONE, TWO], 0, index, where=ROW)),
        ("worst", lambda: ReferenceWorst("p", ONE, [TWO, THREE], index, where=ROW)),
    ):
        with bad(
            column, "image -?[0-9] is out of range: there are 2 images, counted from 0|expected the index of an image"
        ):
            form()


def test_the_best_is_not_the_worst():
    with bad("worst", "image 1 is marked as best and as worst"):
        BestWorst("p", [ONE, TWO], 1, 1, where=ROW)


def test_a_tie_is_half_a_confidence_or_no_margin():
    assert Pair("p", ONE, TWO, confidence=0.5).is_tie and Pair("p", ONE, TWO, margin=0.0).is_tie
    for margin, confidence in ((None, None), (0.1, None), (None, 0.51), (-1.0, 1.0)):
        assert not Pair("p", ONE, TWO, margin=margin, confidence=confidence).is_tie
