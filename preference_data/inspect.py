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
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont, ImageOps
from tqdm import tqdm

from preference_data.account import Account
from preference_data.buckets import Bucket, make_buckets, nearest_bucket
from preference_data.formats import LAYOUTS, CaptionedNotPreferences
from preference_data.images import BadRow, ImageSource
from preference_data.pairs import STRATEGIES, PairCounts, build_pairs
from preference_data.readers import read_captioned, read_preferences
from preference_data.records import Records
from preference_data.schemas import CaptionedImage, Pair, Record
from preference_data.sources import parse_columns

_BINS = 10  # of a histogram
_CELL = 16  # pixels of a latent token
_BAR = 30  # characters
_SIZES = 8  # most frequent image sizes printed
# Pixels of the sheet.
_TILE = 192
_CAPTION = 34
_GAP = 8


#: Of a prompt: how many tokens it has, and how many are read.
Tokens = Callable[[str], tuple[int, int]]


@dataclass
class Findings:
    """What a pass over the data set gathers: a few numbers for each record, and small copies of some images."""

    margins: array = field(default_factory=lambda: array("d"))
    confidences: array = field(default_factory=lambda: array("d"))
    lengths: array = field(default_factory=lambda: array("l"))
    sizes: Counter[tuple[int, int]] = field(default_factory=Counter)
    prompts: Counter[bytes] = field(default_factory=Counter)  # by digest
    verdicts: dict[bytes, Counter[bool]] = field(default_factory=dict)  # of each pair of images, by which one is chosen
    account: Account = field(default_factory=lambda: Account("trained on"))
    buckets: list[Bucket] = field(default_factory=list)
    tokens: Tokens | None = None
    files: list[Path] = field(default_factory=list)
    sampled: list[tuple[int, str, list[Image.Image]]] = field(default_factory=list)  # index in the data, prompt, images
    offered: int = 0
    _random: random.Random = field(default_factory=lambda: random.Random(0))

    def add_record(self, record: Record) -> None:
        sizes = [image.size() for image in record.sources()]  # first, as a record with a broken image is none
        self.lengths.append(len(record.prompt))
        self.prompts[_short(record.prompt.encode())] += 1
        self.files += [image.path for image in record.sources() if image.path is not None]
        self.sizes.update(sizes)
        if self.tokens is not None:
            self.account.count_tokens(*self.tokens(record.prompt))
        if isinstance(record, CaptionedImage):
            self._train(record.origin, record.sources())

    def _train(self, origin: str, images: Sequence[ImageSource]) -> None:
        """Count what becomes of the images of an example in training."""
        self.account.add(origin, images, nearest_bucket(*images[0].size(), self.buckets))

    def add_pair(self, pair: Pair) -> None:
        self._train("", pair.sources())
        looks = [_short(pair.prompt.encode() + image.looked_at()) for image in pair.sources()]
        chosen_first = looks[0] < looks[1]
        self.verdicts.setdefault(b"".join(sorted(looks)), Counter())[chosen_first] += pair.annotators
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


def gather(
    records: Records,
    strategy: str,
    min_margin: float,
    sheet_size: int,
    resolution: int,
    tokens: Tokens | None = None,
) -> tuple[Findings, PairCounts | None]:
    """Read all records once, and return what was found and the counts of their pairs, None for captioned images.

    An image that turns out to be broken is added to the bad rows of the records' report. ``resolution``: that the data
    would be trained at. ``tokens``: of the model that would be.
    """
    findings = Findings(buckets=make_buckets(resolution, _CELL), tokens=tokens)
    captioned = records.format == "captioned"

    def measured() -> Iterator[Record]:
        for record in tqdm(records, desc="reading", unit=" records", file=sys.stderr):
            try:
                findings.add_record(record)
            except BadRow as error:
                records.report.take_back(record, error)
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


def _short(content: bytes) -> bytes:
    return blake2b(content, digest_size=8).digest()


def _sample(findings: Findings, records: Records, prompt: str, images: Sequence[ImageSource], size: int) -> None:
    try:
        findings.sample(prompt, images, size)
    except BadRow as error:
        records.report.skip(error)


def describe(records: Records, findings: Findings, counts: PairCounts | None, strategy: str) -> str:
    """Return the text that is printed."""
    findings.account.leave_out_of(records, findings.files)
    lines = [str(records.report)]
    if counts is not None:
        lines.append(f"pairs ({strategy}): {counts}")
    lines += findings.account.lines()
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
    return "\n".join(lines + agreement(findings.verdicts))


