"""Scene specifications of the tiny world, their wording, and the split into training and held-out scenes.

A specification says what a picture must show: one or two groups of equal objects and, optionally, how the first group
lies relative to the second. Wording and specification are inverse to each other, so a prompt alone carries the truth
that `adagrpo.tiny.reward` checks.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cache

COLOURS = ("red", "green", "blue", "yellow", "magenta", "cyan")
SHAPES = ("circle", "square", "triangle", "cross")
RELATIONS = ("left", "right", "above", "below")
CATEGORIES = ("single", "count", "pair", "relation", "combination")
MAX_OBJECTS = 4

_COUNT_WORDS = ("a", "two", "three", "four")
_RELATION_WORDS = {"left": "left of", "right": "right of", "above": "above", "below": "below"}
_MIRROR = {"left": "right", "right": "left", "above": "below", "below": "above"}
_COMBINATION_COUNTS = ((2, 1), (1, 2), (2, 2), (3, 1), (1, 3))
_HELD_OUT_ONE_IN = 4


@dataclass(frozen=True, order=True)
class Group:
    """`count` objects of one colour and one shape.

    Raises `ValueError` for an unknown colour or shape and for a count outside 1-4.
    """

    colour: str
    shape: str
    count: int = 1

    def __post_init__(self) -> None:
        if self.colour not in COLOURS or self.shape not in SHAPES:
            raise ValueError(f"unknown object {self.colour!r} {self.shape!r}: colours {COLOURS}, shapes {SHAPES}")
        if not 1 <= self.count <= MAX_OBJECTS:
            raise ValueError(f"count must be 1 to {MAX_OBJECTS}, got {self.count}")

    @property
    def phrase(self) -> str:
        """The group in words, such as `a red cross` or `two red crosses`."""
        noun = self.shape if self.count == 1 else f"{self.shape}es" if self.shape.endswith("s") else f"{self.shape}s"
        return f"{_COUNT_WORDS[self.count - 1]} {self.colour} {noun}"


@dataclass(frozen=True)
class SceneSpec:
    """What a picture must show: one or two groups and an optional relation of the first to the second.

    `relation` is one of `RELATIONS` or None. The order of the groups is part of the wording, not of the scene: see
    `canonical`. Raises `ValueError` where the parts belong to none of `CATEGORIES`.
    """

    groups: tuple[Group, ...]
    relation: str | None = None

    def __post_init__(self) -> None:
        if self.relation is not None and self.relation not in RELATIONS:
            raise ValueError(f"unknown relation {self.relation!r}: one of {RELATIONS}")
        kinds = {(group.colour, group.shape) for group in self.groups}
        if not 1 <= len(self.groups) <= 2 or len(kinds) != len(self.groups):
            raise ValueError(f"a scene has one group or two groups of different objects, got {self.groups}")
        counts = tuple(group.count for group in self.groups)
        if len(counts) == 1 and self.relation is not None:
            raise ValueError("a relation needs two groups")
        if len(counts) == 2 and counts != (1, 1) and (self.relation is None or counts not in _COMBINATION_COUNTS):
            raise ValueError(f"counts {counts} with relation {self.relation!r} belong to no category")

    @property
    def category(self) -> str:
        """One of `CATEGORIES`."""
        if len(self.groups) == 1:
            return "single" if self.groups[0].count == 1 else "count"
        if self.relation is None:
            return "pair"
        return "relation" if self.total == 2 else "combination"

    @property
    def total(self) -> int:
        """Number of objects in the picture, 1 to 4."""
        return sum(group.count for group in self.groups)

    @property
    def prompt(self) -> str:
        """The wording, such as `two red circles left of a blue cross`; `parse_prompt` is its inverse."""
        link = f" {_RELATION_WORDS[self.relation]} " if self.relation else " and "
        return link.join(group.phrase for group in self.groups)

    @property
    def mirrored(self) -> SceneSpec:
        """The same scene told from the other group (itself where there is one group)."""
        return SceneSpec(self.groups[::-1], _MIRROR[self.relation] if self.relation else None)

    @property
    def canonical(self) -> SceneSpec:
        """One representative of the scene's wordings: two specifications show the same scene iff these are equal."""
        if self.relation:
            return self if self.relation in ("left", "above") else self.mirrored
        return SceneSpec(tuple(sorted(self.groups)))


