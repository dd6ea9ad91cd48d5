"""The table of rewards in docs/rewards.md, against those that are built in."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from adagrpo.rewards import BUILT_IN

PAGE = (Path(__file__).parents[2] / "docs" / "rewards.md").read_text("utf-8")


@pytest.mark.parametrize("name", BUILT_IN)
def test_every_built_in_reward_has_a_row_with_its_licence(name: str) -> None:
    rows = [line for line in PAGE.splitlines() if line.startswith("|") and f"`{name}`" in line.split("|")[1]]
    assert len(rows) == 1
    row = BUILT_IN[name]
    if row.parameters:
        stated = re.search(r"\b([\d.]+) ([MB])\b", rows[0])
        assert stated is not None
        number, digits = row.parameters / {"M": 1e6, "B": 1e9}[stated[2]], len(stated[1].partition(".")[2])
        assert f"{number:.{digits}f}" == stated[1]
        assert row.licence.split(",")[0] in rows[0].replace("cards", "card")
