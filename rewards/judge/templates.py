"""The questions to a judge, and the parsing of its answers."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import yaml

from rewards.hints import nearest


@dataclass(frozen=True)
class Template:
    """A question about an image.

    text: the question, in which ``{prompt}`` is replaced by the image's prompt. scores: names of the marks; the answer
    must give each on a line of its own, as ``NAME: NUMBER``. lowest, highest: the range of a mark.
    """

    text: str
    scores: tuple[str, ...]
    lowest: float
    highest: float

    def question(self, prompt: str) -> str:
        """Return the text that is sent to the judge."""
        return self.text.replace("{prompt}", prompt)

    def parse(self, answer: str) -> dict[str, float] | None:
        """Return the marks in an answer, scaled to [0, 1], or None unless each occurs once and in range.

        A line may be decorated (``**Alignment Score (1-5)**: 4/5``); numbers elsewhere are ignored.
        """
        marks = {}
        for name in self.scores:
            numbers = [_NUMBER.fullmatch(text) for text in self._values(name, answer)]
            if len(numbers) != 1 or numbers[0] is None:
                return None
            value, highest = float(numbers[0]["value"]), numbers[0]["highest"]
            if not self.lowest <= value <= self.highest or (highest is not None and float(highest) != self.highest):
                return None
            marks[name] = (value - self.lowest) / (self.highest - self.lowest)
        return marks

    def _values(self, name: str, answer: str) -> list[str]:
        """Return what follows the name and a colon, for each line that begins with them."""
        # No two parts that follow each other match the same characters: that keeps a long line from taking forever.
        decorated = rf"[\s*#>_-]*{re.escape(name)}(?: score)?[\s*_]*(?:\([^()]*\)[\s*_]*)?[:：]"
        label = re.compile(decorated, re.IGNORECASE)
        plain = (line.strip() for line in answer.splitlines())
        return [line[match.end() :].strip(" *_`") for line in plain if (match := label.match(line))]


_NUMBER = re.compile(r"(?P<value>\d+(?:\.\d+)?)\s*(?:/\s*(?P<highest>\d+(?:\.\d+)?))?\.?")

_ALIGNMENT = """You are given an image and the text from which it was generated. Judge only how well the image shows \
what the text says: every object, how many there are, their attributes, actions and places, and any words to be written.

Text: {prompt}

First name in a few words what is missing or wrong. Then end with this line and nothing after it, X being a number \
from 0 (shows nothing of it) to 10 (shows all of it):
Score: X"""

_AESTHETICS = """Judge how good this image looks: composition, light, colour, detail, and freedom from flaws such as \
deformed bodies, broken letters, noise or blur. What it shows does not matter.

First name in a few words what is good and what is not. Then end with this line and nothing after it, X being a number \
from 0 (very poor) to 10 (excellent):
Score: X"""

_UNIFIED = """You are given a text caption and an image generated from it. Rate the image on three axes, each from \
1 to 5, where decimals are allowed.
- Alignment: how well the image matches the content of the caption.
- Coherence: how consistent the image is in itself, without distortions or things that cannot be.
- Style: how pleasing it looks, whatever the caption says.

Answer in this form:
Alignment Score (1-5): X
Coherence Score (1-5): Y
Style Score (1-5): Z

Text Caption: [{prompt}]"""

TEMPLATES = {
    "alignment": Template(_ALIGNMENT, ("Score",), 0, 10),
    "aesthetics": Template(_AESTHETICS, ("Score",), 0, 10),
    "unifiedreward": Template(_UNIFIED, ("Alignment", "Coherence", "Style"), 1, 5),
}


def load_template(name: str) -> Template:
    """Return a built-in template, or one from a YAML file with the keys of :class:`Template`.

    Raises:
        ValueError: an unknown name or key, a missing key, an invalid value.
        FileNotFoundError: no such file.
    """
    if name in TEMPLATES:
        return TEMPLATES[name]
    path = Path(name).expanduser()
    if path.suffix not in (".yaml", ".yml"):
        hint = nearest(name, TEMPLATES)
        raise ValueError(f"vlm_judge: unknown template {name!r}.{hint} For your own, give the path of a .yaml file")
    if not path.is_file():
        raise FileNotFoundError(f"vlm_judge: the template {name} does not exist (looked for {path.resolve()})")
    return _check_template(name, yaml.safe_load(path.read_text(encoding="utf-8")))


def _check_template(name: str, content: object) -> Template:
    keys = [field.name for field in fields(Template)]
    if not isinstance(content, dict) or sorted(content) != sorted(keys):
        found = ", ".join(map(str, content)) if isinstance(content, dict) else type(content).__name__
        raise ValueError(f"vlm_judge: the template {name} needs the keys {', '.join(keys)}, found {found}")
    text, scores, lowest, highest = (content[key] for key in keys)
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"vlm_judge: `text` of the template {name} must be text, found {text!r}")
    if not isinstance(scores, Sequence) or isinstance(scores, str) or not scores:
        raise ValueError(f"vlm_judge: `scores` of the template {name} must be a list of names, found {scores!r}")
    numbers = all(isinstance(n, (int, float)) and not isinstance(n, bool) for n in (lowest, highest))
    if not numbers or not 0 <= lowest < highest:
        raise ValueError(f"vlm_judge: the template {name} needs 0 <= lowest < highest, found {lowest!r}, {highest!r}")
    return Template(text, tuple(map(str, scores)), lowest, highest)
