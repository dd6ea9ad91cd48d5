"""A folder never has two writers.

Whoever writes into a folder holds the kernel's lock on ``.owner.lock`` in it, whatever path led there; it goes with the
process, however that ends. ``.owner.json`` beside it says who. Where the file system refuses locks, that record alone is the
claim, and its modification time the heartbeat.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
import threading
import time
import uuid
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path

from ..errors import InputError, RunError
from .owner import Owner, read_owner, this_process

STALE_SECONDS = 300.0
BEAT_SECONDS = 30.0
# What file systems without locks answer: NFS without a lock daemon, Lustre without the flock option, FUSE, others.
UNSUPPORTED = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL}
FULL = {errno.ENOSPC, errno.EDQUOT}
NAMES = (".owner.lock", ".owner.json", ".owner.taking")


class OwnerLock:
    """The right to write into a folder, or to one file in it.

    Args:
        folder: made, with its parents, where it is missing.
        command: what this process does, for others to read.
        shown: how messages name it, such as ``--out runs/first``.
        file: name of the one file; none is the whole folder.
        take_over: also from an owner on another host that gave no sign of life for ``STALE_SECONDS``; None where the command
            has no such option.
        made: folders that the caller just made for this.
    """

    def __init__(
        self,
        folder: Path,
        command: str,
        shown: str,
        file: str = "",
        take_over: bool | None = None,
        made: Sequence[Path] = (),
    ) -> None:
        self.folder, self.command, self.shown, self.take_over = folder, command, shown, take_over
        place = folder.absolute()  # a part may change the working directory
        self.file, self.record, self._taking = (place / (f".{file}{name}" if file else name) for name in NAMES)
        self.owner: Owner | None = None
        self._handle = -1
        self._made = list(made)
        self._stop = threading.Event()

    def acquire(self) -> None:
        """Take the folder.

        Raises:
            InputError: somebody else has it, or it cannot be made or written; nothing in it was touched.
            RunError: the disk is full.
        """
        try:
            while self.owner is None:
                self._make_folder()
                self._take()
        except OSError as error:
            self.release()
            if error.errno in FULL:
                raise RunError(f"{self.shown}: {error.strerror}; free disk space or name another folder") from error
            raise InputError(f"{self.shown}: cannot be written: {error.strerror or error}") from error
        except BaseException:
            self.release()
            raise
        _HELD.add(self)
        threading.Thread(target=self._beat, daemon=True, name="owner-heartbeat").start()

    def release(self) -> None:
        """Give the folder up; one that was made for this and is still empty goes."""
        self._stop.set()
        _HELD.discard(self)
        with contextlib.suppress(OSError):
            if self.owner is not None and self.owned():
                self.record.unlink(missing_ok=True)
        if self._handle >= 0:
            with contextlib.suppress(OSError):  # while it is locked: nobody else can hold this file
                self.file.unlink(missing_ok=True)
            os.close(self._handle)
        self.owner, self._handle = None, -1
        for path in reversed(self._made):
            with contextlib.suppress(OSError):
                path.rmdir()

    def owned(self) -> bool:
        """Whether nobody took the folder from this process."""
        now = read_owner(self.record)
        return self.owner is not None and (now is None or now.token == self.owner.token)

    def require(self) -> None:
        """Go on only if the folder is still this process's.

        Raises:
            RunError: it was taken over.
        """
        if not self.owned():
            raise RunError(f"{self.shown}: was taken over by {read_owner(self.record)}; this process writes no more into it")

    def leave(self) -> None:
        """In a forked child: let go without unlocking, so that the lock ends with the parent."""
        if self._handle >= 0:
            os.close(self._handle)
        self.owner, self._handle, self._made = None, -1, []

    def _make_folder(self) -> None:
        missing = [path for path in (self.folder, *self.folder.parents) if not path.exists()]
        for path in reversed(missing):
            with contextlib.suppress(FileExistsError):
                path.mkdir()
                self._made.append(path)
        if not self.folder.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, "not a folder")

    def _take(self) -> None:
        """One try; returns without an owner where the last one is just removing the lock file, or the folder with it."""
        try:
            handle, created = _open(self.file)
        except FileNotFoundError:
            return
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not _is_same(handle, self.file):
                return
            self._handle, handle = handle, -1
        except BlockingIOError:
            raise self._refusal(self._who()) from None
        except OSError as error:
            if error.errno not in UNSUPPORTED:
                raise
            if created:
                self.file.unlink(missing_ok=True)
            self._claim(this_process(self.command, locked=False))
            return
        finally:
            if handle >= 0:
                os.close(handle)
        before = read_owner(self.record)
        if before is not None and not before.locked:
            self._may_replace(before)
        elif before is not None and before.host != socket.gethostname() and self._beats():
            raise self._refusal(before)
        owner = this_process(self.command, locked=True)
        self._draft(owner).replace(self.record)
        self.owner = owner

    def _claim(self, owner: Owner) -> None:
        """Without a lock: the record is the claim. Created if missing, replaced if its owner is gone."""
        try:
            with self.record.open("x", encoding="utf-8") as file:
                file.write(owner.to_json())
        except FileExistsError:
            self._replace(owner)
        self.owner = owner

    def _replace(self, owner: Owner) -> None:
        """Put ``owner`` in the place of one that is gone; of several who try, one at a time."""
        before = read_owner(self.record)
        self._may_replace(before)
        with contextlib.suppress(FileNotFoundError):
            if self._age(self._taking) > STALE_SECONDS:
                self._taking.rmdir()
        try:
            self._taking.mkdir()
        except FileExistsError:
            raise self._refusal("another process, which is just taking it") from None
        try:
            if read_owner(self.record) != before:
                raise self._refusal(self._who())
            self._draft(owner).replace(self.record)
        finally:
            self._taking.rmdir()

    def _may_replace(self, before: Owner | None) -> None:
        """Refuse to follow an owner that may still write."""
        life = "unknown" if before is None else before.life()
        if life == "gone":
            return
        silent = self._age(self.record)
        if life == "alive" or silent < STALE_SECONDS:
            raise self._refusal(before or "another process, which is just taking it")
        if not self.take_over:
            remedy = f"remove {self.record}" if self.take_over is None else "go on with --take-over"
            raise InputError(
                f"{self.shown}: in use by {before or 'an unnamed process'}, which gave no sign of life for {silent / 60:.0f} "
                f"minutes; if it runs no more, {remedy}"
            )

    def _who(self) -> Owner | str:
        """Who has the lock: it may just be writing its name over that of the last one."""
        for _ in range(20):
            owner = read_owner(self.record)
            if owner is not None and owner.life() != "gone":
                return owner
            time.sleep(0.05)
        return "another process, which did not say which"

    def _refusal(self, owner: Owner | str) -> InputError:
        return InputError(f"{self.shown}: in use by {owner}; wait until it ends, stop it, or name another folder")

    def _draft(self, owner: Owner) -> Path:
        draft = self.record.with_name(f"{self.record.name}.{owner.token}.partial")
        try:
            draft.write_text(owner.to_json(), "utf-8")
        except BaseException:
            draft.unlink(missing_ok=True)
            raise
        return draft

    def _age(self, path: Path) -> float:
        """Seconds since ``path`` was touched, by the file system's clock: hosts differ."""
        probe = self.record.with_name(f"{self.record.name}.{uuid.uuid4().hex}.partial")
        probe.touch()
        try:
            return probe.stat().st_mtime - path.stat().st_mtime
        finally:
            probe.unlink()

    def _beats(self) -> bool:
        """Whether the record shows a sign of life within the time of a heartbeat: some network file systems grant a lock on
        every host, so that ours says nothing of an owner on another one. Where it has been silent for two, at once."""
        before, end = self.record.stat().st_mtime, time.monotonic() + 1.2 * BEAT_SECONDS
        if self._age(self.record) > 2 * BEAT_SECONDS:
            return False
        while time.monotonic() < end:
            time.sleep(BEAT_SECONDS / 20)
            with contextlib.suppress(FileNotFoundError):
                if self.record.stat().st_mtime != before:
                    return True
        return False

    def _beat(self) -> None:
        """Show signs of life until ``release``."""
        while not self._stop.wait(BEAT_SECONDS):
            with contextlib.suppress(OSError):
                if self.owned():
                    os.utime(self.record)


