"""OCR: words in real fonts are read; what is wanted is found in columns and quotes; what cannot be read is unscored."""

import importlib.util
import logging
import random

import pytest
from lettering import lettered, worn
from PIL import Image, ImageOps

from align.tiny.world import render, sample, sentence
from rewards import load_rewards, score
from rewards.text.ocr import Ocr
from rewards.text.targets import in_reading_order, normalise, quoted, tokens

ENGLISH = ("OPEN", "Coffee", "Grand Hotel", "flow matching", "Room 42")
CHINESE = ("你好世界", "欢迎光临", "北京大学", "今日特价", "山高水长", "龙凤呈祥")


@pytest.fixture(scope="module")
def reader() -> Ocr:
    return Ocr()


@pytest.fixture(scope="module")
def by_words() -> Ocr:
    return Ocr(metric="word")


# --- Reading ---


@pytest.mark.parametrize("text", [*ENGLISH, *CHINESE])
def test_clean_words_are_read_and_score_one_and_others_score_less(reader, text):
    image = lettered(text)
    assert normalise(reader.read(image)) == normalise(text)
    wrong = "zzz" if text.isascii() else "黄红花"
    assert reader([image] * 3, ["", f'a sign that says "{text}"', "a sign"], text=[text, None, wrong]) == [
        1.0,
        1.0,
        0.0,
    ]


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("text", ["Grand Hotel", "Coffee", "欢迎光临", "北京大学"])
def test_noisy_and_turned_words_are_read(reader, text, seed):
    assert reader([worn(lettered(text), seed)], [f"“{text}”"]) == [1.0]


def test_white_on_black_and_several_lines_of_two_languages_are_read(reader):
    image = lettered("Grand Hotel", "北京大学", "Room 42", ink="white", paper="black")
    assert reader([image], ['a sign "Grand Hotel" over 「北京大学」 over "Room 42"']) == [1.0]


def test_letters_that_are_missing_wrong_or_too_many_cost(reader):
    image = lettered("OPEN")
    assert reader([image] * 4, [""] * 4, text=["OPENS", "OVEN", "OPE", "open"]) == [0.8, 0.75, 0.75, 1.0]
    extra = lettered("OPEN", "SHUT")
    assert reader([extra, lettered("")], [""] * 2, text=["OPEN"] * 2) == [0.5, 0.0]


def test_words_are_counted_by_the_word_metric_and_characters_in_chinese(by_words):
    image = lettered("Grand Hotel")
    found = by_words([image] * 3, [""] * 3, text=["Grand Hotel", "Grand Hostel", "a Grand Hotel"])
    assert found == pytest.approx([1, 0.5, 2 / 3])
    assert by_words([lettered("北京大学")], [""], text=["北京大厅"]) == [0.75]


def test_the_same_images_give_the_same_scores_alone_or_together(reader):
    images = [worn(lettered(text), 7, noise=60) for text in ENGLISH]
    together = reader(images, [""] * 5, text=list(ENGLISH))
    assert together == [reader([image], [""], text=[text])[0] for image, text in zip(images, ENGLISH, strict=True)]
    assert together == Ocr(threads=2)(images, [""] * 5, text=list(ENGLISH))


# --- The embedded world ---


def test_the_words_of_the_embedded_world_are_read_off_its_small_pictures():
    # Letters of 3 x 5 cells: S and 5, O and 0 look alike, so not every one can be right.
    rng, rows = random.Random(3), []
    for _ in range(16):
        said, painted = sample(rng, "word")
        rows.append((render(painted, rng), sentence(said)))
    (reward,) = load_rewards([{"use": "ocr", "args": {"pattern": "the word ([A-Z]+)"}}])
    (right,), _ = score([reward], [image for image, _ in rows], [prompt for _, prompt in rows], {})
    shifted = [prompt for _, prompt in rows[1:] + rows[:1]]
    (wrong,), _ = score([reward], [image for image, _ in rows], shifted, {})
    assert rows[0][0].size == (64, 64)
    assert sum(right) / 16 > 0.9 and sum(value == 1 for value in right) >= 13
    assert sum(wrong) / 16 < 0.5


# --- Images of every kind ---


def test_images_without_text_of_any_size_score_zero(reader):
    images = [Image.new("RGB", size, "grey") for size in ((1, 1), (1, 8000), (8000, 1), (8000, 8000), (3, 200))]
    assert reader(images, ['"OPEN"'] * 5) == [0.0] * 5
    assert reader([], []) == [] and reader([], [], text=[]) == []


