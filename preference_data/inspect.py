"""What is in a preference data set: ``python -m preference_data.inspect PATH``.

Prints counts, ties, margins, sizes, broken rows and prompts, and with ``--sheet FILE.png`` draws some of the pairs,
win left and lose right. It reads the whole set once, one row at a time; ``--fast`` looks at the images' headers only.
"""

import argparse
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

from preference_data.formats import LAYOUTS
from preference_data.images import BadRow, ImageSource
from preference_data.pairs import STRATEGIES, PairCounts, build_pairs
from preference_data.readers import Records, read_captioned, read_preferences
from preference_data.schemas import Pair, Record

_BINS = 10
_BAR = 30
_SIZES = 8  # most frequent sizes printed
_TILE = 192
_CAPTION = 34
_GAP = 8


@dataclass
class Findings:
    """What one pass gathers: a number or two for each record, and never an image."""

    margins: array = field(default_factory=lambda: array("d"))
    confidences: array = field(default_factory=lambda: array("d"))
    lengths: array = field(default_factory=lambda: array("l"))
    sizes: Counter[tuple[int, int]] = field(default_factory=Counter)
    prompts: Counter[bytes] = field(default_factory=Counter)  # by digest
    shown: list[tuple[int, str, list[Image.Image]]] = field(default_factory=list)  # with its place in the data
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

    def offer(self, prompt: str, images: Sequence[ImageSource], room: int) -> None:
        """Keep small copies for the sheet, so that in the end ``room`` of all that were offered, drawn alike, are kept."""
        place, self.offered = self.offered, self.offered + 1
        slot = len(self.shown) if len(self.shown) < room else self._random.randrange(self.offered)
        if slot < room:
            small = [ImageOps.contain(image.open(), (_TILE, _TILE)) for image in images]
            self.shown[slot : slot + 1] = [(place, prompt, small)]

    def drawn(self) -> list[tuple[str, list[Image.Image]]]:
        """What was kept, in the order of the data."""
        return [(prompt, images) for _, prompt, images in sorted(self.shown, key=lambda kept: kept[0])]


def gather(records: Records, strategy: str, min_margin: float, shown: int) -> tuple[Findings, PairCounts | None]:
    """One pass over the records: what was found, and what pairs they make; None for captioned images.

    An image that breaks only when its header or its pixels are looked at here joins the report's bad rows.
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
            _offer(findings, records, record.prompt, record.sources(), shown)
        return findings, None
    pairs = build_pairs(measured(), strategy, min_margin=min_margin)  # type: ignore[arg-type]
    for pair in pairs:
        findings.add_pair(pair)
        _offer(findings, records, pair.prompt, pair.sources(), shown)
    return findings, pairs.counts


def _offer(findings: Findings, records: Records, prompt: str, images: Sequence[ImageSource], room: int) -> None:
    try:
        findings.offer(prompt, images, room)
    except BadRow as error:
        records.report.skip(error)


def describe(records: Records, findings: Findings, counts: PairCounts | None, strategy: str) -> str:
    """The text that is printed."""
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
    """Spread and histogram of what the pairs have of it; nothing where no pair has any."""
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


def sheet(shown: Sequence[tuple[str, list[Image.Image]]], *, pairs: bool) -> Image.Image:
    """A contact sheet: rows of two tiles (win left, lose right) or one, each with its prompt below."""
    each = 2 if pairs else 1
    across = 3 if pairs else 6
    cell = (each * _TILE + (each - 1) * 2 + _GAP, _TILE + _CAPTION + _GAP)
    across = max(1, min(across, len(shown)))
    down = max(1, -(-len(shown) // across))
    canvas = Image.new("RGB", (across * cell[0] + _GAP, down * cell[1] + _GAP), "white")
    draw = ImageDraw.Draw(canvas)
    font = ImageFont.load_default(size=12)
    for number, (prompt, images) in enumerate(shown):
        left, top = _GAP + number % across * cell[0], _GAP + number // across * cell[1]
        for place, image in enumerate(images):
            corner = left + place * (_TILE + 2)
            canvas.paste(image, (corner + (_TILE - image.width) // 2, top + (_TILE - image.height) // 2))
            colour = ("green", "red")[place] if pairs else "grey"
            draw.rectangle((corner - 1, top - 1, corner + _TILE, top + _TILE), outline=colour)
        text = _fitting(prompt, each * _TILE, draw, font)
        draw.multiline_text((left, top + _TILE + 3), text, fill="black", font=font, spacing=2)
    return canvas


def _fitting(
    prompt: str, width: int, draw: ImageDraw.ImageDraw, font: ImageFont.FreeTypeFont | ImageFont.ImageFont
) -> str:
    """The prompt's beginning on two lines, broken between letters, as not every script has spaces."""
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
    parser = argparse.ArgumentParser(
        prog="python -m preference_data.inspect", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("path", help="a file, a folder or a hub data set")
    parser.add_argument("--format", choices=[*LAYOUTS, "captioned"], help="told from the columns, if not given")
    parser.add_argument("--split", default="train")
    parser.add_argument("--strategy", choices=STRATEGIES, default="best_worst")
    parser.add_argument("--min_margin", type=float, default=0.0)
    parser.add_argument("--trigger", help="for captioned images: a word for all of them")
    parser.add_argument("--streaming", action="store_true", help="of a hub data set: without downloading it first")
    parser.add_argument("--fast", action="store_true", help="look at the images' headers only")
    parser.add_argument("--sheet", help="write a contact sheet, PNG")
    parser.add_argument("--pairs", type=int, default=12, help="how many pairs the sheet shows, drawn from all")
    return parser.parse_args(argv)


def _open(arguments: argparse.Namespace) -> Records:
    common = {"on_bad_row": "skip", "verify_images": not arguments.fast, "streaming": arguments.streaming}
    if arguments.format == "captioned" or arguments.trigger is not None:
        return read_captioned(arguments.path, arguments.split, trigger=arguments.trigger, **common)
    try:
        return read_preferences(arguments.path, arguments.split, format=arguments.format, **common)
    except ValueError as error:
        if arguments.format is None and "holds captioned images" in str(error):
            return read_captioned(arguments.path, arguments.split, **common)
        raise


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; the exit code is 0, or 1 if nothing could be read."""
    arguments = _arguments(argv)
    try:
        records = _open(arguments)
        shown = arguments.pairs if arguments.sheet else 0
        findings, counts = gather(records, arguments.strategy, arguments.min_margin, shown)
        print(describe(records, findings, counts, arguments.strategy))
        if arguments.sheet:
            sheet(findings.drawn(), pairs=counts is not None).save(arguments.sheet)
            print(f"wrote {arguments.sheet}: {len(findings.shown)} {'pairs' if counts is not None else 'images'}")
    except (OSError, ValueError) as error:
        print(f"cannot inspect {arguments.path}: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
