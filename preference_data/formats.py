"""The known column layouts, and how a row of each becomes an object of :mod:`preference_data.schemas`.

Some are our own; the others follow the card or loading script of a public data set on the hub: Pick-a-Pic v2
(yuvalkirstain/pickapic_v2), HPDv2 (ymhao/HPDv2), HPDv3 (MizzenAI/HPDv3), ImageRewardDB (THUDM/ImageRewardDB). Columns
that are not named here are ignored.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from preference_data.cells import Cells
from preference_data.hints import did_you_mean, nearest
from preference_data.images import BadRow
from preference_data.places import shortened
from preference_data.rows import Row
from preference_data.schemas import BestWorst, CaptionedImage, Pair, Preference, Ranked, ReferenceWorst, in_column

#: Columns that may hold the prompt; the first one that exists is used.
PROMPT = ("prompt", "caption", "text")
#: Columns that may hold the image of a captioned row; the first one that exists is used.
IMAGE = ("image", "jpg", "png", "image_path", "file_path")
#: Columns of a vote on two images, and what stands for the first, the second and neither of them.
_FIRST, _SECOND = ("image_a", "image_1", "left"), ("image_b", "image_2", "right")
_WINNER = ("winner", "preference", "vote")
_SIDES, _TIES = (("a", "left"), ("b", "right")), ("tie", "draw", "both", "neither", "equal")


def _pickapic(cells: Cells) -> Preference | None:
    """Read Pick-a-Pic v2: labels 1 and 0, or 0.5 and 0.5 for a tie.

    Other labels, as several annotators give them, are shares of votes. A row whose ``has_label`` is false was never
    judged.
    """
    if cells.has("has_label") and not cells.number("has_label"):
        return None
    labels = [cells.number(label, low=0, high=1) for label in ("label_0", "label_1")]
    if abs(sum(labels) - 1) > 1e-3:
        raise BadRow(
            in_column(cells.where, "label_0"), f"the labels {labels[0]:g} and {labels[1]:g} do not add up to 1"
        )
    images = [cells.image("jpg_0"), cells.image("jpg_1")]
    best = int(labels[1] > labels[0])
    return Pair(
        cells.prompt(*PROMPT), images[best], images[1 - best], confidence=labels[best] / sum(labels), where=cells.where
    )


def _hpdv2(cells: Cells) -> Preference | None:
    """Read HPDv2.

    The split train has ``human_preference``, 1 for the preferred one of two images; test has ``rank``, an average,
    lower is better. The images are in ``image_path``, which the data set's card calls ``file_path``.
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
    """Read HPDv3, where ``path1`` is the preferred image.

    The confidence is the data set's, which weights annotators by their reliability; where it is null, the share of the
    votes in ``choice_dist``.
    """
    confidence, annotators = cells.optional("confidence", low=0, high=1), 1
    if cells.has("choice_dist"):
        votes = [vote or 0.0 for vote in cells.numbers("choice_dist", low=0)]
        if len(votes) != 2:
            raise BadRow(in_column(cells.where, "choice_dist"), f"expected votes for two images, found {len(votes)}")
        total = sum(votes)
        annotators = max(1, round(total))
        if confidence is None and total:
            confidence = votes[0] / total
    first, second = cells.image("path1"), cells.image("path2")
    return Pair(cells.prompt(*PROMPT), first, second, confidence=confidence, annotators=annotators, where=cells.where)


def _imagerewarddb(cells: Cells) -> Preference | None:
    """Read ImageRewardDB, the rows of one prompt joined: ``rank`` (1 is the best), else ``overall_rating`` (1 to 7)."""
    images = cells.images("images", "generations", "image", "image_path")
    if cells.has("rank", "ranking"):
        scores = [None if rank is None else -rank for rank in cells.numbers("rank", "ranking", low=1)]
    else:
        scores = cells.numbers("overall_rating", low=1, high=7)
    return Ranked(cells.prompt(*PROMPT), images, scores, where=cells.where)


