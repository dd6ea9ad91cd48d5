"""Recipes: TOML merged over the defaults of ``adagrpo.recipe.keys``, strict and readable when refused."""

from __future__ import annotations

import dataclasses
import os
import types
import typing
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import tomli_w

from ..errors import InputError
from ..text.redaction import REDACTED, is_secret, redacted
from ..text.user_text import cut, nearest, parse_toml, read_text, shown
from .keys import Config

MAX_BYTES = 2**16


def recipe_names() -> list[str]:
    """Names of the recipes that ship with the package."""
    folder = resources.files(__package__)
    return sorted(entry.name.removesuffix(".toml") for entry in folder.iterdir() if entry.name.endswith(".toml"))


def load_recipe(recipe: str | Path) -> Config:
    """Read a shipped recipe by name, or a TOML file by path.

    Raises:
        InputError: unknown recipe, unreadable file, unknown key or wrong type.
    """
    names = recipe_names()
    if str(recipe) in names:
        text, source = (
            (resources.files(__package__) / f"{recipe}.toml").read_text("utf-8"),
            f"recipe {recipe}",
        )
    else:
        path = Path(recipe)
        if not os.path.exists(path):
            raise InputError(
                f"no recipe {shown(str(recipe))}{nearest(str(recipe), names)}: name one of {', '.join(names)}, or a TOML file"
            )
        text, source = read_text(path, str(path), MAX_BYTES), str(path)
    try:
        tables = parse_toml(text)
    except ValueError as error:
        raise InputError(f"{source}: not valid TOML: {error}") from error
    return _build(Config, tables, source, "")


def to_toml(config: Config) -> str:
    """The resolved recipe as TOML, without secrets; but for those ``load_recipe`` reads it back to an equal Config."""
    return tomli_w.dumps(_plain(dataclasses.asdict(redacted(config))))


def _build(cls: Any, data: dict[str, Any], source: str, prefix: str) -> Any:
    hints = typing.get_type_hints(cls)
    for key in data:
        if key not in hints:
            raise InputError(f"{source}: unknown key {prefix}{cut(key)}{nearest(key, list(hints))}")
    values = {key: _convert(hints[key], value, source, prefix + key) for key, value in data.items()}
    return cls(**values)


def _convert(hint: Any, value: Any, source: str, key: str) -> Any:
    def wrong(expected: str) -> InputError:
        named = ".kwargs." in f".{key}" and is_secret(key.rpartition(".")[2], "text")
        return InputError(f"{source}: {key} = {REDACTED if named else shown(value)}: expected {expected}")

    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, dict):
            raise wrong("a table")
        return _build(hint, value, source, f"{key}.")
    if origin is Literal:
        if value not in args:
            hint = nearest(value, list(args)) if isinstance(value, str) else ""
            raise InputError(f"{source}: {key} = {shown(value)}{hint}: one of {', '.join(args)}")
        return value
    if origin is tuple:
        fixed = len(args) if args[-1] is not Ellipsis else None
        if not isinstance(value, list) or (fixed and len(value) != fixed):
            raise wrong(f"a list of {fixed} values" if fixed else "a list")
        return tuple(_convert(args[0], item, source, f"{key}.{i}") for i, item in enumerate(value))
    if origin is dict:
        if not isinstance(value, dict):
            raise wrong("a table")
        return {k: _convert(args[1], v, source, f"{key}.{k}") for k, v in value.items()}
    if origin is types.UnionType:
        if not isinstance(value, args):
            raise wrong("a string, a number, true or false")
        return value
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        try:
            return float(value)
        except OverflowError as error:
            raise wrong("a number") from error
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        raise wrong({int: "a whole number", float: "a number", bool: "true or false", str: "a string"}[hint])
    return value


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, list | tuple) else value
