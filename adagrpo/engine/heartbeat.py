"""Where a rank is, in a file of its own: when it no longer answers, the others read there what it did last."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import time
from collections.abc import Iterator
from pathlib import Path

from ..disk.owner import Owner, this_process
from ..text.strict_json import from_json, to_json

SIZE = 1024
"""Bytes of a heartbeat, padded: one write replaces all of the one before it."""


@dataclasses.dataclass(frozen=True)
class Beat:
    """What a rank said of itself.

    Attributes:
        phase: what it did; where it waited for the others, ``waits`` names the place.
        iteration: 0 before the first one.
        met: collectives that it had begun; all ranks call the same ones, so the one with fewest is behind.
        time: of the last word, in seconds since 1970 by its own clock.
        stands: once another rank has left, where this one's main thread stands.
        process: the rank's.
    """

    rank: int
    phase: str
    iteration: int
    waits: str
    met: int
    time: float
    stands: str
    process: Owner

    @property
    def where(self) -> str:
        """Phase and iteration in words."""
        return f"in phase {self.phase}" + (f" of iteration {self.iteration}" if self.iteration else "")


class Heartbeat:
    """This rank's word of itself. Nothing is written before it has a folder; where it cannot be written, nothing happens.

    Attributes:
        now: what it says.
        waited: seconds in collectives that the host waited for, since they were last read.
    """

    def __init__(self, rank: int = 0) -> None:
        self.now = Beat(rank, "start", 0, "", 0, time.time(), "", this_process(f"train, rank {rank}", locked=False))
        self.waited = 0.0
        self._file: Path | None = None

    def into(self, folder: Path | None) -> None:
        """Write from now on into ``folder``; None ends it."""
        self._file = None if folder is None else beat_file(folder, self.now.rank)
        self._say()

    def at(self, phase: str, iteration: int | None = None) -> None:
        """A phase begins; None is in the same iteration."""
        self._say(phase=phase, iteration=self.now.iteration if iteration is None else iteration, waits="")

    @contextlib.contextmanager
    def waiting(self, place: str) -> Iterator[None]:
        """Inside, the rank waits for the others to come to ``place``."""
        self._say(waits=place, met=self.now.met + 1)
        started = time.perf_counter()
        try:
            yield
        finally:
            self.waited += time.perf_counter() - started

    def stands(self, place: str) -> None:
        """Another rank has left, and this one stands there since its last word."""
        self.now = dataclasses.replace(self.now, stands=place[:256])
        self._write()

    def read_waited(self) -> float:
        """Seconds of waiting since the last call."""
        found, self.waited = self.waited, 0.0
        return found

    def _say(self, **changes: str | int) -> None:
        self.now = dataclasses.replace(self.now, time=time.time(), **changes)  # type: ignore[arg-type]
        self._write()

    def _write(self) -> None:
        if self._file is None:
            return
        line = to_json(dataclasses.asdict(self.now)).encode().ljust(SIZE - 1) + b"\n"
        with contextlib.suppress(OSError):
            handle = os.open(self._file, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o666)
            try:
                os.pwrite(handle, line, 0)
            finally:
                os.close(handle)


def beat_file(folder: Path, rank: int) -> Path:
    """Where that rank's heartbeat lies."""
    return folder / f"rank-{rank}.json"


def read_beats(folder: Path) -> list[Beat]:
    """The heartbeats that can be read, by rank."""
    found = []
    for file in folder.glob("rank-*.json"):
        with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
            known = from_json(file.read_text("utf-8"))
            found.append(Beat(**{**known, "process": Owner(**known["process"])}))
    return sorted(found, key=lambda beat: beat.rank)