def agreement(verdicts: Mapping[bytes, Counter[bool]]) -> list[str]:
    """Say how many pairs are judged several times, and how the votes on them agree."""
    repeated = [votes for votes in verdicts.values() if votes.total() > 1]
    if not repeated:
        return []
    contradicted = sum(len(votes) > 1 for votes in repeated)
    agreeing = sum(n * (n - 1) for votes in repeated for n in votes.values())
    couples = sum(votes.total() * (votes.total() - 1) for votes in repeated)
    return [
        f"pairs judged several times: {len(repeated)} of {len(verdicts)}, {contradicted} of them both ways; two votes on one "
        f"pair agree in {agreeing / couples:.0%} (merge_annotators takes the majority)"
    ]


def shared_prompts(findings: Findings, others: Records, split: str) -> str:
    """Say how many prompts of another split are among these."""
    prompts = {_short(record.prompt.encode()) for record in others}
    shared = len(prompts & findings.prompts.keys())
    return f"prompts of the split {split}: {len(prompts)} distinct, {shared} of them among these"


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


def _arguments(argv: Sequence[str] | None, knows_models: bool) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="flow-align inspect", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("path", help="a file, a folder or a hub data set")
    parser.add_argument("--format", choices=[*LAYOUTS, "captioned"], help="default: found from the columns")
    parser.add_argument("--split", default="train")
    parser.add_argument("--strategy", choices=STRATEGIES, default="best_worst")
    parser.add_argument("--min_margin", type=float, default=0.0)
    parser.add_argument(
        "--resolution", type=int, default=1024, help="pixels; buckets and cropping are those of training at it"
    )
    if knows_models:
        parser.add_argument("--model", help="count the tokens of the prompts, and those that this model would cut")
    parser.add_argument("--compare", metavar="SPLIT", help="count the prompts that another split has too")
    parser.add_argument("--columns", nargs="+", default=[], metavar="NAME=COLUMN", help="the data's names of columns")
    parser.add_argument("--image_folder", help="where relative paths of images start and all images lie")
    parser.add_argument("--trigger", help="for captioned images: a word that is put before every caption")
    parser.add_argument("--streaming", action="store_true", help="read a hub data set without downloading it first")
    parser.add_argument("--fast", action="store_true", help="read only the images' headers")
    parser.add_argument("--sheet", help="write a contact sheet, PNG")
    parser.add_argument("--pairs", type=int, default=12, help="how many random pairs the sheet shows")
    return parser.parse_args(argv)


def _open(arguments: argparse.Namespace, split: str) -> Records:
    common = {
        "on_bad_row": "skip",
        "verify_images": not arguments.fast,
        "streaming": arguments.streaming,
        "columns": parse_columns(arguments.columns) or None,
        "image_folder": arguments.image_folder,
    }
    if arguments.format == "captioned" or arguments.trigger is not None:
        return read_captioned(arguments.path, split, trigger=arguments.trigger, **common)
    try:
        return read_preferences(arguments.path, split, format=arguments.format, **common)
    except CaptionedNotPreferences:
        return read_captioned(arguments.path, split, **common)
    except ValueError as error:
        try:  # a file of preferences is looked for first, and images with captions may lie beside another one
            return read_captioned(arguments.path, split, **common)
        except ValueError:
            raise error from None


def main(argv: Sequence[str] | None = None, tokens_of: Callable[[str], Tokens] | None = None) -> int:
    """Run the command, and return its exit code: 0, or 1 if nothing could be read.

    ``tokens_of``: how the model of a name reads prompts, for the option ``--model``; without it there is none.
    """
    arguments = _arguments(argv, tokens_of is not None)
    try:
        tokens = tokens_of(arguments.model) if tokens_of is not None and arguments.model is not None else None
        records = _open(arguments, arguments.split)
        sheet_size = arguments.pairs if arguments.sheet else 0
        findings, counts = gather(
            records, arguments.strategy, arguments.min_margin, sheet_size, arguments.resolution, tokens
        )
        print(describe(records, findings, counts, arguments.strategy))
        if not findings.account.examples:
            print(f"cannot inspect {arguments.path}: no row of it can be used", file=sys.stderr)
            return 1
        if arguments.compare:
            print(shared_prompts(findings, _open(arguments, arguments.compare), arguments.compare))
        if arguments.sheet:
            sheet(findings.in_order(), pairs=counts is not None).save(arguments.sheet)
            print(f"wrote {arguments.sheet}: {len(findings.sampled)} {'pairs' if counts is not None else 'images'}")
    except (OSError, ValueError) as error:
        print(f"cannot inspect {arguments.path}: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
