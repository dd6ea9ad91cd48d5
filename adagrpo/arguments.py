"""What commands share of the command line: paths, whole numbers, a recipe with its keys as options, one process."""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .errors import InputError
from .recipe.dotted import lookup, replaced
from .recipe.keys import Config
from .recipe.layers import Recipe
from .recipe.load import read_recipe
from .text.redaction import redacted, restored
from .text.refusals import UNSUPPORTED
from .text.user_text import parse_toml, require_within, shown


def written_path(text: str) -> Path:
    """A path of the command line, meant as it is written.

    Raises:
        ArgumentTypeError: empty, or with a ~ that the shell left.
    """
    if not text:
        raise argparse.ArgumentTypeError("an empty path")
    if text.startswith("~"):
        raise argparse.ArgumentTypeError(f"the shell left ~ as it is: write the whole path, or ./{text} for a folder named ~")
    return Path(text)


def whole_number(text: str) -> int:
    """A whole number of the command line.

    Raises:
        ArgumentTypeError: no such number.
    """
    try:
        return int(text)
    except ValueError as error:  # also of more digits than Python reads
        raise argparse.ArgumentTypeError(f"{shown(text)} is not a whole number") from error


def require_least(args: argparse.Namespace, **least: int) -> None:
    """Refuse options below their least values, and beyond reason.

    Raises:
        InputError: one of them is.
    """
    for option, low in least.items():
        require_within(f"--{option}", getattr(args, option), low, 10**5)


def require_one_rank(command: str) -> None:
    """Refuse to be one of several ranks: each would do the whole work.

    Raises:
        InputError: started as one of several.
    """
    size = os.environ.get("WORLD_SIZE", "1").strip()
    if size not in ("", "0", "1"):
        raise InputError(
            f"WORLD_SIZE = {size}: adagrpo {command} is one process; start it without torchrun, or unset WORLD_SIZE"
        )


def configured(recipe: Recipe, overrides: list[str], command: str) -> Recipe:
    """The recipe under --section.key VALUE, checked; says which inherited keys do not apply.

    tyro prints help and errors, nearest option included, and exits with code 2.

    Raises:
        InputError: a recipe that cannot be run.
    """
    if overrides:
        import tyro

        for option in overrides:  # of which tyro would only say that it is none
            name = option.partition("=")[0].rpartition(".")[2].replace("-", "_")
            if option.startswith("--") and name in UNSUPPORTED:
                raise InputError(f"{option}: unknown key: {UNSUPPORTED[name]}")
        given, words = new_arguments(recipe.config, overrides)
        default = redacted(given)  # its help prints the values
        config = restored(tyro.cli(Config, default=default, args=words, prog=f"adagrpo {command}"), given)
        recipe = recipe.overridden(config, overrides)
    if recipe.notice:
        print(f"note: {recipe.notice}", file=sys.stderr)
    recipe.check()
    return recipe


def new_arguments(config: Config, words: Sequence[str]) -> tuple[Config, list[str]]:
    """The recipe with those ``kwargs`` of a command line that it has no value of yet, and the other words.

    ``--rewards.0.kwargs.architecture.heads 16`` adds a table's value; several words are a list, a word in TOML's form what TOML
    makes of it, and any other one is text.
    """
    kept: list[str] = []
    rest = list(words)
    while rest:
        word = rest.pop(0)
        found = re.fullmatch(r"--([a-z_]+(?:\.\d+)?\.kwargs)\.([\w-]+)(?:\.([\w-]+))?(?:=(.*))?", word, re.DOTALL)
        known = _kwargs_of(config, found[1]) if found else None
        if not found or known is None:
            kept.append(word)
            continue
        name, inner = found[2].replace("-", "_"), found[3] and found[3].replace("-", "_")
        table = known.get(name, {}) if inner else known
        if not isinstance(table, dict) or (inner or name) in table:
            kept.append(word)  # tyro knows its type
            continue
        values = [] if found[4] is None else [found[4]]
        while rest and found[4] is None and not rest[0].startswith("--"):
            values.append(rest.pop(0))
        if not values:
            raise InputError(f"{word}: expected a value")
        value = _value(values[0]) if len(values) == 1 else tuple(values)
        config = replaced(config, found[1], {**known, name: {**table, inner: value} if inner else value})
    return config, kept


def _kwargs_of(config: Config, key: str) -> dict[str, Any] | None:
    """The ``kwargs`` behind a dotted key; None where there are none."""
    try:
        found: dict[str, Any] = lookup(config, key)
    except (AttributeError, IndexError, TypeError):
        return None
    return found


def _value(word: str) -> bool | int | float | str | tuple[str, ...]:
    """A word of a command line as an argument."""
    try:
        value = parse_toml(f"v = {word}")["v"]
    except ValueError:
        return word
    if "\n" in word:
        return word
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        return tuple(value)
    return value if isinstance(value, bool | int | float | str) else word


def named_recipe(default: str, rest: list[str], command: str) -> Config:
    """The checked recipe of a command whose first argument may name it.

    Raises:
        InputError: a recipe that cannot be run, or one of several ranks.
    """
    named = bool(rest) and not rest[0].startswith("-")
    recipe, overrides = (rest[0], rest[1:]) if named else (default, rest)
    found = configured(read_recipe(recipe), overrides, f"{command} {recipe}")
    require_one_rank(command)
    return found.config
