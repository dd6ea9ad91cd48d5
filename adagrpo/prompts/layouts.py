"""Prompt files by their endings: one prompt per line, a table, JSON; and nothing that was meant as something else."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

from ..errors import InputError
from .checks import cleaned
from .content import BLOCK, HELD, Content
from .index import Index
from .objects import JsonLines, JsonList
from .prompt import Prompt
from .structure import SAMPLE, structure_of
from .tables import Table, TabTable

_SHEETS = dict.fromkeys((".xlsx", ".ods"), "a spreadsheet; save it as .csv")
_COLUMNAR = dict.fromkeys((".parquet", ".arrow"), "a data set's; name its folder, as hub:FOLDER")
_CONFIGURATION = dict.fromkeys((".toml", ".yaml", ".yml", ".xml", ".html"), "not that of prompts; write them to a .txt file")
_PACKED = dict.fromkeys((".gz", ".zip", ".zst", ".xz", ".bz2"), "that of compressed data; unpack it")
REFUSED = {**_SHEETS, **_COLUMNAR, **_CONFIGURATION, **_PACKED}


class Layout(Protocol):
    """How the rows of a file are written.

    Attributes:
        has_data: whether rows may hold more than a prompt.
        pictures: whether rows are judged pictures, many of one prompt.
    """

    has_data: bool
    pictures: bool

    def scan(self, content: Content, index: Index) -> None:
        """Put every row into the index.

        Raises:
            InputError: rows that cannot be read.
        """

    def parse(self, raw: bytes) -> Prompt:
        """The prompt of a row, by its bytes."""


def layout_of(path: Path, content: Content, field: str) -> Layout:
    """The layout of a file.

    Args:
        field: column or key of the prompts; empty where one is clearly it.

    Raises:
        InputError: it cannot be meant as prompts, or does not say which column is the prompt.
    """
    ending = path.suffix.lower()
    if ending == ".csv":
        return Table(content, field)
    if ending == ".tsv":
        return TabTable(content, field)
    if ending in (".jsonl", ".ndjson"):
        return JsonLines(content, field)
    if ending == ".json":
        listed = content.read(content.start, content.start + BLOCK).lstrip().startswith(b"[")
        return JsonList(content, field) if listed else JsonLines(content, field)
    if head := [cleaned(line) for line in itertools.islice(_lines(content), SAMPLE)]:
        whole = lambda: content.read(content.start, content.size).decode() if content.size <= HELD else ""  # noqa: E731
        if structure := structure_of(head, whole):
            raise InputError(f"{content.named}: {_refusal(structure, path)}")
    return Lines()


class Lines:
    """Text, one prompt per line; blank lines are ignored."""

    has_data = pictures = False

    def scan(self, content: Content, index: Index) -> None:
        """Put every line into the index."""
        for start, block in content.blocks():
            index.add_lines(start, block)

    def parse(self, raw: bytes) -> Prompt:
        """The prompt of a line."""
        return Prompt(cleaned(raw.decode()))


def _lines(content: Content) -> Iterator[str]:
    """Lines that hold something."""
    for _, block in content.blocks():
        yield from (line for line in block.decode().split("\n") if cleaned(line))


def _refusal(structure: str, path: Path) -> str:
    if "every line is JSON" in structure:
        ending = ".jsonl"
    elif "JSON" in structure:
        ending = ".json"
    elif "table" in structure or "columns" in structure or "number" in structure:
        ending = ".tsv" if "tab" in structure.split()[-1] else ".csv"
    else:
        return f"{structure}; write the prompts alone, one per line, without quotes and marks"
    lacking = ", with a first line that names its columns" if "every line" in structure and ending != ".jsonl" else ""
    return f"{structure}; name it {path.stem}{ending}{lacking}, or write the prompts alone, one per line"