@contextlib.contextmanager
def holding(lock: OwnerLock) -> Iterator[OwnerLock]:
    """Own the folder inside."""
    lock.acquire()
    try:
        yield lock
    finally:
        lock.release()


@contextlib.contextmanager
def holding_new(folder: Path, command: str, shown: str) -> Iterator[None]:
    """Own a folder inside that holds nothing yet.

    Raises:
        InputError: something is in it, or somebody else has it.
    """
    refused = InputError(f"{shown}: not an empty folder; name another one")
    try:
        if not is_unused(folder) and not is_claimed(folder):
            raise refused
    except OSError as error:
        raise InputError(f"{shown}: cannot be used: {error.strerror}") from error
    with holding(OwnerLock(folder, command, shown)):
        if not is_unused(folder):
            raise refused
        yield


def require_free(folder: Path, shown: str) -> None:
    """Without touching anything: refuse a folder whose owner is known to run.

    Raises:
        InputError: naming it.
    """
    owner = read_owner(folder / NAMES[1])
    if owner is not None and owner.life() == "alive":
        raise InputError(f"{shown}: in use by {owner}; wait until it ends, stop it, or name another folder")


def is_claimed(folder: Path) -> bool:
    """Whether an owner has signed there, alive or not."""
    return (folder / NAMES[1]).exists()


def is_unused(folder: Path) -> bool:
    """Whether nothing is there, or a folder with nothing in it but what owners leave when they are killed."""
    if not folder.exists():
        return not folder.is_symlink()
    return folder.is_dir() and all(path.name.startswith(".owner.") for path in folder.iterdir())


def _open(path: Path) -> tuple[int, bool]:
    """A handle of a file that children do not inherit, and whether the file was made now."""
    flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC
    try:
        return os.open(path, flags | os.O_EXCL, 0o666), True
    except FileExistsError:
        return os.open(path, flags, 0o666), False


def _is_same(handle: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), os.stat(path))
    except FileNotFoundError:
        return False


_HELD: weakref.WeakSet[OwnerLock] = weakref.WeakSet()


def _leave_all() -> None:
    for lock in list(_HELD):
        lock.leave()
    _HELD.clear()


os.register_at_fork(after_in_child=_leave_all)
