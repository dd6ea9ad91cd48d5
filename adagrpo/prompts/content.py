"""The bytes of a prompt file: held where they are few, else read where they lie."""

from __future__ import annotations

import os
import weakref
from collections.abc import Iterator
from pathlib import Path

from ..errors import InputError, RunError
from ..text.user_text import open_regular, size_limit, wide_encoding

HELD = 32 * 2**20
BLOCK = 2**20
LONGEST_ROW = 16 * 2**20
_MARK = b"\xef\xbb\xbf"


class Content:
    """The bytes of a UTF-8 text file.

    A file of up to ``HELD`` bytes is held, and nothing that happens to it later matters. A larger one stays open, and has to
    stay as it is; it may be removed or replaced.

    Attributes:
        start, size: offsets of its text: behind the mark that some editors put first, and its end.

    Raises:
        InputError: no such file, not a regular one, unreadable, larger than ``limit``, or text of another encoding.
    """

    def __init__(self, path: Path, named: str, limit: int) -> None:
        self.named = named
        self._handle = open_regular(path, named)
        self._close = weakref.finalize(self, os.close, self._handle)
        self._held: bytes | None = None
        stat = os.fstat(self._handle)
        self.size, self._stamp = stat.st_size, (stat.st_size, stat.st_mtime_ns)
        if self.size > limit:
            raise InputError(f"{named}: {size_limit(limit)}")
        if self.size <= HELD:
            self._held = self._read(0, min(HELD, limit) + 1)
            self.size = len(self._held)
            self._close()
        head = self.read(0, 4)
        if encoding := wide_encoding(head):
            raise InputError(f"{named}: {encoding} text; save it as UTF-8")
        self.start = len(_MARK) if head.startswith(_MARK) else 0

    def read(self, start: int, stop: int) -> bytes:
        """The bytes from ``start`` to before ``stop``.

        Raises:
            RunError: the file changed, or can no longer be read.
        """
        if self._held is not None:
            return self._held[start:stop]
        found, stat = self._read(start, stop - start), os.fstat(self._handle)
        if (stat.st_size, stat.st_mtime_ns) != self._stamp or len(found) < min(stop, self.size) - start:
            raise RunError(f"{self.named}: changed while it was read; restore it, then continue with --resume auto")
        return found

    def _read(self, start: int, count: int) -> bytes:
        found = b""
        try:
            while len(found) < count and (more := os.pread(self._handle, count - len(found), start + len(found))):
                found += more
        except OSError as error:
            raise RunError(f"{self.named}: cannot be read: {error.strerror}") from error
        return found

    def blocks(self) -> Iterator[tuple[int, bytes]]:
        """Pieces of whole lines with their offsets; each is UTF-8 text without a NUL.

        Raises:
            InputError: it is not, or a line is too long to be one.
        """
        start = self.start
        while start < self.size:
            stop, block = start, b""
            while stop < self.size and b"\n" not in block:
                if len(block) > LONGEST_ROW:
                    raise InputError(f"{self.named}: line {self.line(start)} is longer than {LONGEST_ROW // 2**20} MB")
                more = self.read(stop, min(stop + BLOCK, self.size))
                block, stop = block + more, stop + len(more)
            if stop < self.size:
                block = block[: block.rindex(b"\n") + 1]
            self._require_text(block, start)
            yield start, block
            start += len(block)

    def line(self, offset: int) -> int:
        """The number of the line that ``offset`` lies in, from 1."""
        count, at = 1, 0
        while at < offset:
            block = self.read(at, min(at + BLOCK, offset))
            count, at = count + block.count(b"\n"), at + len(block)
        return count

    def _require_text(self, block: bytes, start: int) -> None:
        if (at := block.find(b"\0")) >= 0:
            line = self.line(start + at)
            raise InputError(f"{self.named}: line {line} holds a NUL: a binary file, or UTF-16 text; save it as UTF-8 text")
        if not block.isascii():
            try:
                block.decode()
            except UnicodeDecodeError as error:
                line = self.line(start + error.start)
                raise InputError(f"{self.named}: line {line} is not UTF-8 text; convert the file") from error
