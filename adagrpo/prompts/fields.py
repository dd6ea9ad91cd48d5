"""Which column or key of a table holds the prompts, and what the others mean."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from typing import Any

from ..errors import InputError
from ..text.user_text import cut, nearest

COLUMNS = {"prompt", "prompts", "caption", "captions", "text", "texts", "description", "descriptions"}
_CATEGORIES = ("category", "Category", "tag")
_THEMES = ("Primary Categories", "一级垂类")  # of UniGenBench
# Columns of published sets of judged pairs: rows are pictures of a prompt, which say nothing of the prompt itself.
_PICTURES = ({"path1", "path2"}, {"file_path", "human_preference"}, {"image_path", "rank"})
_NUMBERS = {"id", "idx", "index"}


def prompt_field(names: Collection[str], wanted: str, named: str) -> str:
    """The column or key of the prompt.

    Args:
        names: those that there are.
        wanted: that the recipe names; empty: the one that is clearly meant, ``prompt`` before ``caption`` before ``prompt_en``.

    Raises:
        InputError: it is missing, or none or several could be meant; the message lists those there are.
    """
    there = ", ".join(cut(name, 40) for name in names)
    if wanted:
        if wanted not in names:
            raise InputError(f"{named}: has no column or key {wanted}{nearest(wanted, list(names))}: it has {there}")
        return wanted
    plain = {name: name.strip().lower() for name in names}
    levels: tuple[Callable[[str], bool], ...] = (
        lambda name: name in ("prompt", "prompts"),
        lambda name: name in COLUMNS,
        lambda name: not COLUMNS.isdisjoint(re.split(r"[\W_]+", name)),
    )
    for level in levels:
        found = [name for name, lower in plain.items() if level(lower)]
        if len(found) == 1:
            return found[0]
        if found:
            several = ", ".join(cut(name, 40) for name in found)
            raise InputError(f"{named}: {several} could each hold the prompts; name one by data.field")
    raise InputError(f"{named}: its columns or keys are {there}; name the one that holds the prompts by data.field")


def shows_pictures(names: Collection[str]) -> bool:
    """Whether rows with these columns are judged pictures, many of one prompt."""
    return any(columns <= set(names) for columns in _PICTURES)


def meaning(data: Mapping[str, Any]) -> dict[str, Any]:
    """What tells rows of the same prompt apart: all but their numbers."""
    return {name: value for name, value in data.items() if name not in _NUMBERS}


def category_of(data: Mapping[str, Any]) -> str | None:
    """A prompt's category by its metadata: its column, GenEval's tag, UniGenBench's theme; None where it has none."""
    for name in _CATEGORIES:
        if isinstance(value := data.get(name), str) and value:
            return value
    for name, value in data.items():
        if name.startswith("sub_dims") and isinstance(value, Mapping):
            return next((value[theme] for theme in _THEMES if isinstance(value.get(theme), str)), None)
    return None