def test_a_very_large_a_small_a_grey_and_a_transparent_image_are_read(reader):
    image = lettered("OPEN", size=120)
    clear = Image.new("RGBA", image.size, (0, 0, 0, 0))
    clear.putalpha(ImageOps.invert(image.convert("L")))
    large = lettered("OPEN", size=1200, width=8000, height=8000)
    small = lettered("OPEN", size=20, width=64, height=64)
    images = [large, small, image.convert("L"), image.convert("1"), image.convert("P"), clear]
    assert reader(images, ['"OPEN"'] * len(images)) == [1.0] * len(images)


# --- Targets ---


@pytest.mark.parametrize(
    ("prompt", "parts"),
    [
        ('a sign that says "OPEN"', ["OPEN"]),
        ("a sign that says 'OPEN'", ["OPEN"]),
        ("a sign that says “OPEN” and ‘SHUT’", ["OPEN", "SHUT"]),
        ("un panneau « OUVERT » et ‹ici›", ["OUVERT", "ici"]),
        ("ein Schild „OFFEN“", ["OFFEN"]),
        ("牌子上写着“欢迎光临”和「你好」还有『再见』", ["欢迎光临", "你好", "再见"]),
        ('写着"你好"的牌子', ["你好"]),
        ("写着'你好'的牌子，＂世界＂", ["你好", "世界"]),
        ("don't stop the dogs' barking, it's John's", []),
        ("don’t stop the dogs’ barking, it’s John’s", []),
        ("it's a sign: 'don't stop'", ["don't stop"]),
        ("it’s a sign: ‘don’t stop’", ["don’t stop"]),
        ("“don’t stop”", ["don’t stop"]),
        ("the dogs' sign says 'SIT' and the cats' sign 'NO'", ["SIT", "NO"]),
        ('a 5" x 7" photo of "CAT"', ["CAT"]),
        ("\"He said 'hi'\"", ["He said 'hi'"]),
        ("「外『内』外」", ["外『内』外"]),
        ('an open " quote', []),
        ('"" and "  " and “”', []),
        ("'90s style, 'til dawn", []),
        ("no quotes", []),
        ("", []),
    ],
)
def test_quoted_parts_of_a_prompt(prompt, parts):
    assert quoted(prompt) == parts


@pytest.mark.parametrize("unclosed", [" 'a'b\"", " 'a", ' "', "‘", "‘a’b", "“", "„", "«"])
def test_marks_that_are_never_closed_do_not_hold_the_interpreter(unclosed):
    """A prompt of 80 KB once took 22 s, in which a service answered nobody; this one would take hours."""
    quoted(unclosed * 200_000)


def test_a_target_that_no_image_holds_is_not_scored(reader, caplog):
    assert reader([Image.new("RGB", (64, 64))], ["a"], text=["x" * 5000]) == [None]
    assert "a target of 5000 characters is not scored" in caplog.text


def test_the_column_comes_before_the_quotes_and_none_in_it_leaves_them(reader):
    assert reader.target('says "A"') == "A" and reader.target('says "A" and "B"') == "A B"
    assert reader.target('says "A"', "B") == "B" and reader.target('says "A"', "") == ""
    with pytest.raises(ValueError, match="'text' must hold text, found int 3"):
        reader.target("", 3)


def test_no_or_an_empty_target_is_not_scored(reader):
    image = lettered("OPEN")
    assert reader([image] * 4, ["no quotes", '""', "", '"A"'], text=[None, None, " ", ""]) == [None] * 4
    assert reader([image], ["no quotes"]) == [None]
    bare = Ocr(ignore_punctuation=True)
    assert bare([image, image], ['"!?"', '"open!"']) == [None, 1.0]


def test_characters_the_recogniser_does_not_know_are_not_scored_and_said_once(caplog):
    reader, image = Ocr(), lettered("OPEN")
    with caplog.at_level(logging.WARNING, logger="rewards.text.ocr"):
        assert reader([image] * 3, ['"ทดสอบ"', '"한국"', '"OPEN"']) == [None, None, 1.0]
    assert reader.unsupported == 2 and len(caplog.records) == 1 and "ท" in caplog.text


def test_full_width_letters_and_accents_are_known(reader):
    image = lettered("Café OPEN")
    assert reader([image] * 2, [""] * 2, text=["Ｃａｆé ＯＰＥＮ", "cafe\u0301 open"]) == [1.0, 1.0]


