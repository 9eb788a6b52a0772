"""Show what a preference data set contains: ``flow-align inspect PATH``.

Prints counts, ties, margins, sizes, broken rows and prompts. With ``--sheet FILE.png`` it draws some of the pairs, the
chosen image left and the rejected one right. The data set is read once, one row at a time; ``--fast`` reads only the
images' headers.
"""

import argparse
import math
import random
import statistics
import sys
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b

from PIL import Image, ImageDraw, ImageFont, ImageOps
from tqdm import tqdm

from preference_data.formats import LAYOUTS, CaptionedNotPreferences
from preference_data.images import BadRow, ImageSource
from preference_data.pairs import STRATEGIES, PairCounts, build_pairs
from preference_data.readers import Records, read_captioned, read_preferences
from preference_data.schemas import Pair, Record

_BINS = 10  # of a histogram
_BAR = 30  # characters
_SIZES = 8  # most frequent image sizes printed
# Pixels of the sheet.
_TILE = 192
_CAPTION = 34
_GAP = 8


@dataclass
class Findings:
    """What a pass over the data set gathers: a few numbers for each record, and small copies of some images."""

    margins: array = field(default_factory=lambda: array("d"))
    confidences: array = field(default_factory=lambda: array("d"))
    lengths: array = field(default_factory=lambda: array("l"))
    sizes: Counter[tuple[int, int]] = field(default_factory=Counter)
    prompts: Counter[bytes] = field(default_factory=Counter)  # by digest
    sampled: list[tuple[int, str, list[Image.Image]]] = field(default_factory=list)  # index in the data, prompt, images
    offered: int = 0
    _random: random.Random = field(default_factory=lambda: random.Random(0))

    def add_record(self, record: Record) -> None:
        self.lengths.append(len(record.prompt))
        self.prompts[blake2b(record.prompt.encode(), digest_size=8).digest()] += 1
        for image in record.sources():
            self.sizes[image.size()] += 1

    def add_pair(self, pair: Pair) -> None:
        if pair.margin is not None:
            self.margins.append(pair.margin)
        if pair.confidence is not None:
            self.confidences.append(pair.confidence)

    def sample(self, prompt: str, images: Sequence[ImageSource], size: int) -> None:
        """Add to a uniform random sample of ``size`` of all that is passed (reservoir sampling), as small copies."""
        index, self.offered = self.offered, self.offered + 1
        slot = len(self.sampled) if len(self.sampled) < size else self._random.randrange(self.offered)
        if slot < size:
            small = [ImageOps.contain(image.open(), (_TILE, _TILE)) for image in images]
            self.sampled[slot : slot + 1] = [(index, prompt, small)]

    def in_order(self) -> list[tuple[str, list[Image.Image]]]:
        """Return the sampled prompts and images in the order of the data."""
        return [(prompt, images) for _, prompt, images in sorted(self.sampled, key=lambda entry: entry[0])]


def gather(records: Records, strategy: str, min_margin: float, sheet_size: int) -> tuple[Findings, PairCounts | None]:
    """Read all records once, and return what was found and the counts of their pairs, None for captioned images.

    An image that turns out to be broken is added to the bad rows of the records' report.
    """
    findings = Findings()
    captioned = records.format == "captioned"

    def measured() -> Iterator[Record]:
        for record in tqdm(records, desc="reading", unit=" records", file=sys.stderr):
            try:
                findings.add_record(record)
            except BadRow as error:
                records.report.skip(error)
                continue
            yield record

    if captioned:
        for record in measured():
            _sample(findings, records, record.prompt, record.sources(), sheet_size)
        return findings, None
    pairs = build_pairs(measured(), strategy, min_margin=min_margin)  # type: ignore[arg-type]
    for pair in pairs:
        findings.add_pair(pair)
        _sample(findings, records, pair.prompt, pair.sources(), sheet_size)
    return findings, pairs.counts


def _sample(findings: Findings, records: Records, prompt: str, images: Sequence[ImageSource], size: int) -> None:
    try:
        findings.sample(prompt, images, size)
    except BadRow as error:
        records.report.skip(error)


def describe(records: Records, findings: Findings, counts: PairCounts | None, strategy: str) -> str:
    """Return the text that is printed."""
    lines = [str(records.report)]
    if counts is not None:
        lines.append(f"pairs ({strategy}): {counts}")
    lines += _numbers("margin", findings.margins) + _numbers("confidence", findings.confidences)
    if findings.sizes:
        common = ", ".join(f"{w}x{h} ({count})" for (w, h), count in findings.sizes.most_common(_SIZES))
        more = len(findings.sizes) - _SIZES
        lines.append(f"image sizes: {common}" + (f", and {more} more" if more > 0 else ""))
    if findings.lengths:
        low, middle, high = _spread(findings.lengths)
        distinct, repeated = len(findings.prompts), max(findings.prompts.values())
        lines.append(f"prompt length in characters: {low:g} to {high:g}, median {middle:g}")
        lines.append(f"prompts: {distinct} distinct, the most frequent one {repeated} times")
    return "\n".join(lines)


