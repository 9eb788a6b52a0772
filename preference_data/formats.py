"""The column layouts of public data sets and of one's own, and how a row of each becomes a schema.

Where a layout is public, it is as the data set's card or loading script on the hub has it: Pick-a-Pic v2
(yuvalkirstain/pickapic_v2), HPDv2 (ymhao/HPDv2), HPDv3 (MizzenAI/HPDv3), ImageRewardDB (THUDM/ImageRewardDB). Columns
beyond those named here are left alone.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from difflib import get_close_matches

from preference_data.cells import Cells
from preference_data.images import BadRow
from preference_data.rows import Row
from preference_data.schemas import BestWorst, CaptionedImage, Pair, Preference, Ranked, ReferenceWorst, at

#: Columns that hold the prompt, the first of them that is there.
PROMPT = ("prompt", "caption", "text")
#: Columns that hold the image of a captioned row.
IMAGE = ("image", "jpg", "png", "image_path", "file_path")


def _pickapic(cells: Cells) -> Preference | None:
    """Pick-a-Pic v2: labels 1 and 0, or 0.5 and 0.5 for a tie; rows without ``has_label`` were never judged.

    Labels in between, as of several annotators, are shares of votes.
    """
    if cells.has("has_label") and not cells.number("has_label"):
        return None
    labels = [cells.number(label, low=0, high=1) for label in ("label_0", "label_1")]
    if abs(sum(labels) - 1) > 1e-3:
        raise BadRow(at(cells.where, "label_0"), f"the labels {labels[0]:g} and {labels[1]:g} do not add up to 1")
    images = [cells.image("jpg_0"), cells.image("jpg_1")]
    best = int(labels[1] > labels[0])
    return Pair(
        cells.prompt(*PROMPT), images[best], images[1 - best], confidence=labels[best] / sum(labels), where=cells.where
    )


def _hpdv2(cells: Cells) -> Preference | None:
    """HPDv2: in train ``human_preference``, 1 for the preferred of two; in test ``rank``, averaged, lower is better.

    The images stand in ``image_path``, in the card's text in ``file_path``.
    """
    images = cells.images("image_path", "file_path", "image", "images")
    if cells.has("human_preference"):
        scores = cells.numbers("human_preference", low=0, high=1)
    else:
        scores = [None if rank is None else -rank for rank in cells.numbers("rank", low=0)]
    ranked = Ranked(cells.prompt(*PROMPT), images, scores, where=cells.where)
    if cells.has("human_preference") and len(images) == 2 and None not in scores:
        best = int((scores[1] or 0) > (scores[0] or 0))
        confidence = 0.5 if scores[0] == scores[1] else None
        return Pair(ranked.prompt, images[best], images[1 - best], confidence=confidence, where=cells.where)
    return ranked


def _hpdv3(cells: Cells) -> Preference | None:
    """HPDv3: ``path1`` is preferred. ``confidence`` as given, else the share of ``choice_dist``, the votes for each.

    The confidence of HPDv3 weighs annotators by how reliable they are, and is null where there was none.
    """
    confidence, annotators = cells.optional("confidence", low=0, high=1), 1
    if cells.has("choice_dist"):
        votes = [vote or 0.0 for vote in cells.numbers("choice_dist", low=0)]
        if len(votes) != 2:
            raise BadRow(at(cells.where, "choice_dist"), f"expected votes for two images, found {len(votes)}")
        total = sum(votes)
        annotators = max(1, round(total))
        if confidence is None and total:
            confidence = votes[0] / total
    first, second = cells.image("path1"), cells.image("path2")
    return Pair(cells.prompt(*PROMPT), first, second, confidence=confidence, annotators=annotators, where=cells.where)


def _imagerewarddb(cells: Cells) -> Preference | None:
    """ImageRewardDB, the rows of one prompt together: ``rank`` from 1, the best; without it ``overall_rating``, 1 to 7."""
    images = cells.images("images", "generations", "image", "image_path")
    if cells.has("rank", "ranking"):
        scores = [None if rank is None else -rank for rank in cells.numbers("rank", "ranking", low=1)]
    else:
        scores = cells.numbers("overall_rating", low=1, high=7)
    return Ranked(cells.prompt(*PROMPT), images, scores, where=cells.where)


def _pairs(cells: Cells) -> Preference | None:
    """TRL's ``prompt``, ``chosen``, ``rejected``, with ``margin`` or both scores, and ``confidence``, where there are."""
    margin = cells.optional("margin")
    if margin is None and cells.has("chosen_score") and cells.has("rejected_score"):
        margin = cells.number("chosen_score") - cells.number("rejected_score")
    return Pair(
        cells.prompt(*PROMPT),
        cells.image("chosen"),
        cells.image("rejected"),
        margin=margin,
        confidence=cells.optional("confidence", low=0, high=1),
        annotators=round(cells.optional("annotators", low=1) or 1),
        where=cells.where,
    )


def _ranked(cells: Cells) -> Preference | None:
    """``prompt``, ``images``, ``scores``: higher is better, null is not scored. What the writer writes."""
    return Ranked(cells.prompt(*PROMPT), cells.images("images"), cells.numbers("scores"), where=cells.where)


def _best_worst(cells: Cells) -> Preference | None:
    """``prompt``, ``images`` and the indices (from 0) of ``best`` and ``worst``."""
    best, worst = cells.index("best"), cells.index("worst")
    return BestWorst(cells.prompt(*PROMPT), cells.images("images"), best, worst, where=cells.where)


def _reference_worst(cells: Cells) -> Preference | None:
    """``prompt``, a ``reference`` image, ``images`` and the index (from 0) of the ``worst``."""
    images, worst = cells.images("images"), cells.index("worst")
    return ReferenceWorst(cells.prompt(*PROMPT), cells.image("reference"), images, worst, where=cells.where)


