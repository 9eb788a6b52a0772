"""GenEval's rules (arXiv 2310.11513, evaluation/evaluate_images.py) as functions of what was detected in an image.

Nothing here looks at pixels: colours come from a callable. Every rule grades a part of the prompt between 0 and 1;
the strict verdict of GenEval is that all of them are 1.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

import numpy as np

TAGS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
RELATIONS = ("left of", "right of", "above", "below")
THRESHOLD = 0.3  # least score of a detection
COUNTING_THRESHOLD = 0.9  # the same for prompts with the tag "counting"
MAX_OBJECTS = 16  # of one class
POSITION_MARGIN = 0.1  # of the sum of two objects' sizes

#: Names of one class: GenEval's own, and those of detectors trained on COCO under VOC's names, to COCO's.
_ALIASES = {
    "computer mouse": "mouse",
    "tv remote": "remote",
    "computer keyboard": "keyboard",
    "motorbike": "motorcycle",
    "aeroplane": "airplane",
    "sofa": "couch",
    "pottedplant": "potted plant",
    "diningtable": "dining table",
    "tvmonitor": "tv",
    "hair dryer": "hair drier",
}


@dataclass(frozen=True)
class Detection:
    """One object: its class, score 0 to 1, box (left, top, right, bottom) in pixels, mask (height, width) of bool."""

    label: str
    score: float
    box: tuple[float, float, float, float]
    mask: np.ndarray | None = None


@dataclass(frozen=True)
class Clause:
    """What a prompt says of one class: how many, and for what is included the colour and the place.

    position: the relation to the objects of an earlier clause, and the index of that clause.
    """

    label: str
    count: int
    color: str | None = None
    position: tuple[str, int] | None = None


@dataclass(frozen=True)
class Task:
    """GenEval's metadata of one prompt."""

    tag: str
    include: tuple[Clause, ...]
    exclude: tuple[Clause, ...]

    @property
    def threshold(self) -> float:
        return COUNTING_THRESHOLD if self.tag == "counting" else THRESHOLD


def class_name(name: str) -> str:
    """COCO's name of a class, whichever of its names is given."""
    return _ALIASES.get(name, name)


def _one_of(row: int, what: str, value: Any, known: Sequence[str]) -> str:
    if value in known:
        return value
    close = get_close_matches(str(value), known, n=1, cutoff=0.5)
    hint = f"did you mean {close[0]!r}?" if close else f"there are: {', '.join(known)}"
    raise ValueError(f"geneval: row {row}: unknown {what} {value!r}; {hint}")


def parse_task(row: int, tag: str, include: Any, exclude: Any, classes: Sequence[str]) -> Task:
    """Read the columns of a row, as GenEval's metadata or as JSON text of it; ValueError names what is wrong.

    Args:
        row: number for the error. include, exclude: lists of {class, count, color, position}, `exclude` may be None;
            None stands for a key that is not there, as in a table. classes: those the detector knows.
    """
    _one_of(row, "tag", tag, TAGS)
    wanted = tuple(_clauses(row, "include", include, classes))
    if not wanted:
        raise ValueError(f"geneval: row {row}: include is empty: nothing can be graded")
    return Task(tag, wanted, tuple(_clauses(row, "exclude", exclude, classes)))


def _clauses(row: int, column: str, value: Any, classes: Sequence[str]) -> list[Clause]:
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError as error:
            raise ValueError(f"geneval: row {row}: {column} is no JSON: {error}") from None
    clauses: list[Clause] = []
    for entry in value if value is not None else ():
        if not isinstance(entry, Mapping) or "class" not in entry or "count" not in entry:
            raise ValueError(f"geneval: row {row}: {column} holds {entry!r}, not a mapping with class and count")
        label = _one_of(row, "class", class_name(entry["class"]), classes)
        count, color, position = entry["count"], entry.get("color"), entry.get("position")
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            raise ValueError(f"geneval: row {row}: the count of {label!r} must be 1 or more, found {count!r}")
        if color is not None:
            _one_of(row, "color", color, COLORS)
        clauses.append(Clause(label, count, color, _position(row, position, len(clauses))))
    return clauses


def _position(row: int, value: Any, earlier: int) -> tuple[str, int] | None:
    if value is None:
        return None
    if isinstance(value, str) or len(value) != 2 or not str(value[1]).isdigit() or int(value[1]) >= earlier:
        raise ValueError(
            f"geneval: row {row}: position must be [relation, index of an earlier entry of include], found {value!r}"
        )
    return _one_of(row, "relation", value[0], RELATIONS), int(value[1])


def keep(detections: Sequence[Detection], threshold: float) -> dict[str, list[Detection]]:
    """What counts as seen: by class, the detections scored above the threshold, best first, MAX_OBJECTS at most."""
    kept: dict[str, list[Detection]] = {}
    for found in sorted(detections, key=lambda d: -d.score):
        same = kept.setdefault(found.label, [])
        if found.score > threshold and len(same) < MAX_OBJECTS:
            same.append(found)
    return {label: same for label, same in kept.items() if same}


def relations(one: Detection, other: Detection) -> set[str]:
    """Where the first object is, seen from the second: none, one or two of RELATIONS.

    The distance of the middles, less POSITION_MARGIN of the sum of the sizes, must be more than half of the whole
    distance along an axis.
    """
    a, b = np.array(one.box, dtype=float).reshape(2, 2), np.array(other.box, dtype=float).reshape(2, 2)
    offset = a.mean(0) - b.mean(0)
    sizes = np.abs(a[1] - a[0]) + np.abs(b[1] - b[0])
    clear = np.maximum(np.abs(offset) - POSITION_MARGIN * sizes, 0) * np.sign(offset)
    if (np.abs(clear) < 1e-3).all():
        return set()
    x, y = clear / np.linalg.norm(offset)
    holds = {"left of": x < -0.5, "right of": x > 0.5, "above": y < -0.5, "below": y > 0.5}
    return {name for name, true in holds.items() if true}


ColorsOf = Callable[[Sequence[Detection]], list[str]]


def grade(task: Task, seen: Mapping[str, Sequence[Detection]], colors_of: ColorsOf) -> list[float]:
    """Grades of the parts of a task, each in [0, 1].

    For each clause of include: the share of its objects that are there; with a colour the share that has it; with a
    position the share of pairs so placed. For each of exclude: 1, or less the more there are. Only the best-scored
    `count` objects of a class are looked at. A place is graded only where both clauses hold so far, else it is 0.

    Args:
        seen: as :func:`keep` gives it. colors_of: names of the colours of detections of one class.
    """
    grades: list[float] = []
    matched: list[Sequence[Detection] | None] = []
    for clause in task.include:
        found = list(seen.get(clause.label, ()))[: clause.count]
        own = [len(found) / clause.count]
        if clause.color is not None:
            own.append((colors_of(found).count(clause.color) if found else 0) / clause.count)
        if clause.position is not None:
            relation, index = clause.position
            target = matched[index]
            own.append(_placed(found, target, relation) if target and min(own) == 1 else 0.0)
        matched.append(found if min(own) == 1 else None)
        grades += own
    for clause in task.exclude:
        number = len(seen.get(clause.label, ()))
        grades.append(1.0 if number < clause.count else (clause.count - 1) / number)
    return grades


def _placed(found: Sequence[Detection], target: Sequence[Detection], relation: str) -> float:
    pairs = [relation in relations(one, other) for one in found for other in target]
    return sum(pairs) / len(pairs)