def parse_prompt(text: str) -> SceneSpec:
    """Read a prompt of the tiny world; the inverse of `SceneSpec.prompt` (case and spacing do not matter).

    Raises `ValueError` naming the prompt where it is not one of the world's wordings.
    """
    words = text.lower().split()
    try:
        first, rest = _parse_group(words[:3]), words[3:]
        if not rest:
            return SceneSpec((first,))
        link, second = " ".join(rest[:-3]), _parse_group(rest[-3:])
        links = {words: relation for relation, words in _RELATION_WORDS.items()} | {"and": None}
        return SceneSpec((first, second), links[link])
    except (KeyError, ValueError) as error:
        raise ValueError(
            f"not a prompt of the tiny world: {text!r} ({error}); say for example 'a red circle', 'three blue squares', "
            f"'a red circle and a blue square' or 'two red circles left of a blue square'"
        ) from None


def _parse_group(words: list[str]) -> Group:
    if len(words) != 3 or words[0] not in _COUNT_WORDS:
        raise ValueError(f"no object in {' '.join(words)!r}")
    count = _COUNT_WORDS.index(words[0]) + 1
    for shape in SHAPES:
        group = Group(words[1], shape, count)
        if group.phrase.endswith(f" {words[2]}"):
            return group
    raise ValueError(f"no shape in {' '.join(words)!r}")


@cache
def all_specs(category: str) -> tuple[SceneSpec, ...]:
    """Every specification of a category, in a fixed order, mirrored wordings included.

    Raises `ValueError` for a name that is not one of `CATEGORIES`.
    """
    kinds = [(colour, shape) for colour in COLOURS for shape in SHAPES]
    pairs = [(a, b) for a in kinds for b in kinds if a != b]
    if category == "single":
        return tuple(SceneSpec((Group(*kind),)) for kind in kinds)
    if category == "count":
        return tuple(SceneSpec((Group(*kind, n),)) for kind in kinds for n in range(2, MAX_OBJECTS + 1))
    if category == "pair":
        return tuple(SceneSpec((Group(*a), Group(*b))) for a, b in pairs)
    if category == "relation":
        return tuple(SceneSpec((Group(*a), Group(*b)), way) for a, b in pairs for way in RELATIONS)
    if category == "combination":
        counted = [(Group(*a, m), Group(*b, n)) for a, b in pairs for m, n in _COMBINATION_COUNTS]
        return tuple(SceneSpec(groups, way) for groups in counted for way in RELATIONS)
    raise ValueError(f"unknown category {category!r}: one of {CATEGORIES}")


@cache
def _held_out_scenes(category: str) -> frozenset[SceneSpec]:
    # Ranking by a hash of the wording fixes the share exactly and depends on no generator and no library version.
    scenes = sorted({spec.canonical for spec in all_specs(category)}, key=lambda spec: stable_hash(spec.prompt))
    return frozenset(scenes[: len(scenes) // _HELD_OUT_ONE_IN])


def is_held_out(spec: SceneSpec) -> bool:
    """Whether the scene, in any of its wordings, is kept from training (a quarter of each category)."""
    return spec.canonical in _held_out_scenes(spec.category)


@cache
def split_specs(category: str, held_out: bool) -> tuple[SceneSpec, ...]:
    """The category's training or held-out specifications, mirrored wordings included, in the order of `all_specs`."""
    return tuple(spec for spec in all_specs(category) if is_held_out(spec) == held_out)


def stable_hash(text: str) -> int:
    """A 64-bit hash that is the same on every machine and in every process."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")