def _spread(values: array) -> tuple[float, float, float]:
    return min(values), statistics.median(values), max(values)


def _numbers(name: str, values: array) -> list[str]:
    """Return the lines of a spread and a histogram, or none without values."""
    if not values:
        return []
    low, middle, high = _spread(values)
    lines = [f"{name} of {len(values)} pairs: {low:.4g} to {high:.4g}, median {middle:.4g}"]
    if low == high:
        return lines
    width = (high - low) / _BINS
    bins = Counter(min(int((value - low) / width), _BINS - 1) for value in values)
    most = max(bins.values())
    for number in range(_BINS):
        bar = "#" * -(-bins[number] * _BAR // most)
        lines.append(f"  from {low + number * width:9.4g}  {bar:<{_BAR}} {bins[number]}")
    return lines


def sheet(examples: Sequence[tuple[str, list[Image.Image]]], *, pairs: bool) -> Image.Image:
    """Draw a contact sheet of examples, each a pair of tiles (chosen left, rejected right) or one, with its prompt."""
    tiles = 2 if pairs else 1
    columns = max(1, min(3 if pairs else 6, len(examples)))
    rows = max(1, math.ceil(len(examples) / columns))
    width, height = tiles * _TILE + (tiles - 1) * 2 + _GAP, _TILE + _CAPTION + _GAP
    canvas = Image.new("RGB", (columns * width + _GAP, rows * height + _GAP), "white")
    draw = ImageDraw.Draw(canvas)
    font = ImageFont.load_default(size=12)
    for number, (prompt, images) in enumerate(examples):
        row, column = divmod(number, columns)
        left, top = _GAP + column * width, _GAP + row * height
        for tile, image in enumerate(images):
            corner = left + tile * (_TILE + 2)
            canvas.paste(image, (corner + (_TILE - image.width) // 2, top + (_TILE - image.height) // 2))
            colour = ("green", "red")[tile] if pairs else "grey"
            draw.rectangle((corner - 1, top - 1, corner + _TILE, top + _TILE), outline=colour)
        text = _two_lines(prompt, tiles * _TILE, draw, font)
        draw.multiline_text((left, top + _TILE + 3), text, fill="black", font=font, spacing=2)
    return canvas


def _two_lines(
    prompt: str, width: int, draw: ImageDraw.ImageDraw, font: ImageFont.FreeTypeFont | ImageFont.ImageFont
) -> str:
    """Return the prompt's beginning on two lines, broken at a space or, as in scripts without any, between letters."""
    rest, lines = " ".join(prompt.split()), []
    for _ in range(2):
        fits = len(rest)
        while fits > 1 and draw.textlength(rest[:fits], font=font) > width:
            fits = min(fits - 1, int(fits * width / draw.textlength(rest[:fits], font=font)) + 1)
        if fits < len(rest) and " " in rest[1:fits]:
            fits = rest.rindex(" ", 1, fits)
        lines.append(rest[:fits])
        rest = rest[fits:].lstrip()
    if rest:
        lines[-1] = lines[-1][:-3] + "..."
    return "\n".join(lines)


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="flow-align inspect", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("path", help="a file, a folder or a hub data set")
    parser.add_argument("--format", choices=[*LAYOUTS, "captioned"], help="default: found from the columns")
    parser.add_argument("--split", default="train")
    parser.add_argument("--strategy", choices=STRATEGIES, default="best_worst")
    parser.add_argument("--min_margin", type=float, default=0.0)
    parser.add_argument("--trigger", help="for captioned images: a word that is put before every caption")
    parser.add_argument("--streaming", action="store_true", help="read a hub data set without downloading it first")
    parser.add_argument("--fast", action="store_true", help="read only the images' headers")
    parser.add_argument("--sheet", help="write a contact sheet, PNG")
    parser.add_argument("--pairs", type=int, default=12, help="how many random pairs the sheet shows")
    return parser.parse_args(argv)


def _open(arguments: argparse.Namespace) -> Records:
    common = {"on_bad_row": "skip", "verify_images": not arguments.fast, "streaming": arguments.streaming}
    if arguments.format == "captioned" or arguments.trigger is not None:
        return read_captioned(arguments.path, arguments.split, trigger=arguments.trigger, **common)
    try:
        return read_preferences(arguments.path, arguments.split, format=arguments.format, **common)
    except CaptionedNotPreferences:
        return read_captioned(arguments.path, arguments.split, **common)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command, and return its exit code: 0, or 1 if nothing could be read."""
    arguments = _arguments(argv)
    try:
        records = _open(arguments)
        sheet_size = arguments.pairs if arguments.sheet else 0
        findings, counts = gather(records, arguments.strategy, arguments.min_margin, sheet_size)
        print(describe(records, findings, counts, arguments.strategy))
        if arguments.sheet:
            sheet(findings.in_order(), pairs=counts is not None).save(arguments.sheet)
            print(f"wrote {arguments.sheet}: {len(findings.sampled)} {'pairs' if counts is not None else 'images'}")
    except (OSError, ValueError) as error:
        print(f"cannot inspect {arguments.path}: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
