"""What text a prompt asks for, and how two texts are compared: pure functions of strings."""

import re
import unicodedata
from collections.abc import Sequence

# An apostrophe follows a letter (don't, the dogs'), and so does the sign of inches (5" x 7"): neither opens a quote.
_QUOTES = re.compile(
    "|".join(
        (
            r'(?<![A-Za-z0-9])"([^"]*)"',
            r"(?<![A-Za-z0-9])'(?! )([^'\n]*(?:'(?=[A-Za-z0-9])[^'\n]*)*)'(?![A-Za-z0-9])",
            r"[“„]([^“”„]*)[”“]",
            r"‘((?:[^‘’]|’(?=[A-Za-z0-9]))*)’",
            r"«([^«»]*)»",
            r"‹([^‹›]*)›",
            r"「([^「」]*)」",
            r"『([^『』]*)』",
            r"＂([^＂]*)＂",
        )
    )
)
#: Marks that look alike, and that a recogniser may give one for the other.
_ALIKE = str.maketrans("‘’‛′“”„‟″–—−‐‑", '\'\'\'\'"""""-----')
_CJK = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
_BETWEEN_CJK = re.compile(rf"(?<=[{_CJK}])\s+(?=[{_CJK}])")
_TOKEN = re.compile(rf"[{_CJK}]|[^\s{_CJK}]+")


def quoted(prompt: str) -> list[str]:
    """The quoted parts of a prompt, in their order, without those that hold nothing.

    Quotation marks: straight and curly, single and double, guillemets, German, and the CJK corner brackets. Of quotes
    within quotes the outer ones count. An apostrophe or a mark that never closes quotes nothing.
    """
    found = (next(filter(None, match.groups()), "").strip() for match in _QUOTES.finditer(prompt))
    return [part for part in found if part]


def normalise(
    text: str, ignore_case: bool = True, ignore_spaces: bool = False, ignore_punctuation: bool = False
) -> str:
    """A text as it is compared: NFKC (full width becomes half width), look-alike quotes and dashes as one.

    Spaces become one each and none stands between two CJK characters; `ignore_spaces` takes out all of them.
    """
    text = unicodedata.normalize("NFKC", text.translate(_ALIKE)).translate(_ALIKE)
    if ignore_case:
        text = text.casefold()
    if ignore_punctuation:
        # A mark between letters is part of the word (don't); any other may be all that keeps two words apart.
        text = re.sub(r"(?<=\w)'(?=\w)", "", text)
        text = "".join(" " if unicodedata.category(c)[0] == "P" else c for c in text)
    text = _BETWEEN_CJK.sub("", " ".join(text.split()))
    return text.replace(" ", "") if ignore_spaces else text


def tokens(text: str) -> list[str]:
    """Words, split at spaces; every CJK character is a word of its own."""
    return _TOKEN.findall(text)


def in_reading_order(boxes: Sequence[Sequence[Sequence[float]]], texts: Sequence[str]) -> str:
    """The texts of boxes as they are read: lines from top to bottom, each from left to right, one space between.

    Args:
        boxes: N of (4 corners, x and y), in pixels. texts: N. A box belongs to a line when its middle is closer than
            half of the smaller height to that of the box before it in the line.
    """
    items = []
    for box, text in zip(boxes, texts, strict=True):
        ys = [float(corner[1]) for corner in box]
        items.append(((max(ys) + min(ys)) / 2, max(ys) - min(ys), min(float(corner[0]) for corner in box), text))
    lines: list[list[tuple[float, float, float, str]]] = []
    for item in sorted(items):
        last = lines[-1][-1] if lines else None
        if last is not None and item[0] - last[0] < 0.5 * min(item[1], last[1]):
            lines[-1].append(item)
        else:
            lines.append([item])
    return " ".join(text for line in lines for *_, text in sorted(line, key=lambda item: item[2]))
