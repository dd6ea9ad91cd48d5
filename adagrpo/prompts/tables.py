"""Prompts in tables: CSV, and TSV as it is published, where quotes are mostly those of the prompt."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from typing import Any

from ..errors import InputError
from ..text.strict_json import from_json
from ..text.user_text import cut, shown
from .checks import cleaned
from .content import Content
from .fields import prompt_field, shows_pictures
from .index import Index
from .prompt import Prompt

Row = tuple[int, int, list[str] | ValueError]


class Table:
    """CSV whose first line names the columns, parted by commas, or by the semicolons or tabs of that line.

    The other columns are the prompt's data, as text; one whose first value is a JSON object or list is JSON in every row.

    Attributes:
        names: of the columns.
        mark: what parts them.

    Raises:
        InputError: there is no such line, or none of its columns is clearly the prompt's.
    """

    def __init__(self, content: Content, field: str) -> None:
        self.mark = self._mark(content)
        rows = self.rows(content)
        names = next(rows, (0, 0, [""]))[2]
        if isinstance(names, ValueError):
            raise InputError(f"{content.named}: its first line, which names the columns, cannot be read: {names}")
        self.names = [cleaned(name) for name in names]
        if twice := [name for name in self.names if name and self.names.count(name) > 1]:
            raise InputError(f"{content.named}: its first line names {twice[0]} twice; rename one")
        self.at = self.names.index(prompt_field([name for name in self.names if name], field, content.named))
        first = next((row for _, _, row in rows if isinstance(row, list)), [])
        self.pictures = shows_pictures(self.names)
        self.has_data = not self.pictures and any(name for name in self.names if name != self.names[self.at])
        kept = dict(enumerate(first[: len(self.names)])) if self.has_data else {}
        self.json = [i for i, value in kept.items() if i != self.at and value[:1] in ("{", "[") and _is_json(value)]
        self.json += [i for i in kept if self.names[i].startswith("sub_dims") and i not in self.json]

    def rows(self, content: Content) -> Iterator[Row]:
        """Start, end and fields of every row, that of the names included; a ``ValueError`` for what is none."""
        lines = _Lines(content)
        reader = csv.reader(iter(lines), delimiter=self.mark, strict=True)
        while True:
            start = lines.stop
            try:
                row = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                last = content.line(max(start, lines.stop - 1))
                reach = f", up to line {last}" if last > content.line(start) else ""
                yield start, lines.stop, ValueError(f"is no row of a table ({error}{reach})")
                continue
            if any(row):
                yield start, lines.stop, row

    def fields(self, raw: bytes) -> list[str]:
        """The fields of a row, by its bytes."""
        return next(csv.reader([raw.decode()], delimiter=self.mark, strict=True))

    def scan(self, content: Content, index: Index) -> None:
        """Put every row into the index."""
        rows = self.rows(content)
        next(rows, None)
        for start, stop, row in rows:
            if problem := self._problem(row):
                index.refuse(start, problem)
            else:
                index.add(start, stop, cleaned(row[self.at]))  # type: ignore[index]

    def parse(self, raw: bytes) -> Prompt:
        """The prompt of a row."""
        row = self.fields(raw)
        text = cleaned(row[self.at])
        if not self.has_data:
            return Prompt(text)
        data: dict[str, Any] = {name: row[i] for i, name in enumerate(self.names) if name and i != self.at}
        for i in self.json:
            data[self.names[i]] = from_json(row[i]) if row[i] else None
        return Prompt(text, data)

    def _problem(self, row: list[str] | ValueError) -> str | None:
        if isinstance(row, ValueError):
            return str(row)
        if len(row) != len(self.names):
            return f"has {len(row)} columns, the first line names {len(self.names)}: {shown(row)}"
        for i in self.json:
            if row[i] and not _is_json(row[i]):
                return f"holds broken JSON in column {cut(self.names[i])}: {_json_error(row[i])}"
        return None if cleaned(row[self.at]) else "holds an empty prompt"

    def _mark(self, content: Content) -> str:
        """What the first line has most of."""
        first = next((line for _, block in content.blocks() for line in block.decode().split("\n") if line.strip()), "")
        return max(",;\t", key=first.count)


class TabTable(Table):
    """TSV: one row per line. A field is unquoted only where quotes surround it and those inside are doubled."""

    def rows(self, content: Content) -> Iterator[Row]:
        """Start, end and fields of every line that is not blank."""
        for start, block in content.blocks():
            for raw in block.split(b"\n"):
                if raw.strip():
                    yield start, start + len(raw), self.fields(raw)
                start += len(raw) + 1

    def fields(self, raw: bytes) -> list[str]:
        """The fields of a row, by its bytes."""
        return [_unquoted(field) for field in raw.decode().rstrip("\r").split("\t")]

    def _mark(self, content: Content) -> str:
        return "\t"


class _Lines:
    """The lines of a file for a reader that takes one after the other; ``stop`` is the end of the last that it took."""

    def __init__(self, content: Content) -> None:
        self.content, self.stop = content, content.start

    def __iter__(self) -> Iterator[str]:
        for start, block in self.content.blocks():
            self.stop = start
            for raw in _split(block):
                self.stop += len(raw)
                yield raw.decode()


def _split(block: bytes) -> list[bytes]:
    """Lines with their ends, which are those of Unix; a lone return is none."""
    lines = block.split(b"\n")
    return [line + b"\n" for line in lines[:-1]] + ([lines[-1]] if lines[-1] else [])


def _unquoted(field: str) -> str:
    inner = field[1:-1].replace('""', "")
    return field[1:-1].replace('""', '"') if len(field) > 1 and field[0] == field[-1] == '"' and '"' not in inner else field


def _is_json(text: str) -> bool:
    return not _json_error(text)


def _json_error(text: str) -> str:
    try:
        from_json(text)
    except ValueError as error:
        return str(error)
    return ""
