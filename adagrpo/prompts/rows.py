"""Sequences of prompts that are parsed when they are asked for: a file's, and several sources' as one list."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Protocol, overload

import numpy as np
from numpy.typing import NDArray

from ..errors import InputError
from .checks import key_of
from .content import BLOCK, Content
from .fields import category_of, meaning
from .index import Index
from .layouts import REFUSED, layout_of
from .prompt import Prompt, data_of
from .reading import Part, Reading

MAX_FILE = 64 * 2**30


class Rows(Protocol):
    """The prompts of one source.

    Attributes:
        named: what messages begin with.
        keys: int64 [N], of what each prompt says (``key_of``).
        has_data: whether prompts may have metadata.
        pictures: whether rows are judged pictures, many of one prompt.
        notes: what there is to tell the user.
    """

    named: str
    keys: NDArray[np.int64]
    has_data: bool
    pictures: bool
    notes: list[str]

    def some(self, rows: NDArray[np.int64]) -> Iterator[Prompt]:
        """The prompts of these rows, parsed anew."""

    def place(self, row: int) -> str:
        """A row, for messages: ``line 7``."""


class FileRows:
    """The prompts of a file (``Rows``).

    Raises:
        InputError: it cannot be meant as prompts, or holds rows that cannot be read.
    """

    def __init__(self, path: Path, named: str, reading: Reading, part: Part | None) -> None:
        if kind := REFUSED.get(path.suffix.lower()):
            raise InputError(f"{named}: its ending is {kind}")
        self.named, self._content = named, Content(path, named, MAX_FILE)
        self._layout = layout_of(path, self._content, reading.field)
        self.has_data, self.pictures = self._layout.has_data, self._layout.pictures
        index = Index(named, self._line, reading, part)
        self._layout.scan(self._content, index)
        self._starts, self._stops, self.keys = index.columns()
        self.notes = index.notes

    def some(self, rows: NDArray[np.int64]) -> Iterator[Prompt]:
        """The prompts of these rows; neighbours are read together."""
        base, window = 0, b""
        for some in np.split(rows, range(4096, len(rows), 4096)):
            for start, stop in zip(self._starts[some].tolist(), self._stops[some].tolist(), strict=True):
                if not base <= start <= stop <= base + len(window):
                    base = start
                    window = self._content.read(start, stop if len(rows) == 1 else max(stop, start + BLOCK))
                yield self._layout.parse(window[start - base : stop - base])

    def place(self, row: int) -> str:
        """The line of a row."""
        return self._line(int(self._starts[row]))

    def _line(self, offset: int) -> str:
        return f"line {self._content.line(offset)}"


class PromptList(Sequence[str]):
    """The prompts of one or several sources, one after the other, each parsed when it is asked for.

    Args:
        parts: the sources.
        categories: of prompts that name none, for each source; empty gives none.
        duplicates: what repeated prompts do (``Reading.duplicates``); rows that are judged pictures of one prompt are one.

    Attributes:
        keys: int64 [N], of what each prompt says.
        notes: what there is to tell the user.

    Raises:
        InputError: a prompt is repeated, or has other metadata where it is repeated; both places are named.
    """

    def __init__(self, parts: Sequence[Rows], categories: Sequence[str], duplicates: str) -> None:
        self._parts, self._categories = parts, categories
        self._bounds = np.cumsum([0, *(len(part.keys) for part in parts)])
        keys = parts[0].keys if len(parts) == 1 else np.concatenate([part.keys for part in parts])
        again, first = repeats(keys)
        dropped = self._judged(again, first, duplicates)
        self._order = np.delete(np.arange(len(keys)), dropped) if len(dropped) else np.arange(len(keys))
        self.keys = keys[self._order] if len(dropped) else keys
        self.notes = [note for part in parts for note in part.notes]

    def __len__(self) -> int:
        return len(self._order)

    def __iter__(self) -> Iterator[str]:
        return self._some(self._order)

    @overload
    def __getitem__(self, key: int) -> str: ...
    @overload
    def __getitem__(self, key: slice) -> list[str]: ...
    def __getitem__(self, key: int | slice) -> str | list[str]:
        if isinstance(key, slice):
            return list(self._some(self._order[key]))
        return next(self._some(self._order[[key]]))

    def _some(self, rows: NDArray[np.int64]) -> Iterator[str]:
        """The prompts of rows, counted through all sources."""
        at = 0
        while at < len(rows):
            part = self._part(rows[at])
            low, high = self._bounds[part : part + 2]
            outside = np.flatnonzero((rows[at:] < low) | (rows[at:] >= high))
            stop = at + int(outside[0]) if len(outside) else len(rows)
            category = self._categories[part]
            for prompt in self._parts[part].some(rows[at:stop] - low):
                bare = category and category_of(prompt.data) is None
                yield Prompt(prompt, {**prompt.data, "category": category}) if bare else prompt
            at = stop

    def _part(self, row: int) -> int:
        return int(np.searchsorted(self._bounds, row, side="right")) - 1

    def _judged(self, again: NDArray[np.int64], first: NDArray[np.int64], duplicates: str) -> NDArray[np.int64]:
        """The rows to drop, of those that repeat the rows ``first``."""
        part, known_part = (np.searchsorted(self._bounds, rows, side="right") - 1 for rows in (again, first))
        pictures = np.array([each.pictures for each in self._parts])[part]
        has_data = np.array([each.has_data for each in self._parts])
        differs = (has_data[part] | has_data[known_part]) & ~pictures
        for row, known in zip(again[differs].tolist(), first[differs].tolist(), strict=True):
            one, other = (meaning(self._own(each).data) for each in (known, row))
            if one != other:
                differ = ", ".join(name for name in {**one, **other} if one.get(name) != other.get(name))
                why = f"with other values of {differ}: a reward could not tell them apart; remove one of the two"
                raise InputError(f"{self._place(row, True)} repeats {self._place(known, False, row)} {why}")
        if duplicates == "error" and not pictures.all():
            row, known = again[~pictures][0], first[~pictures][0]
            remedy = 'remove it or set data.duplicates to "drop" or "keep"'
            raise InputError(f"{self._place(row, True)} repeats {self._place(known, False, row)}; {remedy}")
        return again if duplicates == "drop" else again[pictures]

    def _own(self, row: int) -> Prompt:
        """The prompt of a row as its source has it."""
        part = self._part(row)
        return next(self._parts[part].some(np.array([row - self._bounds[part]])))

    def _place(self, row: int, whole: bool, beside: int = -1) -> str:
        """Where a row stands; not ``whole``: as seen from the row ``beside``."""
        part = self._part(row)
        where = self._parts[part].place(int(row - self._bounds[part]))
        return where if not whole and part == self._part(beside) else f"{self._parts[part].named}: {where}"


def repeats(keys: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Rows whose key an earlier row has, rising, and for each the first such row."""
    rising = np.sort(keys)
    if not (rising[1:] == rising[:-1]).any():
        return np.zeros(0, np.int64), np.zeros(0, np.int64)
    order = np.argsort(keys, kind="stable")
    later = np.flatnonzero(rising[1:] == rising[:-1]) + 1
    again, first = order[later], order[np.searchsorted(rising, rising[later])]
    places = np.argsort(again)
    return again[places], first[places]


def shared_rows(keys: NDArray[np.int64], others: NDArray[np.int64]) -> NDArray[np.int64]:
    """Rows whose key is among ``others``, rising; these are looked through piece by piece."""
    rising = np.sort(keys)
    found = [np.zeros(0, np.int64)]
    for start in range(0, len(others) if len(keys) else 0, 2**16):
        some = others[start : start + 2**16]
        at = np.searchsorted(rising, some).clip(max=len(rising) - 1)
        found.append(some[rising[at] == some])
    return np.flatnonzero(np.isin(keys, np.concatenate(found)))


def keys_of(prompts: Iterable[str]) -> NDArray[np.int64]:
    """int64 [N], 64 bits of what each prompt says; of a ``PromptList`` without reading it."""
    if isinstance(prompts, PromptList):
        return prompts.keys
    return np.fromiter((key_of(prompt) for prompt in prompts), np.int64)


def prompt_category(prompt: str) -> str | None:
    """A prompt's category by its metadata; None where it has none."""
    return category_of(data_of(prompt))