def _pairs(cells: Cells) -> Preference | None:
    """Read TRL's ``prompt``, ``chosen``, ``rejected``.

    Optional are ``margin`` or both of ``chosen_score`` and ``rejected_score``, ``confidence``, and ``annotators``.
    """
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


def _votes(cells: Cells) -> Preference | None:
    """Read a table of votes: two images, and which one won: A or B, the name of its column, or a tie."""
    names: list[str] = [next(filter(cells.has, group)) for group in (_FIRST, _SECOND) if cells.has(*group)]
    column = next(name for name in _WINNER if name in cells.values)
    winner = str(cells.values[column] if cells.values[column] is not None else "").strip().lower()
    if not winner:
        return None  # nobody voted
    for group in (_FIRST, _SECOND):
        if not cells.has(*group):
            raise BadRow(in_column(cells.where, group[0]), "a vote needs two images")
    images = [cells.image(name) for name in names]
    if winner in _TIES:
        return Pair(cells.prompt(*PROMPT), images[0], images[1], confidence=0.5, where=cells.where)
    in_file = cells.row.named_in_file
    wins = [
        winner in (*known, name.lower(), name[-1], in_file.get(name, name).lower())
        for known, name in zip(_SIDES, names, strict=True)
    ]
    if wins not in ([True, False], [False, True]):
        raise BadRow(
            in_column(cells.where, column),
            f"expected A, B, a tie or the name of a column, found {shortened(winner, 40)!r}",
        )
    best = wins.index(True)
    return Pair(cells.prompt(*PROMPT), images[best], images[1 - best], where=cells.where)


def _ranked(cells: Cells) -> Preference | None:
    """Read ``prompt``, ``images``, ``scores``, as the writer writes them: higher is better, null is not scored."""
    return Ranked(cells.prompt(*PROMPT), cells.images("images"), cells.numbers("scores"), where=cells.where)


def _best_worst(cells: Cells) -> Preference | None:
    """Read ``prompt``, ``images`` and the indices ``best`` and ``worst``, from 0."""
    best, worst = cells.index("best"), cells.index("worst")
    return BestWorst(cells.prompt(*PROMPT), cells.images("images"), best, worst, where=cells.where)


def _reference_worst(cells: Cells) -> Preference | None:
    """Read ``prompt``, a ``reference`` image, ``images`` and the index ``worst``, from 0."""
    images, worst = cells.images("images"), cells.index("worst")
    return ReferenceWorst(cells.prompt(*PROMPT), cells.image("reference"), images, worst, where=cells.where)


@dataclass(frozen=True)
class Layout:
    """A column layout.

    required: groups of names; of each group one column must exist. build: makes a preference of a row, or None of a row
    that nobody judged. one_image_rows: each row has one image, and those with the same ``prompt_id`` are joined.
    """

    name: str
    required: tuple[tuple[str, ...], ...]
    build: Callable[[Cells], Preference | None]
    one_image_rows: bool = False

    def missing(self, columns: list[str]) -> list[tuple[str, ...]]:
        """Return the groups of names of which ``columns`` has none."""
        return [names for names in self.required if not set(names) & set(columns)]


#: In the order in which they are tried. A layout that the columns of another one satisfy too comes after it.
LAYOUTS = {
    layout.name: layout
    for layout in (
        Layout("pickapic", (PROMPT, ("jpg_0",), ("jpg_1",), ("label_0",), ("label_1",)), _pickapic),
        Layout("hpdv3", (PROMPT, ("path1",), ("path2",)), _hpdv3),
        Layout("reference_worst", (PROMPT, ("reference",), ("images",), ("worst",)), _reference_worst),
        Layout("best_worst", (PROMPT, ("images",), ("best",), ("worst",)), _best_worst),
        Layout("pairs", (PROMPT, ("chosen",), ("rejected",)), _pairs),
        Layout("votes", (PROMPT, _FIRST, _SECOND, _WINNER), _votes),
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
            one_image_rows=True,
        ),
        Layout(
            "hpdv2",
            (PROMPT, ("image_path", "file_path", "images", "image"), ("human_preference", "rank")),
            _hpdv2,
        ),
    )
}
_CAPTIONED = (IMAGE, PROMPT)


