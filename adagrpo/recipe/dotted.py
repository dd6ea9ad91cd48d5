"""Keys of a recipe by their dotted names: ``section.key``, ``guards.kl.limit``, ``rewards.0.weight``."""

from __future__ import annotations

import dataclasses
from typing import Any


def lookup(config: Any, key: str) -> Any:
    """The value of a key."""
    for part in key.split("."):
        config = config[int(part)] if part.isdigit() else getattr(config, part)
    return config


def replaced(config: Any, key: str, value: Any) -> Any:
    """A copy of the (frozen) recipe, or part of one, with another value of one key."""
    first, _, rest = key.partition(".")
    if isinstance(config, tuple):
        at = int(first)
        return (*config[:at], replaced(config[at], rest, value), *config[at + 1 :])
    return dataclasses.replace(config, **{first: replaced(getattr(config, first), rest, value) if rest else value})


def leaves(config: Any, prefix: str = "") -> dict[str, Any]:
    """Every key with its value. Tables of ``[[rewards]]`` are entered, other lists and ``kwargs`` are one value."""
    found: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        value, key = getattr(config, field.name), f"{prefix}{field.name}"
        if dataclasses.is_dataclass(value):
            found |= leaves(value, f"{key}.")
        elif isinstance(value, tuple) and value and dataclasses.is_dataclass(value[0]):
            for i, entry in enumerate(value):
                found |= leaves(entry, f"{key}.{i}.")
        else:
            found[key] = value
    return found