@dataclass(frozen=True)
class Layout:
    """A column layout. required: of each of these, one column must be there. build: None for a row without a judgement.

    by_prompt: rows with one image each, of which those of one ``prompt_id`` belong together.
    """

    name: str
    required: tuple[tuple[str, ...], ...]
    build: Callable[[Cells], Preference | None]
    by_prompt: bool = False

    def lacking(self, columns: list[str]) -> list[tuple[str, ...]]:
        return [names for names in self.required if not set(names) & set(columns)]


#: In the order in which they are tried: a layout that another one's columns would satisfy comes later.
LAYOUTS = {
    layout.name: layout
    for layout in (
        Layout("pickapic", (PROMPT, ("jpg_0",), ("jpg_1",), ("label_0",), ("label_1",)), _pickapic),
        Layout("hpdv3", (PROMPT, ("path1",), ("path2",)), _hpdv3),
        Layout("reference_worst", (PROMPT, ("reference",), ("images",), ("worst",)), _reference_worst),
        Layout("best_worst", (PROMPT, ("images",), ("best",), ("worst",)), _best_worst),
        Layout("pairs", (PROMPT, ("chosen",), ("rejected",)), _pairs),
        Layout("ranked", (PROMPT, ("images",), ("scores",)), _ranked),
        Layout(
            "imagerewarddb",
            (
                PROMPT,
                ("image", "image_path", "images", "generations"),
                ("rank", "ranking", "overall_rating"),
                ("prompt_id", "generations"),
            ),
            _imagerewarddb,
            by_prompt=True,
        ),
        Layout(
            "hpdv2",
            (PROMPT, ("image_path", "file_path", "images", "image"), ("human_preference", "rank")),
            _hpdv2,
        ),
    )
}
_CAPTIONED = (IMAGE, PROMPT)


def find_layout(columns: list[str], source: str, name: str | None = None) -> Layout:
    """The layout of that name, or else the one that the columns fit.

    Raises:
        ValueError: an unknown name; columns that fit none, or not the one asked for. It says what was found, which
            layout is nearest, and what that one lacks.
    """
    if name is not None and name not in LAYOUTS:
        close = get_close_matches(name, LAYOUTS, n=1, cutoff=0.5)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"unknown format {name!r}.{hint} There are: {', '.join(LAYOUTS)}")
    tried = [LAYOUTS[name]] if name is not None else list(LAYOUTS.values())
    for layout in tried:
        if not layout.lacking(columns):
            return layout
    if name is None and all(set(names) & set(columns) for names in _CAPTIONED):
        raise ValueError(
            f"{source} holds captioned images, for read_captioned, not preferences: it has the columns {columns}"
        )
    nearest = min(tried, key=lambda layout: len(layout.lacking(columns)) / len(layout.required))
    lacking = nearest.lacking(columns)
    close = get_close_matches(lacking[0][0], columns, n=1, cutoff=0.5)
    hint = f" Did you mean to rename {close[0]!r}?" if close else ""
    asked = (
        f"is not of the format {name!r}, which" if name else f"is of no known format; the nearest, {nearest.name!r},"
    )
    names = " and ".join(" or ".join(map(repr, names)) for names in lacking)
    raise ValueError(f"{source} {asked} needs the column {names}. It has the columns {columns}.{hint}")


def by_prompt(rows: Iterator[Row | BadRow]) -> Iterator[Row | BadRow]:
    """Rows with one image each, joined into one row for each ``prompt_id``; rows with lists pass through.

    The rows of a prompt must stand together, as in the published files: to gather them from everywhere, the whole set
    would have to fit in memory. A prompt that comes up again later is a BadRow.
    """
    group: list[Cells] = []
    seen: set[object] = set()

    def joined() -> Row:
        first, last = group[0], group[-1]
        values = {"prompt": first.row.values.get("prompt"), "images": [cells.values["image"] for cells in group]}
        for column in ("rank", "overall_rating"):
            if all(cells.has(column) for cells in group):
                values[column] = [cells.values[column] for cells in group]
        where = first.where if len(group) == 1 else f"{first.where} to {last.where.rpartition(' ')[2]}"
        return Row(where, values, first.row.folder)

    for row in rows:
        if isinstance(row, BadRow):
            yield row
            continue
        cells = Cells(row)
        if "prompt_id" not in row.values or cells.has("generations") or cells.is_list("image", "image_path", "images"):
            yield row
            continue
        key = row.values["prompt_id"]
        if group and key != group[0].values["prompt_id"]:
            yield joined()
            group = []
        if not group and key in seen:
            yield BadRow(at(row.where, "prompt_id"), f"the rows of {key!r} do not stand together: sort them by it")
            continue
        try:
            image = cells.image("image", "image_path")
            image.check()
        except BadRow as error:  # it costs its own row, not its neighbours
            yield error
            continue
        seen.add(key)
        group.append(Cells(Row(row.where, {**row.values, "image": image}, row.folder)))
    if group:
        yield joined()


def captioned(row: Row, trigger: str | None) -> CaptionedImage:
    """A captioned image; ``trigger`` is put before the caption, and stands alone where there is none or an empty one.

    Raises:
        BadRow: no caption or an empty one and no trigger, or no image.
    """
    cells = Cells(row)
    image = cells.image(*IMAGE)
    if trigger is None:
        if not cells.has(*PROMPT):
            raise BadRow(row.where, "the image has no caption: give it one, or give all of them a trigger word")
        return CaptionedImage(cells.prompt(*PROMPT), image, where=row.where)
    prompt = trigger if cells.is_blank(*PROMPT) else f"{trigger}, {cells.prompt(*PROMPT)}"
    return CaptionedImage(prompt, image, where=row.where)
