"""What a GenEval record asks of a picture, and how the objects found in it score.

Formulas of djghosh13/geneval (arXiv 2310.11513) and of the reward server of Flow-GRPO (arXiv 2505.05470), on what a detector
found. Nothing here knows of models or tensors.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from ..errors import InputError
from ..prompts.prompt import data_of
from ..text.user_text import shown

# fmt: off
CLASSES = (
    "person", "bicycle", "car", "motorcycle", "airplane", "bus", "train", "truck", "boat", "traffic light", "fire hydrant",
    "stop sign", "parking meter", "bench", "bird", "cat", "dog", "horse", "sheep", "cow", "elephant", "bear", "zebra",
    "giraffe", "backpack", "umbrella", "handbag", "tie", "suitcase", "frisbee", "skis", "snowboard", "sports ball", "kite",
    "baseball bat", "baseball glove", "skateboard", "surfboard", "tennis racket", "bottle", "wine glass", "cup", "fork",
    "knife", "spoon", "bowl", "banana", "apple", "sandwich", "orange", "broccoli", "carrot", "hot dog", "pizza", "donut",
    "cake", "chair", "couch", "potted plant", "bed", "dining table", "toilet", "tv", "laptop", "computer mouse", "tv remote",
    "computer keyboard", "cell phone", "microwave", "oven", "toaster", "sink", "refrigerator", "book", "clock", "vase",
    "scissors", "teddy bear", "hair drier", "toothbrush",
)
# fmt: on
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
RELATIONS = ("left of", "right of", "above", "below")
COUNTING = "counting"
MAX_OBJECTS = 16
_POSITION_THRESHOLD, _DIRECTION, _NOWHERE = 0.1, 0.5, 1e-3


@dataclasses.dataclass(frozen=True)
class Clause:
    """Objects that shall be in the picture.

    Attributes:
        name: one of ``CLASSES``.
        count: how many.
        colour: of them all; None is any.
        relation: one of ``RELATIONS``, in which each of them stands to each object of an earlier clause; None is anywhere.
        target: place of that clause.
    """

    name: str
    count: int
    colour: str | None = None
    relation: str | None = None
    target: int = 0


@dataclasses.dataclass(frozen=True)
class Record:
    """What a prompt asks for.

    Attributes:
        tag: the task; ``counting`` has a threshold of its own.
        include: clauses that shall all hold.
        exclude: none of which shall hold; Flow-GRPO does not read them.
    """

    tag: str
    include: tuple[Clause, ...]
    exclude: tuple[Clause, ...] = ()


@dataclasses.dataclass(frozen=True)
class Found:
    """An object that was found: corners (x0, y0, x1, y1) in pixels, y downwards, and its colour where one was asked for."""

    box: tuple[float, float, float, float]
    colour: str | None = None


Objects = Mapping[str, Sequence[Found]]
"""Objects by class, the surest first."""


def record_of(prompt: str) -> Record:
    """The record beside a prompt, as the lines of GenEval's ``evaluation_metadata.jsonl`` have it.

    Raises:
        InputError: naming the prompt, and what of its record is absent or not known.
    """
    data, where = data_of(prompt), f"prompt {shown(prompt)}"
    tag, include, exclude = data.get("tag"), data.get("include"), data.get("exclude", [])
    if not isinstance(tag, str) or not isinstance(include, Sequence) or isinstance(include, str) or not include:
        _refuse(where, "it has no GenEval record: a tag and what to include; read the prompts from GenEval's metadata")
    if not isinstance(exclude, Sequence) or isinstance(exclude, str):
        _refuse(where, "exclude is no list")
    clauses = [_clause(entry, i, f"{where}: include.{i}") for i, entry in enumerate(include)]
    return Record(tag, tuple(clauses), tuple(_clause(entry, 0, f"{where}: exclude.{i}") for i, entry in enumerate(exclude)))


def _clause(entry: Any, place: int, where: str) -> Clause:
    if not isinstance(entry, Mapping):
        _refuse(where, "is no object with a class and a count")
    if unknown := entry.keys() - {"class", "count", "color", "position"}:
        _refuse(where, f"{min(unknown)} is not known; class, count, color and position are")
    name, count, colour = entry.get("class"), entry.get("count"), entry.get("color")
    if name not in CLASSES:
        _refuse(
            where, f"class {name!r} is none of the detector's {len(CLASSES)}, such as {CLASSES[0]}, {CLASSES[9]}, {CLASSES[64]}"
        )
    if type(count) is not int or not 1 <= count <= MAX_OBJECTS:
        _refuse(where, f"count {count!r} is not a whole number from 1 to {MAX_OBJECTS}, which is all that is looked for")
    if colour is not None and colour not in COLOURS:
        _refuse(where, f"color {colour!r} is none of {', '.join(COLOURS)}")
    relation, target = None, 0
    if (position := entry.get("position")) is not None:
        if not isinstance(position, Sequence) or isinstance(position, str) or len(position) != 2:
            _refuse(where, f"position {position!r} is not a relation and the place of an earlier clause")
        relation, target = position
        if relation not in RELATIONS:
            _refuse(where, f"position {relation!r} is none of {', '.join(RELATIONS)}")
        if type(target) is not int or not 0 <= target < place:
            _refuse(where, f"position is in relation to include.{target}, which does not stand before it")
    return Clause(name, count, colour, relation, target)


def relations(one: Found, other: Found) -> set[str]:
    """How ``one`` lies to ``other``, none to two of ``RELATIONS``.

    The distance of their centres, shortened along each axis by a tenth of their two sizes, over its length before that: more
    than a half along an axis is a relation.
    """
    shifts, shortened = [], []
    for low, high in ((0, 2), (1, 3)):
        shift = (one.box[low] + one.box[high] - other.box[low] - other.box[high]) / 2
        sizes = abs(one.box[high] - one.box[low]) + abs(other.box[high] - other.box[low])
        shifts.append(shift)
        shortened.append(math.copysign(max(abs(shift) - _POSITION_THRESHOLD * sizes, 0.0), shift))
    if max(map(abs, shortened)) < _NOWHERE:
        return set()
    x, y = (distance / math.hypot(*shifts) for distance in shortened)
    sides = {"left of": -x, "right of": x, "above": -y, "below": y}
    return {relation for relation, distance in sides.items() if distance > _DIRECTION}


def coloured(record: Record, counts: Mapping[str, int], exact: bool) -> list[tuple[str, int]]:
    """Class and number of the objects whose colours decide, when so many of each class were found.

    Args:
        exact: a clause holds for exactly its count (Flow-GRPO), not for at least as many (official).
    """
    asked = [c for c in record.include if c.colour is not None]
    met = [c for c in asked if (counts.get(c.name, 0) == c.count if exact else counts.get(c.name, 0) >= c.count)]
    return list(dict.fromkeys((c.name, i) for c in met for i in range(c.count)))


def official(record: Record, objects: Objects) -> float:
    """1.0 if the picture is correct by GenEval, else 0.0.

    Of every included class at least ``count`` are found, and the surest ``count`` of them have the colour and stand in the
    relation; of no excluded class are ``count`` found.
    """
    held: list[Sequence[Found] | None] = []
    for clause in record.include:
        found = objects.get(clause.name, ())[: clause.count]
        holds = len(found) == clause.count
        holds = holds and (clause.colour is None or all(one.colour == clause.colour for one in found))
        holds = holds and (clause.relation is None or _related(clause.relation, found, held[clause.target]))
        held.append(found if holds else None)
    forbidden = any(len(objects.get(clause.name, ())) >= clause.count for clause in record.exclude)
    return float(all(found is not None for found in held) and not forbidden)


def flow_grpo(record: Record, objects: Objects) -> tuple[float, float]:
    """The reward of Flow-GRPO, at most 1, and its strict form, 1.0 or 0.0: all clauses hold.

    The mean over parts. Each clause gives 1 - |count - found| / count, which many objects too many make negative; then the same
    for the colour, where the count is exact; then 1 or 0 for the relation, where the colour holds too. With another count
    colour and relation are one part, 0. As released, a wrong relation to a target that holds is two parts, 0 and 1.
    """
    parts: list[float] = []
    held: list[Sequence[Found] | None] = []
    for clause in record.include:
        found = objects.get(clause.name, ())
        parts.append(1 - abs(clause.count - len(found)) / clause.count)
        holds = len(found) == clause.count
        if not holds and (clause.colour or clause.relation):
            parts.append(0.0)
        if holds and clause.colour:
            right = sum(one.colour == clause.colour for one in found)
            parts.append(1 - abs(clause.count - right) / clause.count)
            holds = right == clause.count
        if holds and clause.relation:
            target = held[clause.target]
            holds = _related(clause.relation, found, target)
            parts += [1.0] if holds else [0.0] if target is None else [0.0, 1.0]
        held.append(found if holds else None)
    return sum(parts) / len(parts), float(all(found is not None for found in held))


def _related(relation: str, found: Sequence[Found], target: Sequence[Found] | None) -> bool:
    return target is not None and all(relation in relations(one, other) for one in found for other in target)


def _refuse(where: str, what: str) -> NoReturn:
    raise InputError(f"{where}: {what}")
