"""The probes that are compared: names, and the recipe keys of each."""

from __future__ import annotations

import dataclasses
from typing import Any

from ..config import Config
from ..errors import InputError
from ..recipe import check

PROBES: dict[str, dict[str, Any]] = {
    "full": {"probe": "full"},
    "short-4": {"probe": "short", "probe_steps": 4},
    "short-2": {"probe": "short", "probe_steps": 2},
    "memory": {"probe": "memory"},
    "random": {"strategy": "random"},
}
"""Changes of ``selection`` by name; ``random`` draws prompts blindly, the control."""


def with_probe(config: Config, name: str) -> Config:
    """The recipe with another probe of ``PROBES``.

    Raises:
        InputError: unknown name, or a recipe that cannot have it.
    """
    if name not in PROBES:
        raise InputError(f"--probes: unknown probe {name!r}: one of {', '.join(PROBES)}")
    changed = dataclasses.replace(config, selection=dataclasses.replace(config.selection, **PROBES[name]))
    check(changed)
    return changed
