"""Where the rows of a source lie, and what tells their prompts apart: 24 bytes a row, whatever it holds."""

from __future__ import annotations

from array import array
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from ..errors import InputError
from .checks import MAX_CHARACTERS, cleaned, key_of, prompt_problem
from .reading import Part, Reading

MAX_PROMPTS = 10_000_000
_SHOWN = 3
_NEWLINE, _BLANK = 0x0A, 0x20


class Index:
    """Takes the rows of a source one by one as it is looked through, once.

    Args:
        named: what messages begin with.
        place: names the row at an offset, for messages: ``line 7``.
        part: only its rows are kept; None keeps all.

    Attributes:
        left_out: messages about rows that could not be read.
    """

    def __init__(self, named: str, place: Callable[[int], str], reading: Reading, part: Part | None) -> None:
        self.named, self.place = named, place
        self.drops_broken, self.part = reading.broken == "drop", part
        self.left_out: list[str] = []
        self._starts, self._stops, self._keys = array("q"), array("q"), array("q")

    def add(self, start: int, stop: int, prompt: str) -> None:
        """A row from ``start`` to before ``stop``.

        Raises:
            InputError: the prompt cannot be meant, or there are too many.
        """
        if (key := self._judged(start, prompt)) is not None:
            self._starts.append(start)
            self._stops.append(stop)
            self._keys.append(key)
            self._require_few()

    def add_lines(self, start: int, block: bytes) -> None:
        """The lines of a block that begins at ``start``, each the row of a prompt unless it is blank.

        Raises:
            InputError: as of ``add``.
        """
        lines = block.split(b"\n")
        begins, stops, plain = _spans(block)
        keys = np.fromiter(map(hash, lines), np.int64, len(lines))  # as by ``key_of``, of plain lines
        kept = np.ones(len(lines), bool)
        for i in np.flatnonzero(~plain if self.part is None else kept).tolist():
            prompt = cleaned(lines[i].decode())
            key = self._judged(start + int(begins[i]), prompt, "\t") if prompt else None
            keys[i], kept[i] = key or 0, key is not None
        for column, values in ((self._starts, begins + start), (self._stops, stops + start), (self._keys, keys)):
            column.frombytes(values[kept].tobytes())
        self._require_few()

    def refuse(self, start: int, problem: str) -> None:
        """A row that cannot be read.

        Raises:
            InputError: unless such rows are to drop out.
        """
        message = f"{self.place(start)} {problem}" if not self.drops_broken or len(self.left_out) < _SHOWN else ""
        if not self.drops_broken:
            raise InputError(f'{self.named}: {message} (data.broken = "drop" leaves such rows out)')
        self.left_out.append(message)

    @property
    def notes(self) -> list[str]:
        """What was left out, for the user."""
        shown = "; ".join(message for message in self.left_out if message)
        more = "; …" if len(self.left_out) > _SHOWN else ""
        return [f"{self.named}: left out {len(self.left_out)} that cannot be read: {shown}{more}"] if self.left_out else []

    def columns(self) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """Offsets of the first byte and behind the last, and key of each row kept; int64.

        Raises:
            InputError: none is.
        """
        if not len(self._keys):
            notes = "".join(f"; {note.removeprefix(f'{self.named}: ')}" for note in self.notes)
            if self.part is None:
                raise InputError(f"{self.named}: holds no prompt{notes or '; write one per line'}")
            name, remedy = ("held_out", "raise") if self.part.held_out else ("train", "lower")
            raise InputError(f"{self.named}: its part #{name} holds no prompt; {remedy} data.held_out_share{notes}")
        starts, stops, keys = (np.frombuffer(column, np.int64) for column in (self._starts, self._stops, self._keys))
        return starts, stops, keys

    def _judged(self, start: int, prompt: str, spaces: str = "\t\n") -> int | None:
        """The key of a prompt; None where it is left out. ``spaces`` are control characters that it may hold."""
        if problem := prompt_problem(prompt, spaces):
            self.refuse(start, problem)
            return None
        return key_of(prompt) if self.part is None or self.part.holds(prompt) else None

    def _require_few(self) -> None:
        if len(self._keys) > MAX_PROMPTS:
            raise InputError(f"{self.named}: holds more than the {MAX_PROMPTS} prompts that are read; shorten it")


def _spans(block: bytes) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.bool_]]:
    """Start and end of every line, and whether it is plain: ASCII with single blanks inside only, not empty, not too long."""
    data = np.frombuffer(block, np.uint8)
    ends = np.flatnonzero(data == _NEWLINE)
    begins, stops = np.concatenate([[0], ends + 1]), np.concatenate([ends, [len(block)]])
    gap = (data == _BLANK) | (data == _NEWLINE)
    care = (data >= 0x7F) | ((data < _BLANK) & (data != _NEWLINE))
    care[1:] |= gap[1:] & gap[:-1]
    care[[0, -1]] |= data[[0, -1]] == _BLANK
    plain = (begins < stops) & (stops - begins <= MAX_CHARACTERS)
    plain[np.searchsorted(ends, np.flatnonzero(care))] = False
    return begins, stops, plain
