"""Secrets among the ``kwargs`` of a recipe: used, never recorded.

A key whose name holds key, token, secret or password is one, if its value is text or a number of seven digits and more (so
``max_tokens = 77`` is not). Records, logs, reports, dashboards and messages show ``<redacted>`` in its place; a resumed run
takes the value from the recipe it is given, and two recipes that differ in secrets only are the same. A value ``env:NAME`` is
read from the environment when the part is built: it is no secret itself, so that a run folder can be sampled and resumed by
itself.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from ..errors import InputError

C = TypeVar("C")
REDACTED = "<redacted>"
ENVIRONMENT = "env:"
_NAME = re.compile(r"key|token|secret|password", re.IGNORECASE)
_ASSIGNED = re.compile(
    r"""([\w-]*(?:key|token|secret|password)[\w-]*["']?\s*=\s*)("(?!env:)(?:\\.|[^"\\\n])*"|'(?!env:)[^'\n]*'|-?\d{7,}\S*)""",
    re.IGNORECASE,
)
_SHORTEST = 6
_used: set[str] = set()


def is_secret(key: str, value: Any) -> bool:
    """Whether a value of ``kwargs`` must not be shown."""
    if not _NAME.search(key) or isinstance(value, bool):
        return False
    if isinstance(value, int | float):
        return abs(value) >= 10**6
    return not (isinstance(value, str) and (value.startswith(ENVIRONMENT) or value in ("", REDACTED)))


def redacted_kwargs(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """``kwargs`` without secrets; a table or list that is named like one is one as a whole."""
    return {key: REDACTED if is_secret(key, value) else _inside(value, redacted_kwargs) for key, value in kwargs.items()}


def _inside(value: Any, change: Callable[[dict[str, Any]], dict[str, Any]]) -> Any:
    """A table changed; anything else as it is."""
    return change(value) if isinstance(value, dict) else value


def comparable(config: C) -> C:
    """As ``redacted``, with references to the environment redacted too: where a secret comes from changes no run."""
    return _with_kwargs(config, lambda kwargs: redacted_kwargs(_without_references(kwargs)))


def _without_references(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    from_environment = lambda key, v: _NAME.search(key) and isinstance(v, str) and v.startswith(ENVIRONMENT)  # noqa: E731
    return {key: REDACTED if from_environment(key, v) else _inside(v, _without_references) for key, v in kwargs.items()}


def redacted(config: C) -> C:
    """A recipe (any dataclass) without the secrets in its ``kwargs``, at any depth."""
    return _with_kwargs(config, redacted_kwargs)


def restored(config: C, original: C) -> C:
    """``config`` with the values of ``original`` where only ``<redacted>`` is left of them."""
    if isinstance(config, tuple) and isinstance(original, tuple):
        both = zip(config, original, strict=False)
        return type(config)([*(restored(c, o) for c, o in both), *config[len(original) :]])
    if not dataclasses.is_dataclass(config) or isinstance(config, type):
        return config
    changes: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        value, before = getattr(config, field.name), getattr(original, field.name, None)
        if field.name == "kwargs" and isinstance(before, dict):
            changes["kwargs"] = _restored_kwargs(value, before)
        else:
            changes[field.name] = restored(value, before)
    return dataclasses.replace(config, **changes)


def _restored_kwargs(kwargs: Mapping[str, Any], before: Mapping[str, Any]) -> dict[str, Any]:
    found = {key: before.get(key, value) if value == REDACTED else value for key, value in kwargs.items()}
    both = {key: value for key, value in found.items() if isinstance(value, dict) and isinstance(before.get(key), dict)}
    return found | {key: _restored_kwargs(value, before[key]) for key, value in both.items()}


def _with_kwargs(value: Any, change: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(_with_kwargs(item, change) for item in value)
    if not dataclasses.is_dataclass(value) or isinstance(value, type):
        return value
    fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    changes = {name: change(v) if name == "kwargs" else _with_kwargs(v, change) for name, v in fields.items()}
    return dataclasses.replace(value, **changes)


def redacted_text(text: str) -> str:
    """TOML, sound or not, without the values of keys that are named like secrets."""
    return _ASSIGNED.sub(rf'\1"{REDACTED}"', text)


def redacted_arguments(argv: Sequence[str]) -> tuple[str, ...]:
    """A command line without the values that follow, or are joined by = to, names of secrets."""
    shown: list[str] = []
    for i, word in enumerate(argv):
        name, joined, value = word.partition("=")
        before = argv[i - 1] if i else ""
        if joined and _NAME.search(name) and is_secret(name, _number(value)):
            word = f"{name}={REDACTED}"
        elif "=" not in before and _NAME.search(before) and not word.startswith("--") and is_secret(before, _number(word)):
            word = REDACTED
        shown.append(word)
    return tuple(shown)


def _number(text: str) -> int | float | str:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def resolved(kwargs: Mapping[str, Any], key: str) -> dict[str, Any]:
    """``kwargs`` with the values to call a part with: those of the environment where ``env:NAME`` stands.

    Raises:
        InputError: no such variable, or nothing but ``<redacted>`` is left of a value.
    """
    found = dict(kwargs)
    for name, value in kwargs.items():
        if isinstance(value, dict):
            found[name] = resolved(value, key)
        if not _NAME.search(name) or not isinstance(value, str):
            continue
        if value == REDACTED:
            remedy = f"give it, or write {ENVIRONMENT}VARIABLE there"
            raise InputError(f"{key}: kwargs.{name} = {REDACTED}: its value is not recorded; {remedy}")
        if value.startswith(ENVIRONMENT):
            variable = value.removeprefix(ENVIRONMENT)
            if variable not in os.environ:
                raise InputError(f"{key}: kwargs.{name} = {value}: no such environment variable; set {variable}")
            found[name] = os.environ[variable]
        if len(found[name]) >= _SHORTEST:
            _used.add(found[name])
    return found


def scrubbed(message: str) -> str:
    """A message without any secret that a part was given, whoever wrote it into it."""
    for secret in _used:
        message = message.replace(secret, REDACTED)
    return message
