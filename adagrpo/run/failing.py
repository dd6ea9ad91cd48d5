"""Who failed first: of several ranks each leaves a word in the run folder before it goes, and the others read it.

``ranks/`` of the run folder holds a heartbeat of each rank while it runs, ``rank-N.json``, and why it left, ``failed-N.json``.
The error of a rank that merely waited for another one in vain names that one.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

from ..disk.files import told, write_text
from ..engine.heartbeat import read_beats
from ..engine.ranks import FirstRankFailed, Ranks, RanksApart, exit_code
from ..errors import InputError, RunError
from ..report.page import write_report
from ..text.redaction import scrubbed
from ..text.strict_json import from_json, to_json
from .ended import ENDED, launch_notice, note_end
from .folder import RANKS, RunFolder
from .signals import ignore_signals

NEWS = 5.0
"""Seconds that a survivor looks for a word of the rank that failed; a network file system may show it late."""
GRACE = 10.0
"""Seconds in which a rank leaves by itself once another one has; then it is ended where it stands."""
POLL = 0.1

Kind = Literal["failed", "stopped", "waited"]


@dataclasses.dataclass(frozen=True)
class Word:
    """Why a rank left.

    Attributes:
        error: its own exception, with its type.
        kind: ``failed`` by itself, ``stopped`` by a signal, or ``waited`` for another rank in vain.
        code: its exit code.
        time: seconds since 1970, by its own clock.
    """

    error: str
    kind: Kind
    code: int
    rank: int
    host: str
    phase: str
    iteration: int
    time: float


@contextlib.contextmanager
def accounted(ranks: Ranks, run: RunFolder) -> Iterator[None]:
    """Inside, all ranks train in ``run``; they leave together, or each leaves a word of why it goes.

    Raises:
        RunError: another rank failed, or is gone, or hangs; the message names it.
    """
    folder = run.path / RANKS
    ranks.told(lambda: _begin(run, folder), "the records of the ranks")
    if ranks.size == 1:
        with _noting_end(run):
            yield
        return
    ranks.told(lambda: folder.mkdir(parents=True, exist_ok=True), "the records of the ranks")
    ranks.beat.into(folder)
    try:
        with _Watch(ranks, run):
            yield
            ranks.most(0, "the end of the run")
        ranks.beat.into(None)
    except BaseException as error:
        ignore_signals()  # torchrun sends one to the survivors at once: they say why they go all the same
        better = _account(error, ranks, run)
        if better is error:
            raise
        raise better from error
    ranks.most(0, "the end of the heartbeats")
    if ranks.writes:
        _clear(folder)


@contextlib.contextmanager
def _noting_end(run: RunFolder) -> Iterator[None]:
    """One process may have been started by torchrun too."""
    try:
        yield
    except BaseException as error:
        code = exit_code(error)
        told(lambda: note_end(run.path, code), lambda line: None)
        raise


def _begin(run: RunFolder, folder: Path) -> None:
    """Nothing of how an earlier start ended is left; what its first rank could not write down is told."""
    words = _words(folder)
    if not any(word.rank == 0 for word in words):
        of_survivors = [word.error for word in words if word.kind == "waited"]  # who hung then may be killed by now
        if said := (of_survivors or [first_failure(folder)[0]])[0]:
            run.notices.append(f"the start before this one ended: {said}")
    _clear(folder)
    (run.path / ENDED).unlink(missing_ok=True)
    if notice := launch_notice():
        run.notices.append(notice)


def _clear(folder: Path) -> None:
    """Remove what ranks said; what NCCL dumped there stays."""
    with contextlib.suppress(OSError):
        for file in folder.glob("*.json"):
            file.unlink(missing_ok=True)
        folder.rmdir()


def first_failure(folder: Path, mine: int = -1) -> tuple[str, bool]:
    """Who of the ranks failed first, in words, and whether that is certain: not where one is only known to lag behind.

    Args:
        mine: the rank that asks, which is there.
    """
    beats = read_beats(folder)
    gone = [beat for beat in beats if beat.rank != mine and beat.process.life() == "gone"]
    words = sorted(_words(folder), key=lambda word: word.time)  # read later: who is gone has left its word
    for kind, verb in (("failed", "failed first"), ("stopped", "was stopped")):
        for word in words:
            if word.kind == kind:
                where = f"in phase {word.phase}" + (f" of iteration {word.iteration}" if word.iteration else "")
                return f"rank {word.rank} on {word.host} {verb}, {where}: {word.error}", kind == "failed"
    spoken = {word.rank for word in words}
    for beat in gone:
        if beat.rank not in spoken:
            return f"rank {beat.rank} on {beat.process.host} is gone without a word (killed?), last seen {beat.where}", True
    here = next((beat.met for beat in beats if beat.rank == mine), math.inf)
    silent = [beat for beat in beats if beat.rank not in spoken and beat.rank != mine and beat.met < here]
    if not silent:
        return "", False
    last = min(silent, key=lambda beat: (beat.met, beat.time))
    at = time.strftime("%H:%M:%S", time.localtime(last.time))
    stands = f", at {last.stands}" if last.stands else ""
    lags = f"process {last.process.pid}, {last.where} since {at}{stands}"
    return f"rank {last.rank} on {last.process.host} hangs or lags behind ({lags})", bool(last.stands)


def _account(error: BaseException, ranks: Ranks, run: RunFolder) -> BaseException:
    """Leave a word of why this rank goes; the error that it goes with."""
    code, stopped = exit_code(error), isinstance(error, KeyboardInterrupt)
    mine = f"{type(error).__name__}: {error}"
    if not stopped and not isinstance(error, RanksApart | FirstRankFailed):
        _leave_word(ranks, run, mine, "failed", code)
        said, _ = first_failure(run.path / RANKS, ranks.rank)
        _record(ranks, run, "" if isinstance(error, InputError) else said, code)
        return error
    if not stopped:
        _leave_word(ranks, run, mine, "waited", code)
    said, certain = _searched(ranks, run, 1.0 if stopped else NEWS)
    if stopped and not certain:
        _leave_word(ranks, run, mine, "stopped", code)
        _record(ranks, run, "", code)
        return error
    if isinstance(error, FirstRankFailed) and code != 1:  # it ended on purpose, and said why
        return error
    shown = str(error) if isinstance(error, RanksApart) else f"rank {ranks.rank} of {ranks.size} cannot go on"
    better = RunError(f"{said}; {shown}" if said else shown)
    _leave_word(ranks, run, str(better), "waited")
    _record(ranks, run, said, 2 if any(word.code == 2 for word in _words(run.path / RANKS)) else 1)
    return better


def _searched(ranks: Ranks, run: RunFolder, seconds: float) -> tuple[str, bool]:
    """``first_failure``, as soon as it is certain, or after a while."""
    end = time.monotonic() + min(seconds, ranks.timeout)
    while True:
        said, certain = first_failure(run.path / RANKS, ranks.rank)
        if certain or time.monotonic() > end:
            return said, certain
        time.sleep(POLL)


def _leave_word(ranks: Ranks, run: RunFolder, error: str, kind: Kind, code: int = 1) -> None:
    beat = ranks.beat.now
    word = Word(scrubbed(error), kind, code, beat.rank, beat.process.host, beat.phase, beat.iteration, time.time())
    file = run.path / RANKS / f"failed-{beat.rank}.json"
    told(lambda: write_text(file, to_json(dataclasses.asdict(word), indent=1)), lambda line: None)


def _words(folder: Path) -> list[Word]:
    """What the ranks left that can be read."""
    found = []
    for file in folder.glob("failed-*.json"):
        with contextlib.suppress(OSError, ValueError, TypeError):
            found.append(Word(**from_json(file.read_text("utf-8"))))
    return found


def _record(ranks: Ranks, run: RunFolder, said: str, code: int) -> None:
    """The first rank writes down in the run who failed first, and an end on purpose."""

    def write() -> None:
        note_end(run.path, code)
        if said and (run.path / "config.toml").exists():
            run.event(max(0, ranks.beat.now.iteration - 1), "failure", said)
            write_report([run.path], run.path / "report.html")

    if ranks.writes:
        told(write, lambda line: None)


class _Watch:
    """Ends this rank where it stands if another one has left, and this one does not come to know it by itself.

    As soon as another has left, the heartbeat says where this one's main thread stands.
    """

    def __init__(self, ranks: Ranks, run: RunFolder) -> None:
        self.ranks, self.run, self._over = ranks, run, threading.Event()
        self._main = threading.get_ident()

    def __enter__(self) -> None:
        threading.Thread(target=self._look, daemon=True, name="ranks-watch").start()

    def __exit__(self, *_: object) -> None:
        self._over.set()

    def _look(self) -> None:
        folder, left, told_where = self.run.path / RANKS, 0.0, False
        while not self._over.wait(5 * POLL):
            if not left and any(word.rank != self.ranks.rank for word in _words(folder)):
                left = time.monotonic()
            if left and not told_where:
                told_where = True
                self.ranks.beat.stands(self._place())
            if left and time.monotonic() > left + min(GRACE, self.ranks.timeout):
                self._leave()

    def _place(self) -> str:
        """Where the main thread stands, innermost first."""
        frame = sys._current_frames().get(self._main)
        frames: Sequence[traceback.FrameSummary] = traceback.extract_stack(frame)[-3:] if frame else ()
        return ", called from ".join(f"{Path(f.filename).name}:{f.lineno} {f.name}" for f in reversed(frames))

    def _leave(self) -> None:
        place, (said, _) = self._place(), first_failure(self.run.path / RANKS)
        if self._over.is_set():
            return
        error = f"rank {self.ranks.rank} of {self.ranks.size} was ended where it stood, at {place}: {said}"
        _leave_word(self.ranks, self.run, error, "waited")
        _record(self.ranks, self.run, said, 1)
        with contextlib.suppress(OSError, ValueError):
            print(f"adagrpo, rank {self.ranks.rank}: {scrubbed(error)}", file=sys.stderr, flush=True)
        os._exit(1)
