"""Which files of the Hub a recipe's built-in rewards load, whether they are here already, and the commands that fetch them."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from . import BUILT_IN, check_reward
from .base import SEE_CARD
from .weights import is_hub_id

_WHOLE = ("model_index.json", "config.json")  # one of them tells that a repository was fetched as a whole


@dataclasses.dataclass(frozen=True)
class Wanted:
    """Files of one Hub repository.

    Attributes:
        key: who loads them, for messages.
        repository: owner/name.
        files: names in it; empty is all of it.
        size: bytes; None is not known.
        licence: of the weights, or where to look.
    """

    key: str
    repository: str
    files: tuple[str, ...] = ()
    size: int | None = None
    licence: str = ""

    @property
    def command(self) -> str:
        """What fetches them, into the cache that they are looked for in."""
        return " ".join(("hf download", self.repository, *self.files))

    @property
    def text(self) -> str:
        """What is missing, and the remedy."""
        what = f"{', '.join(self.files)} of {self.repository}" if self.files else self.repository
        size = "" if self.size is None else f"{self.size / 1e9:.1f} GB"
        about = list(filter(None, (size, self.licence and f"licence: {self.licence}")))
        told = f" ({'; '.join(about)})" if about else ""
        return f"{what}{told} is not here yet: {self.command}"

    def __str__(self) -> str:
        return f"{self.key}: {self.text}"


def is_here(repository: str, files: Sequence[str] = ()) -> bool:
    """Whether the cache holds them; of a whole repository, whether it holds its configuration."""
    from huggingface_hub import try_to_load_from_cache

    found = [isinstance(try_to_load_from_cache(repository, name), str) for name in files or _WHOLE]
    return all(found) if files else any(found)


def wanted_files(name: str, kwargs: Mapping[str, Any], key: str) -> list[Wanted]:
    """What a built-in reward would download with these arguments; nothing of a reward named by import path.

    Which repository is meant is what those arguments say that name one by default; which files of it, the reward's row says of
    that default. A class with another rule has a static method ``hub_files``: bound arguments -> sources as in ``BuiltIn``.
    Size and licence of the row are those of its first repository.

    Raises:
        InputError: see ``check_reward``.
    """
    if name not in BUILT_IN:
        return []
    row, factory = BUILT_IN[name], check_reward(name, kwargs, key)
    signature = inspect.signature(factory)
    bound = signature.bind_partial(**kwargs)
    bound.apply_defaults()
    published = _by_repository(row.files)
    if told := getattr(factory, "hub_files", None):
        places = _by_repository(told(bound.arguments))
    else:
        defaults = {a: p.default for a, p in signature.parameters.items() if isinstance(p.default, str)}
        places = {str(bound.arguments[a]): published[default] for a, default in defaults.items() if default in published}
    found: list[Wanted] = []
    for place, files in places.items():
        if is_hub_id(place) and not Path(place).exists() and not is_here(place, files):
            about = (row.size, row.licence) if place == next(iter(published), "") else (None, SEE_CARD)
            found.append(Wanted(f"{key} ({name})", place, files, *about))
    return found


def _by_repository(sources: Sequence[str]) -> dict[str, tuple[str, ...]]:
    found: dict[str, tuple[str, ...]] = {}
    for source in sources:
        repository, _, file = source.partition(":")
        found[repository] = found.get(repository, ()) + ((file,) if file else ())
    return found
