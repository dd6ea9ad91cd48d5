"""What every measuring command takes beside its recipe."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable
from pathlib import Path

from ..arguments import written_path


@dataclasses.dataclass(frozen=True)
class Options:
    """What every measuring command takes: rounds, the records' folder, a note, the command line, the peak in TFLOP/s."""

    rounds: int
    out: Path
    note: str = ""
    argv: tuple[str, ...] = ()
    peak: float = 0.0


def measuring(
    bench: argparse._SubParsersAction, name: str, does: str, description: str, run: Callable[..., int]
) -> argparse.ArgumentParser:
    """A command that measures a recipe, whose keys it takes, and writes a record."""
    usage = f"adagrpo bench {name} [RECIPE] [--section.key VALUE …] [options]"
    command = bench.add_parser(name, help=does, description=description, usage=usage, allow_abbrev=False)
    command.set_defaults(run=run, recipe_keys=True)
    add_record_options(command)
    return command


def add_record_options(parser: argparse.ArgumentParser) -> None:
    """Where the record goes, and what it has to say of itself."""
    parser.add_argument("--out", type=written_path, default=Path("bench/results"), help="folder of the records")
    parser.add_argument("--note", default="", help="what a reader of the record must know")