class CaptionedNotPreferences(ValueError):
    """The columns are those of captioned images, not of preferences."""


def find_layout(columns: list[str], source: str, name: str | None = None) -> Layout:
    """Return the layout of that name, or else the first one that the columns fit.

    Raises:
        ValueError: an unknown name, or columns that do not fit. The message says what was found, which layout is
            nearest, and which columns it needs. :class:`CaptionedNotPreferences` where they fit captioned images.
    """
    if name is not None and name not in LAYOUTS:
        raise ValueError(f"unknown format {name!r}.{nearest(name, LAYOUTS)}")
    candidates = [LAYOUTS[name]] if name is not None else list(LAYOUTS.values())
    for layout in candidates:
        if not layout.missing(columns):
            return layout
    if name is None and all(set(names) & set(columns) for names in _CAPTIONED):
        raise CaptionedNotPreferences(
            f"{source} holds captioned images, not preferences: read it with read_captioned. It has the columns {columns}."
        )
    closest = min(candidates, key=lambda layout: len(layout.missing(columns)) / len(layout.required))
    missing = closest.missing(columns)
    problem = f"does not have the format {name!r}, which"
    if name is None:
        problem = f"has no known format; the nearest one, {closest.name!r},"
    needed = " and ".join(" or ".join(map(repr, names)) for names in missing)
    unused = [column for column in columns if not any(column in names for names in closest.required)]
    hint = did_you_mean(missing[0][0], unused, "Did you mean to rename")
    raise ValueError(f"{source} {problem} needs the column {needed}. It has the columns {columns}.{hint}")


def join_one_image_rows(rows: Iterator[Row | BadRow]) -> Iterator[Row | BadRow]:
    """Join consecutive rows with one image each and the same ``prompt_id`` into one row.

    Rows that hold a list of images pass through. The rows of a prompt must follow each other, as in the published
    files: gathering them from the whole data set would need memory for all of it. A prompt that appears again later is
    yielded as a BadRow.
    """
    group: list[Cells] = []
    seen: set[object] = set()
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
            yield _join(group)
            group = []
        if not group and key in seen:
            yield BadRow(
                in_column(row.where, "prompt_id"),
                f"the rows of {key!r} do not follow each other: sort the data by this column",
            )
            continue
        try:
            image = cells.image("image", "image_path")
            image.check()
        except BadRow as error:  # only this row is lost, not the others of its prompt
            yield error
            continue
        seen.add(key)
        group.append(Cells(Row(row.where, {**row.values, "image": image}, row.folder)))
    if group:
        yield _join(group)


def _join(group: list[Cells]) -> Row:
    """Make one row of the rows of a prompt; a judgement that not all of them have is left out."""
    first, last = group[0], group[-1]
    values = {"prompt": first.row.values.get("prompt"), "images": [cells.values["image"] for cells in group]}
    for column in ("rank", "overall_rating"):
        if all(cells.has(column) for cells in group):
            values[column] = [cells.values[column] for cells in group]
    where = first.where if len(group) == 1 else f"{first.where} to {last.where.rpartition(' ')[2]}"
    return Row(where, values, first.row.folder)


def captioned(row: Row, trigger: str | None) -> CaptionedImage:
    """Make a captioned image of a row.

    Args:
        trigger: a word that is put before the caption, and is the caption where there is none or an empty one.

    Raises:
        BadRow: no image, or neither a caption nor a trigger.
    """
    cells = Cells(row)
    image = cells.image(*IMAGE)
    if trigger is None:
        if not cells.has(*PROMPT):
            raise BadRow(row.where, "the image has no caption: write one, or set a trigger word for all images")
        return CaptionedImage(cells.prompt(*PROMPT), image, where=row.where, origin=row.caption_from)
    if cells.is_blank(*PROMPT):
        return CaptionedImage(trigger, image, where=row.where, origin="the trigger alone")
    return CaptionedImage(f"{trigger}, {cells.prompt(*PROMPT)}", image, where=row.where, origin=row.caption_from)
