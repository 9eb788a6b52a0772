"""Text rendering: what a text recogniser reads in an image, compared with what the prompt asks for.

The recogniser is rapidocr (PP-OCR models, which its wheel holds: nothing is downloaded) on onnxruntime, on CPU. It
reads English and Chinese, written horizontally.
"""

import inspect
import logging
import re
import threading
from typing import Any

import numpy as np
from PIL import Image

from rewards.pictures import at_most, to_rgb
from rewards.table import require
from rewards.text.targets import in_reading_order, normalise, quoted, tokens

logger = logging.getLogger(__name__)

_METRICS = ("edit", "word")
_COLUMN = "text"
_MAX_SIDE = 2000  # pixels; the recogniser makes larger images smaller itself
_MAX_ASPECT = 8  # beyond it the recogniser enlarges a thin image until it fills the memory


class Ocr:
    """A reward in [0, 1]: how well the text that is read agrees with the wanted text, 1 where it is the same.

    Wanted is the data column `column`, or, where the data lacks it or the row holds None, the quoted parts of the
    prompt, joined by a space. Text that was not asked for costs as much as text that is missing. Not scored (None):
    no or an empty target, and a target with characters that the recogniser does not know (counted in `unsupported`,
    and said once).

    Args:
        metric: "edit": 1 - edit distance / length of the longer text. "word": the same by words (each CJK character is
            one), so a word with one wrong letter is wrong.
        column: data column with the target. "text" may be missing; any other must be in the data.
        pattern: a regular expression whose first group is the target in a prompt, instead of quotes.
        ignore_case, ignore_punctuation: what does not count. ignore_spaces: with "edit" only.
        min_side: pixels; a smaller image is enlarged before it is read.
        min_confidence: text read with less, 0 to 1, is left out.
        threads: of onnxruntime, for each of its two models.

    Raises:
        ValueError: an argument out of range. ImportError: a package is missing, with what to install.
    """

    def __init__(
        self,
        metric: str = "edit",
        column: str = _COLUMN,
        pattern: str | None = None,
        ignore_case: bool = True,
        ignore_spaces: bool = True,
        ignore_punctuation: bool = False,
        min_side: int = 128,
        min_confidence: float = 0.5,
        threads: int = 1,
    ):
        if metric not in _METRICS:
            raise ValueError(f"ocr: metric is one of {', '.join(_METRICS)}, found {metric!r}")
        if not column.isidentifier() or column in ("images", "prompts"):
            raise ValueError(f"ocr: column {column!r} is no name of a data column")
        if pattern is not None and re.compile(pattern).groups < 1:
            raise ValueError(f"ocr: pattern {pattern!r} needs a group, in (), that holds the text")
        if not 1 <= min_side <= _MAX_SIDE or threads < 1 or not 0 <= min_confidence <= 1:
            raise ValueError(
                f"ocr: min_side is 1 to {_MAX_SIDE}, threads at least 1, min_confidence 0 to 1, "
                f"found {min_side}, {threads}, {min_confidence}"
            )
        require("ocr")
        self.metric, self.min_side = metric, min_side
        self.pattern = None if pattern is None else re.compile(pattern)
        self.column = column
        self.comparing = {
            "ignore_case": ignore_case,
            "ignore_spaces": ignore_spaces and metric == "edit",
            "ignore_punctuation": ignore_punctuation,
        }
        #: Images left unscored because the recogniser does not know a character of their target.
        self.unsupported = 0
        self.__signature__ = self._signature()  # the registry reads the data column's name off it
        self._lock = threading.Lock()  # the engine keeps settings between calls
        self._engine = _engine(threads, min_confidence)
        self._known = _characters(self._engine)

    def _signature(self) -> inspect.Signature:
        kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
        default = None if self.column == _COLUMN else inspect.Parameter.empty
        given = [inspect.Parameter(name, kind) for name in ("images", "prompts")]
        return inspect.Signature([*given, inspect.Parameter(self.column, kind, default=default)])

    def __call__(self, images: list[Image.Image], prompts: list[str], **columns: list[Any]) -> list[float | None]:
        texts = columns.get(self.column) or [None] * len(images)
        rows = zip(images, prompts, texts, strict=True)
        return [self._score(image, self.target(prompt, text)) for image, prompt, text in rows]

    def target(self, prompt: str, text: str | None = None) -> str:
        """The text that an image should show; "" where there is none."""
        if text is not None:
            if not isinstance(text, str):
                raise ValueError(
                    f"ocr: the column {self.column!r} must hold text, found {type(text).__name__} {text!r}"
                )
            return text
        if self.pattern is None:
            return " ".join(quoted(prompt))
        found = self.pattern.search(prompt)
        return (found.group(1) or "") if found else ""

    def read(self, image: Image.Image) -> str:
        """The text in an image, as it is read: lines from top to bottom, "" where there is none."""
        prepared = self._prepared(image)
        with self._lock:
            found = self._engine(prepared, use_det=True, use_cls=False, use_rec=True)
        if found.boxes is None or not found.txts:
            return ""
        return in_reading_order(found.boxes, found.txts)

    def compare(self, read: str, target: str) -> float | None:
        """Agreement of two texts, 0 to 1; None where nothing is left of the target to compare."""
        from rapidfuzz.distance import Levenshtein

        one, other = normalise(read, **self.comparing), normalise(target, **self.comparing)
        if not other:
            return None
        if self.metric == "word":
            return Levenshtein.normalized_similarity(tokens(one), tokens(other))
        return Levenshtein.normalized_similarity(one, other)

    def _score(self, image: Image.Image, target: str) -> float | None:
        wanted = normalise(target, ignore_case=False)
        unknown = sorted({c for c in wanted if c not in self._known and not c.isspace()})
        if unknown:
            if not self.unsupported:
                logger.warning(
                    "ocr: the recogniser does not know %s (in %r): such targets are left unscored; said once",
                    " ".join(unknown),
                    target,
                )
            self.unsupported += 1
            return None
        if self.compare("", target) is None:
            return None
        return self.compare(self.read(image), target)

    def _prepared(self, image: Image.Image) -> Image.Image:
        image = at_most(to_rgb(image), _MAX_SIDE)
        width, height = image.size
        least = -(-max(width, height) // _MAX_ASPECT)
        if min(width, height) < least:
            canvas = Image.new("RGB", (max(width, least), max(height, least)), image.getpixel((0, 0)))
            canvas.paste(image, ((canvas.width - width) // 2, (canvas.height - height) // 2))
            image = canvas
        if min(image.size) < self.min_side:
            scale = self.min_side / min(image.size)
            size = (round(image.width * scale), round(image.height * scale))
            image = image.resize(size, Image.Resampling.BICUBIC)
        return image


def _engine(threads: int, min_confidence: float) -> Any:
    from rapidocr import RapidOCR

    settings = {
        "Global.use_cls": False,  # it turns lines that stand on their head, and at times those that do not
        "Global.text_score": min_confidence,
        "Global.log_level": "error",  # else a line for every image without text
        "Det.limit_type": "max",
        "Det.limit_side_len": 512,
        "EngineConfig.onnxruntime.intra_op_num_threads": threads,  # else it takes every core, beside torch
        "EngineConfig.onnxruntime.inter_op_num_threads": 1,
    }
    return RapidOCR(params=settings)


def _characters(engine: Any) -> frozenset[str]:
    """What the recogniser can write; its model is loaded by the first image that gets past the detector."""
    engine(np.full((48, 96, 3), 255, dtype=np.uint8), use_det=False, use_cls=False, use_rec=True)
    return frozenset(engine.text_rec.postprocess_op.character)
