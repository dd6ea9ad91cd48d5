"""What commands share of the command line: paths, whole numbers, a recipe with its keys as options, one process."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from .errors import InputError
from .recipe.keys import Config
from .recipe.layers import Recipe
from .recipe.load import read_recipe
from .text.redaction import redacted, restored
from .text.user_text import require_within, shown


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
            f"WORLD_SIZE = {size}: adagrpo {command} runs on one GPU, several ranks are not supported yet; start it as one "
            "process, without torchrun, or unset WORLD_SIZE"
        )


def configured(recipe: Recipe, overrides: list[str], command: str) -> Recipe:
    """The recipe under --section.key VALUE, checked; says which inherited keys do not apply.

    tyro prints help and errors, nearest option included, and exits with code 2.

    Raises:
        InputError: a recipe that cannot be run.
    """
    if overrides:
        import tyro

        default = redacted(recipe.config)  # its help prints the values
        config = restored(tyro.cli(Config, default=default, args=overrides, prog=f"adagrpo {command}"), recipe.config)
        recipe = recipe.overridden(config, overrides)
    if recipe.notice:
        print(f"note: {recipe.notice}", file=sys.stderr)
    recipe.check()
    return recipe


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
