"""Every recipe that ships stands in the table of docs/commands.md, and every name there ships."""

from __future__ import annotations

import re
from pathlib import Path

from adagrpo.recipe.load import recipe_names


def test_the_table_of_recipes_is_whole() -> None:
    page = (Path(__file__).parents[2] / "docs" / "commands.md").read_text("utf-8")
    rows = [line for line in page.partition("## Recipes")[2].partition("\n## ")[0].splitlines() if line.startswith("|")]
    names = {name for row in rows for name in _named(row.split("|")[1])}
    assert names == set(recipe_names())


def _named(cell: str) -> set[str]:
    """The recipes of a cell; `-x` in it stands for each of its names with that behind it."""
    found = re.findall(r"`([\w-]+)`", cell)
    plain = {name for name in found if not name.startswith("-")}
    return plain | {name + ending for ending in set(found) - plain for name in plain}
