"""GenEval's rules (arXiv 2310.11513, evaluation/evaluate_images.py) as functions of the detections in an image.

Nothing here looks at pixels: colours come from a callable. Each requirement of the prompt gets a grade from 0 to 1; in
GenEval an image is correct if all of them are 1.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rewards.hints import nearest

TAGS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
RELATIONS = ("left of", "right of", "above", "below")
THRESHOLD = 0.3  # lowest score of a detection
COUNTING_THRESHOLD = 0.9  # the same for prompts with the tag "counting"
MAX_OBJECTS = 16  # of one class
POSITION_MARGIN = 0.1  # of the sum of two objects' sizes

#: COCO's names of classes, by GenEval's names and by VOC's, which some detectors trained on COCO use.
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
    """An object: class, score 0 to 1, box (left, top, right, bottom) in pixels, bool mask (height, width)."""

    label: str
    score: float
    box: tuple[float, float, float, float]
    mask: np.ndarray | None = None


@dataclass(frozen=True)
class Clause:
    """What a prompt says about a class: its number and, in `include` only, colour and position.

    position: the relation to the objects of an earlier clause, and the index of that clause.
    """

    label: str
    count: int
    color: str | None = None
    position: tuple[str, int] | None = None


@dataclass(frozen=True)
class Task:
    """GenEval's metadata for a prompt."""

    tag: str
    include: tuple[Clause, ...]
    exclude: tuple[Clause, ...]

    @property
    def threshold(self) -> float:
        return COUNTING_THRESHOLD if self.tag == "counting" else THRESHOLD


def class_name(name: str) -> str:
    """Return COCO's name of a class, given any of its names."""
    return _ALIASES.get(name, name)


def _one_of(row: int, what: str, value: Any, known: Sequence[str]) -> str:
    if value in known:
        return value
    raise ValueError(f"geneval: row {row}: unknown {what} {value!r}.{nearest(str(value), known)}")


def parse_task(row: int, tag: str, include: Any, exclude: Any, classes: Sequence[str]) -> Task:
    """Read the columns of a row: GenEval's metadata, or the same as JSON text.

    Args:
        row: its number, for errors. include, exclude: lists of {class, count, color, position}; `exclude` may be None.
            A value of None is the same as a missing key, as in a table. classes: those that the detector knows.

    Raises:
        ValueError: naming the row and what is wrong.
    """
    _one_of(row, "tag", tag, TAGS)
    included = tuple(_clauses(row, "include", include, classes))
    if not included:
        raise ValueError(f"geneval: row {row}: include is empty: nothing can be graded")
    return Task(tag, included, tuple(_clauses(row, "exclude", exclude, classes)))


def _clauses(row: int, column: str, value: Any, classes: Sequence[str]) -> list[Clause]:
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError as error:
            raise ValueError(f"geneval: row {row}: {column} is not JSON: {error}") from None
    clauses: list[Clause] = []
    for entry in value if value is not None else ():
        if not isinstance(entry, Mapping) or "class" not in entry or "count" not in entry:
            raise ValueError(f"geneval: row {row}: {column} contains {entry!r}, not a mapping with class and count")
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
    """Return the detections above the threshold by class, best first, at most MAX_OBJECTS of each."""
    kept: dict[str, list[Detection]] = {}
    for detection in sorted(detections, key=lambda d: -d.score):
        of_class = kept.setdefault(detection.label, [])
        if detection.score > threshold and len(of_class) < MAX_OBJECTS:
            of_class.append(detection)
    return {label: of_class for label, of_class in kept.items() if of_class}


def relations(one: Detection, other: Detection) -> set[str]:
    """Return the position of the first object relative to the second: none, one or two of RELATIONS.

    A relation holds if the distance of the centres along its axis, less POSITION_MARGIN of the sum of the sizes, is
    more than half of the distance of the centres.
    """
    a, b = np.array(one.box, dtype=float).reshape(2, 2), np.array(other.box, dtype=float).reshape(2, 2)
    offset = a.mean(0) - b.mean(0)
    sizes = np.abs(a[1] - a[0]) + np.abs(b[1] - b[0])
    clear = np.maximum(np.abs(offset) - POSITION_MARGIN * sizes, 0) * np.sign(offset)
    if (np.abs(clear) < 1e-3).all():
        return set()
    x, y = clear / np.linalg.norm(offset)
    conditions = {"left of": x < -0.5, "right of": x > 0.5, "above": y < -0.5, "below": y > 0.5}
    return {name for name, holds in conditions.items() if holds}


ColorsOf = Callable[[Sequence[Detection]], list[str]]


def grade(task: Task, detections: Mapping[str, Sequence[Detection]], colors_of: ColorsOf) -> list[float]:
    """Grade the requirements of a task, each in [0, 1].

    A clause of `include` has one for its number (the share of the objects that were found), one for its colour (the
    share with that colour), and one for its position (the share of pairs in that relation). A clause of `exclude` has
    one: 1 with fewer than `count` objects, and less the more there are. Only the `count` best objects of a class are
    considered. A position counts 0 unless all other requirements of both clauses are met.

    Args:
        detections: as :func:`keep` returns them. colors_of: names of the colours of detections of one class.
    """
    grades: list[float] = []
    matched: list[Sequence[Detection] | None] = []  # the objects of each clause so far, None if it is not met
    for clause in task.include:
        found = list(detections.get(clause.label, ()))[: clause.count]
        clause_grades = [len(found) / clause.count]
        if clause.color is not None:
            clause_grades.append((colors_of(found).count(clause.color) if found else 0) / clause.count)
        if clause.position is not None:
            relation, index = clause.position
            target = matched[index]
            if target and min(clause_grades) == 1:
                clause_grades.append(_share_in_relation(found, target, relation))
            else:
                clause_grades.append(0.0)
        matched.append(found if min(clause_grades) == 1 else None)
        grades += clause_grades
    for clause in task.exclude:
        number = len(detections.get(clause.label, ()))
        grades.append(1.0 if number < clause.count else (clause.count - 1) / number)
    return grades


def _share_in_relation(found: Sequence[Detection], target: Sequence[Detection], relation: str) -> float:
    pairs = [relation in relations(one, other) for one in found for other in target]
    return sum(pairs) / len(pairs)
