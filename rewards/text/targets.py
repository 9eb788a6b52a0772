"""The text that a prompt asks for, and the comparison of two texts."""

import re
import unicodedata
from collections.abc import Sequence

_PAIRS = {"“": ("“”„", "”“"), "„": ("“”„", "”“"), "«": ("«»", "»"), "‹": ("‹›", "›"), "「": ("「」", "」")}
_PAIRS |= {"『": ("『』", "』"), "＂": ("＂", "＂"), '"': ('"', '"')}
#: Opening mark to what a text in these marks cannot hold, and which of that closes it.
_ENDS = {opening: (re.compile(f"[{marks}]"), closing) for opening, (marks, closing) in _PAIRS.items()}
# An apostrophe before a letter or digit is one of the text's own (don't), where others close it.
_ENDS |= {"'": (re.compile(r"'(?![A-Za-z0-9])|\n"), "'"), "‘": (re.compile(r"‘|’(?![A-Za-z0-9])"), "’")}
_CURLY = "".join(mark for mark in _ENDS if not mark.isascii())
# After a letter or digit a straight mark does not open a quote: it is an apostrophe (don't, the dogs') or inches (5" x 7").
_OPENING = re.compile(rf"(?<![A-Za-z0-9])(?:\"|'(?! ))|[{_CURLY}]")
#: Marks that look alike, which a recogniser may confuse, and the one that all become.
_ALIKE = str.maketrans("‘’‛′“”„‟″–—−‐‑", '\'\'\'\'"""""-----')
_CJK = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
_BETWEEN_CJK = re.compile(rf"(?<=[{_CJK}])\s+(?=[{_CJK}])")
_TOKEN = re.compile(rf"[{_CJK}]|[^\s{_CJK}]+")


def quoted(prompt: str) -> list[str]:
    """Return the quoted texts of a prompt in their order, without empty ones.

    Quotation marks are straight and curly, single and double, guillemets, German ones, and CJK corner brackets. Of
    quotes within quotes only the outer ones count. Apostrophes and marks that are never closed are ignored.
    """
    texts, place, unclosed = [], 0, dict[str, int]()
    for mark in _OPENING.finditer(prompt):
        opening, start = mark.group(), mark.end()
        # A mark that was not closed leaves the next ones of its kind without a close up to the same place: that keeps a
        # text of nothing but opening marks from taking time that grows with its square.
        if mark.start() < place or start <= unclosed.get(opening, 0):
            continue
        pattern, closing = _ENDS[opening]
        end = pattern.search(prompt, start)
        last = end.start() if end is not None else len(prompt)
        if end is None or end.group() not in closing:
            # Of curly single quotes, the last apostrophe of the text closes it where nothing else does.
            last = prompt.rfind("’", start, last) if opening == "‘" else -1
        if last < 0:
            unclosed[opening] = end.start() if end is not None else len(prompt)
            continue
        texts.append(prompt[start:last].strip())
        place = last + 1
    return [text for text in texts if text]


def normalise(
    text: str, ignore_case: bool = True, ignore_spaces: bool = False, ignore_punctuation: bool = False
) -> str:
    """Normalise a text for comparison: NFKC (full width becomes half width), with look-alike quotes and dashes unified.

    White space becomes single spaces, and is removed between two CJK characters; `ignore_spaces` removes all of it.
    """
    text = unicodedata.normalize("NFKC", text.translate(_ALIKE)).translate(_ALIKE)
    if ignore_case:
        text = text.casefold()
    if ignore_punctuation:
        # An apostrophe between letters belongs to the word (don't); any other mark may be all that separates two words.
        text = re.sub(r"(?<=\w)'(?=\w)", "", text)
        text = "".join(" " if unicodedata.category(c)[0] == "P" else c for c in text)
    text = _BETWEEN_CJK.sub("", " ".join(text.split()))
    return text.replace(" ", "") if ignore_spaces else text


def tokens(text: str) -> list[str]:
    """Split a text into words at spaces; every CJK character is a word of its own."""
    return _TOKEN.findall(text)


def edit_distance(a: Sequence[str], b: Sequence[str]) -> int:
    """Return the Levenshtein distance of two strings or lists of words."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, start=1):
        previous, row[0] = row[0], i
        for j, y in enumerate(b, start=1):
            previous, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, previous + (x != y))
    return row[-1]


def similarity(a: Sequence[str], b: Sequence[str]) -> float:
    """Return 1 - edit distance / length of the longer one, in [0, 1]; 1 for two empty ones."""
    longest = max(len(a), len(b))
    return 1.0 - edit_distance(a, b) / longest if longest else 1.0


def in_reading_order(boxes: Sequence[Sequence[Sequence[float]]], texts: Sequence[str]) -> str:
    """Join the texts of boxes by spaces, line by line from top to bottom, each line from left to right.

    A box belongs to the same line as the one before it if their middles are less than half the smaller height apart.

    Args:
        boxes: N of (4 corners, x and y), in pixels. texts: N.
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
