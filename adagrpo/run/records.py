"""Append-only records of a run: JSON lines that a checkpoint can vouch for, line by line."""

from __future__ import annotations

import dataclasses
import os
import shutil
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ..disk.files import flush, replacing, set_aside, write_bytes, writing
from ..text.strict_json import from_json, to_json

LONGEST_LINE = 2**24


@dataclasses.dataclass(frozen=True)
class Line:
    """A line as it lies in the file: its bytes without the end, whether the end is there, its record (None: unreadable)."""

    raw: bytes
    ended: bool
    record: dict[str, Any] | None


class Log:
    """A file of JSON lines, each with an ``iteration``.

    Attributes:
        checksums: CRC-32 of every line, in order; kept in checkpoints, so that a later damage shows.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checksums: list[int] = []

    def append(self, record: dict[str, Any]) -> None:
        """Add a line; non-finite numbers become null.

        Raises:
            WriteError: it cannot be written.
        """
        line = to_json(record).encode("utf-8")
        with writing(self.path), self.path.open("ab") as file:
            file.write(line + b"\n")
        self.checksums.append(zlib.crc32(line))

    def sync(self) -> list[int]:
        """Bring the file to disk; the checksums of its lines."""
        if self.path.is_file():
            with writing(self.path):
                flush(self.path)
        return list(self.checksums)

    def restore(self, iteration: int, known: Sequence[int] | None, keep_later: bool) -> str | None:
        """Bring the file to where it was after ``iteration``; a file that is not what was written is set aside.

        Args:
            known: checksums that the checkpoint has; None for a checkpoint of a former version.
            keep_later: keep sound lines behind those (of events), instead of dropping them (of metrics).

        Returns:
            What was damaged, what became of it, and what was kept; None if all is well.

        Raises:
            WriteError: the file cannot be written or renamed.
        """
        name, there = self.path.name, os.path.lexists(self.path)
        if there and not self.path.is_file():
            aside = set_aside(self.path)
            self.checksums = []
            return f"{name} was no regular file: set aside as {aside.name}; earlier lines are lost"
        lines = list(read_lines(self.path)) if there else []
        if known is None:
            kept, damage = _by_structure(lines, iteration, keep_later)
        else:
            kept, damage = _by_checksum(lines, known, keep_later)
        self.checksums = [zlib.crc32(line.raw) for line in kept]
        content = b"".join(line.raw + b"\n" for line in kept)
        if damage and not there:
            return f"{name} is missing: {damage}"
        if damage:
            aside = self._copy_aside()
            write_bytes(self.path, content)
            return f"{name} is damaged: {damage}; kept as {aside.name}, with its {len(kept)} sound lines in {name}"
        if there and len(content) != self.path.stat().st_size:
            write_bytes(self.path, content)
        return None

    def _copy_aside(self) -> Path:
        """The damaged file under another name, while it still has its own: a crash between loses nothing."""
        number = 1
        stem, suffix = self.path.stem, self.path.suffix
        while os.path.lexists(aside := self.path.with_name(f"{stem}.damaged-{number}{suffix}")):
            number += 1
        with replacing(aside) as draft:
            shutil.copyfile(self.path, draft)
        return aside


def read_lines(path: Path) -> Iterator[Line]:
    """The lines of a regular file, one at a time; longer ones than any record are unreadable, and not held."""
    with path.open("rb") as file:
        while raw := file.readline(LONGEST_LINE):
            ended = raw.endswith(b"\n")
            if not ended and len(raw) == LONGEST_LINE:
                while (rest := file.readline(LONGEST_LINE)) and not rest.endswith(b"\n"):
                    pass
                yield Line(b"", rest.endswith(b"\n"), None)
                continue
            raw = raw.removesuffix(b"\n")
            record = parse(raw)
            yield Line(raw if record is not None else raw[:64], ended, record)


def parse(raw: bytes) -> dict[str, Any] | None:
    """The record of a line; None where it is none."""
    try:
        record = from_json(raw)
        sound = type(record["iteration"]) is int and 0 <= record["iteration"] < 2**53
    except (ValueError, KeyError, TypeError):
        return None
    return record if sound else None


def _by_checksum(lines: Sequence[Line], known: Sequence[int], keep_later: bool) -> tuple[list[Line], str]:
    """The lines that a checkpoint vouches for, with sound later ones; and what is wrong, or ''."""
    found = [zlib.crc32(line.raw) for line in lines]
    if found[: len(known)] == list(known):
        later = lines[len(known) :] if keep_later else []
        kept = [*lines[: len(known)], *(line for line in later if line.record is not None)]
        return kept, _unreadable(later)
    by_checksum = {checksum: line for checksum, line in zip(found, lines, strict=True) if line.record is not None}
    kept = [by_checksum[checksum] for checksum in known if checksum in by_checksum]
    if keep_later:
        vouched = set(known)
        last = max((i for i, checksum in enumerate(found) if checksum in vouched), default=len(lines))
        kept += [line for line in lines[last + 1 :] if line.record is not None]
    lost = sum(checksum not in by_checksum for checksum in known)
    return kept, f"{lost} of its {len(known)} lines are lost or altered" if lost else "lines are repeated, moved or added"


def _by_structure(lines: Sequence[Line], iteration: int, keep_later: bool) -> tuple[list[Line], str]:
    """As ``_by_checksum``, where no checksums are: metrics must be 1, 2, … ``iteration``; events must be readable."""
    sound = [line for line in lines if line.record is not None]
    if keep_later:
        return sound, _unreadable(lines)
    numbers = [line.record["iteration"] for line in sound if line.record is not None]
    if numbers[:iteration] == list(range(1, iteration + 1)) and all(line.record is not None for line in lines[:iteration]):
        return sound[:iteration], ""
    last = {n: line for n, line in zip(numbers, sound, strict=True) if 1 <= n <= iteration}
    missing = iteration - len(last)
    return [last[n] for n in sorted(last)], (
        f"{missing} of {iteration} iterations are missing" if missing else "lines are unreadable, repeated or moved"
    )


def _unreadable(lines: Sequence[Line]) -> str:
    """How many lines are no records, or ''; a last line without its end was being written when the run was killed."""
    count = sum(line.record is None and (line.ended or line is not lines[-1]) for line in lines)
    return f"{count} unreadable line{'s' * (count > 1)}" if count else ""