def test_another_column_or_pattern_is_taken_and_checked():
    (reward,) = load_rewards([{"use": "ocr", "args": {"column": "sign"}}])
    assert reward.columns == ("sign",) and reward.required == ("sign",)
    with pytest.raises(ValueError, match=r"needs the data column 'sign', which the data lacks\. Did you mean 'signs'"):
        reward.check_columns(["prompt", "signs"])
    scores, failures = score([reward], [lettered("OPEN")], ['"SHUT"'], {"sign": ["OPEN"], "text": ["SHUT"]})
    assert scores == [[1.0]] and not failures
    (plain,) = load_rewards(["ocr"])
    assert plain.columns == ("text",) and plain.required == ()
    assert Ocr(pattern="sign reading (.*)").target("a sign reading OPEN") == "OPEN"


# --- Comparing ---


def test_normalising():
    assert normalise("ＡＢＣ　１２３，") == "abc 123," and normalise("A  b\n c", ignore_case=False) == "A b c"
    assert normalise("北 京 Hotel 大 学") == "北京 hotel 大学"
    assert normalise("a b 北 c", ignore_spaces=True) == "ab北c"
    assert normalise("don’t") == normalise("don't") and normalise("“x”—y") == '"x"-y'
    assert normalise("Don't stop, now! 你好。", ignore_punctuation=True) == "dont stop now 你好"
    assert normalise("5″ by 7″") == '5" by 7"'  # NFKC alone would make two apostrophes of each
    assert normalise("a︱b") == "a-b"  # a dash only after NFKC, which makes it of the vertical one
    assert normalise("…") == "..." and normalise("Straße") == "strasse"


def test_tokens_are_words_and_cjk_characters():
    assert tokens("grand hotel 北京 x1大") == ["grand", "hotel", "北", "京", "x1", "大"] and tokens("") == []


def box(x, y, width=40, height=20):
    return [(x, y), (x + width, y), (x + width, y + height), (x, y + height)]


def test_boxes_are_read_by_lines_from_left_to_right():
    boxes = [box(100, 3), box(60, 50), box(0, 0), box(0, 56), box(0, 90, height=40), box(60, 95)]
    assert in_reading_order(boxes, list("bdacef")) == "a b c d e f"
    assert in_reading_order([], []) == ""


def test_a_small_word_beside_a_headline_is_a_line_of_its_own_unless_their_middles_are_near():
    """A sign with a headline would be read out of order, and a right picture would score as a wrong one."""
    headline = box(0, 0, height=80)  # middle 40; a small word is 20 high: within 10 of it they are one line
    for middle, read in ((49, "small headline"), (51, "headline small"), (55, "headline small")):
        left = box(-60, middle - 10)
        assert in_reading_order([headline, left], ["headline", "small"]) == read
        assert in_reading_order([left, headline], ["small", "headline"]) == read


def test_spaces_and_case_count_where_they_are_asked_to():
    strict = Ocr(ignore_case=False, ignore_spaces=False)
    assert strict.compare("Grand Hotel", "Grand Hotel") == 1.0
    assert strict.compare("GrandHotel", "Grand Hotel") == pytest.approx(10 / 11)
    assert strict.compare("grand Hotel", "Grand Hotel") == pytest.approx(10 / 11)


# --- Errors ---


@pytest.mark.parametrize(
    ("args", "found"),
    [
        ({"metric": "cer"}, "must be one of edit, word, found 'cer'"),
        ({"column": "two words"}, "not a valid name of a data column"),
        ({"column": "images"}, "not a valid name of a data column"),
        ({"pattern": "no group"}, "needs a group"),
        ({"min_side": 0}, "min_side must be 1 to 2000"),
        ({"threads": 0}, "threads at least 1"),
        ({"min_confidence": 2.0}, "min_confidence 0 to 1"),
        ({"metrc": "edit"}, "do not fit.*'metrc'"),
    ],
)
def test_wrong_arguments_are_refused(args, found):
    with pytest.raises(ValueError, match=found):
        load_rewards([{"use": "ocr", "args": args}])


@pytest.mark.parametrize("package", ["rapidocr", "onnxruntime"])
def test_a_missing_package_is_named_with_what_to_install(package, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == package else find(name, *rest))
    with pytest.raises(ImportError, match=rf"'ocr' needs the package {package}.*pip install \"flow-align\[ocr\]\""):
        load_rewards(["ocr"])
