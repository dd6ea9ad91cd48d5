"""Every recipe that ships stands in the table of docs/commands.md, and every name there ships."""

from __future__ import annotations

import re
from pathlib import Path

from adagrpo.recipe.load import recipe_names


def test_the_table_of_recipes_is_whole() -> None:
    page = (Path(__file__).parents[2] / "docs" / "commands.md").read_text("utf-8")
    rows = [line for line in page.partition("## Recipes")[2].partition("\n## ")[0].splitlines() if line.startswith("|")]
    names = {name for row in rows for name in re.findall(r"`([\w-]+)`", row.split("|")[1])}
    assert "-grpo" in names  # with that behind each name of its row
    doubled = next(row.split("|")[1] for row in rows if "`-grpo`" in row)
    names |= {f"{name}-grpo" for name in re.findall(r"`(\w[\w-]+)`", doubled)}
    assert names - {"-grpo"} == set(recipe_names())
