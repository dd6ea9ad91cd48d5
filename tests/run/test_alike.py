"""Ranks that are not alike are refused before they train, by name."""

from __future__ import annotations

import dataclasses
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from adagrpo.engine.ranks import Ranks
from adagrpo.errors import InputError
from adagrpo.run import alike


@dataclasses.dataclass(frozen=True)
class Heard(Ranks):
    """The first rank, which hears for each other one what it says itself, changed by its number."""

    others: Callable[[int, Any], Any] = lambda rank, mine: mine

    def all_of(self, mine: Any, at: str) -> list[Any]:
        return [mine, *(self.others(rank, mine) for rank in range(1, self.size))]

    def told(self, find: Callable[[], Any], at: str) -> Any:
        return find()


def differing(rank: int, mine: tuple[str, dict[str, str]]) -> tuple[str, dict[str, str]]:
    host, facts = mine
    return (f"node-{rank}", {**facts, "prompts": "others"}) if rank == 2 else (host, facts)


def test_the_odd_rank_is_named_with_its_host() -> None:
    facts = {"code": {"torch": "2"}, "prompts": ["a"]}
    alike.require_alike(Heard(0, 4), facts)
    with pytest.raises(InputError, match=r"^rank 2 on node-2: another prompts than on the other ranks"):
        alike.require_alike(Heard(0, 4, others=differing), facts)
    alike.require_alike(Ranks(), facts)


def test_a_folder_that_is_not_shared_is_refused(tmp_path: Path) -> None:
    alike.require_one_folder(Heard(0, 3), tmp_path)
    blind = Heard(0, 3, others=lambda rank, mine: (mine[0], rank != 1))
    with pytest.raises(InputError, match=f"rank 1 on {socket.gethostname()} cannot see it; name a folder that all nodes share"):
        alike.require_one_folder(blind, tmp_path)
    assert not any(tmp_path.iterdir())


def test_a_rank_that_does_not_see_the_nonce_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(alike, "SEEN_WITHIN", 0.1)
    said: list[Any] = []

    class Elsewhere(Heard):
        def told(self, find: Callable[[], Any], at: str) -> Any:
            return "another nonce"

        def all_of(self, mine: Any, at: str) -> list[Any]:
            said.append(mine)
            return [mine] * self.size

    alike.require_one_folder(Elsewhere(1, 2), tmp_path)
    assert said == [(socket.gethostname(), False)]
