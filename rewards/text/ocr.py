"""The reward `ocr`: the text that a recogniser reads in an image, compared with the text that the prompt asks for.

The recogniser is rapidocr on onnxruntime, on the CPU. Its wheel contains the PP-OCR models, so that nothing is
downloaded. It reads English and Chinese in horizontal lines.
"""

import inspect
import logging
import re
import threading
from typing import Any

import numpy as np
from PIL import Image

from rewards.pictures import at_most, to_rgb
from rewards.table import require_packages
from rewards.text.targets import in_reading_order, normalise, quoted, similarity, tokens

logger = logging.getLogger(__name__)

_METRICS = ("edit", "word")
_COLUMN = "text"
#: Characters of a target; comparing two texts takes the product of their lengths.
MAX_TARGET = 2000
_MAX_SIDE = 2000  # pixels; the recogniser itself shrinks larger images
_MAX_ASPECT = 8  # the recogniser would enlarge a thinner image until it fills the memory


class Ocr:
    """A reward in [0, 1]: how well the text in an image agrees with its target, 1 for the same text.

    The target is the value of the data column `column`. If the data lacks the column or the value is None, it is the
    quoted texts of the prompt, joined by spaces. Text that was not asked for costs as much as missing text. An image is
    not scored (None) without a target, or if the recogniser does not know a character of it, which is counted in
    `unsupported` and logged once.

    Args:
        metric: "edit": 1 - edit distance / length of the longer text. "word": the same by words (each CJK character is
            one), so that a word with one wrong letter is wrong.
        column: data column with the target. "text" may be missing; any other must be in the data.
        pattern: a regular expression whose first group is the target in a prompt, instead of quotes.
        ignore_case, ignore_punctuation: what does not count. ignore_spaces: the same, for "edit" only.
        min_side: pixels; a smaller image is enlarged before it is read.
        min_confidence: text that is recognised with a lower confidence, 0 to 1, is ignored.
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
            raise ValueError(f"ocr: metric must be one of {', '.join(_METRICS)}, found {metric!r}")
        if not column.isidentifier() or column in ("images", "prompts"):
            raise ValueError(f"ocr: column {column!r} is not a valid name of a data column")
        if pattern is not None and re.compile(pattern).groups < 1:
            raise ValueError(f"ocr: pattern {pattern!r} needs a group in parentheses that matches the text")
        if not 1 <= min_side <= _MAX_SIDE or threads < 1 or not 0 <= min_confidence <= 1:
            raise ValueError(
                f"ocr: min_side must be 1 to {_MAX_SIDE}, threads at least 1, min_confidence 0 to 1, "
                f"found {min_side}, {threads}, {min_confidence}"
            )
        require_packages("ocr")
        self.metric, self.min_side = metric, min_side
        self.pattern = None if pattern is None else re.compile(pattern)
        self.column = column
        self.normalisation = {
            "ignore_case": ignore_case,
            "ignore_spaces": ignore_spaces and metric == "edit",
            "ignore_punctuation": ignore_punctuation,
        }
        #: Images not scored because the recogniser does not know a character of their target.
        self.unsupported = 0
        self._told_of_length = False
        self.__signature__ = self._signature()  # from which the registry takes the data column's name
        self._lock = threading.Lock()  # the engine keeps the settings of a call
        self._engine = _engine(threads, min_confidence)
        self._known_characters = _characters(self._engine)

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
        """Return the text that an image should show, "" if there is none."""
        if text is not None:
            if not isinstance(text, str):
                raise ValueError(
                    f"ocr: the column {self.column!r} must hold text, found {type(text).__name__} {text!r}"
                )
            return text
        if self.pattern is None:
            return " ".join(quoted(prompt))
        match = self.pattern.search(prompt)
        return (match.group(1) or "") if match else ""

    def read(self, image: Image.Image) -> str:
        """Read the text in an image, lines from top to bottom; "" if there is none."""
        prepared = self._prepare(image)
        with self._lock:
            found = self._engine(prepared, use_det=True, use_cls=False, use_rec=True)
        if found.boxes is None or not found.txts:
            return ""
        return in_reading_order(found.boxes, found.txts)

    def compare(self, read: str, target: str) -> float | None:
        """Return the agreement of two texts, 0 to 1; None if the normalised target is empty."""
        read, target = normalise(read, **self.normalisation), normalise(target, **self.normalisation)
        if not target:
            return None
        return similarity(tokens(read), tokens(target)) if self.metric == "word" else similarity(read, target)

    def _score(self, image: Image.Image, target: str) -> float | None:
        if len(target) > MAX_TARGET:
            if not self._told_of_length:
                logger.warning(
                    "ocr: a target of %d characters is not scored: at most %d; logged once", len(target), MAX_TARGET
                )
            self._told_of_length = True
            return None
        characters = normalise(target, ignore_case=False)
        unknown = sorted({c for c in characters if c not in self._known_characters and not c.isspace()})
        if unknown:
            if not self.unsupported:
                logger.warning(
                    "ocr: the recogniser does not know %s (in %r): images with such targets are not scored; logged once",
                    " ".join(unknown),
                    target,
                )
            self.unsupported += 1
            return None
        if self.compare("", target) is None:
            return None
        return self.compare(self.read(image), target)

    def _prepare(self, image: Image.Image) -> Image.Image:
        """Return the image in a size and proportions that the recogniser can read."""
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
        "Global.use_cls": False,  # it turns lines that are upside down, but sometimes others too
        "Global.text_score": min_confidence,
        "Global.log_level": "error",  # otherwise it logs every image without text
        "Det.limit_type": "max",
        "Det.limit_side_len": 512,
        "EngineConfig.onnxruntime.intra_op_num_threads": threads,  # otherwise it takes every core
        "EngineConfig.onnxruntime.inter_op_num_threads": 1,
    }
    return RapidOCR(params=settings)


def _characters(engine: Any) -> frozenset[str]:
    """Return the characters that the recogniser knows."""
    # Its model is loaded by the first image that it reads.
    engine(np.full((48, 96, 3), 255, dtype=np.uint8), use_det=False, use_cls=False, use_rec=True)
    return frozenset(engine.text_rec.postprocess_op.character)
