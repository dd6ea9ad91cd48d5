"""Work that the ranks of one machine would all do alike, downloads above all, is done by one of them.

Without a process group: whoever comes first holds the kernel's lock on a file, does the work and writes down what came of it;
the others wait for the lock and read that. The lock goes with its process, however that ends, and the next one does the work.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from ..errors import RunError
from ..text.strict_json import from_json, to_json
from .files import write_json
from .lock import UNSUPPORTED
from .owner import boot_id, start_of

KEPT_SECONDS = 7 * 86400.0


def once(folder: Path, work: str, make: Callable[[], str]) -> str:
    """What ``make`` returns, called by one of the ranks of a machine; by this process where it is alone.

    Where the file system has no locks every rank calls it.

    Args:
        folder: for the records, which all ranks of the machine see; made where it is missing.
        work: names what is done, and everything that its outcome depends on.

    Raises:
        RuntimeError: it failed in another rank; there its own error is raised.
    """
    if not _has_company():
        return make()
    record = folder / f"{_digest(work)}.json"
    with _turn(record.with_suffix(".lock")) as mine:
        if mine and record.exists():
            found = from_json(record.read_text("utf-8"))
            if "error" in found:
                raise RuntimeError(f"another rank of this machine tried: {found['error']}")
            return str(found["made"])
        try:
            made = make()
        except Exception as error:
            _note(mine, record, "error", f"{type(error).__name__}: {error}")
            raise
        _note(mine, record, "made", made)
        return made


def hub_folder() -> Path:
    """Folder for records of downloads from the Hub: in its cache, beside its own locks."""
    from huggingface_hub.constants import HF_HUB_CACHE

    return Path(HF_HUB_CACHE) / ".locks" / "adagrpo"


@contextlib.contextmanager
def in_turn(folder: Path, work: str) -> Iterator[None]:
    """Inside, no other rank of this machine does this work: the first one finds nothing there, the others what it left."""
    if not _has_company():
        yield
        return
    with _turn(folder / f"{_digest(work)}.lock"):
        yield


@contextlib.contextmanager
def _turn(file: Path) -> Iterator[bool]:
    """Hold the lock on ``file``; False where it cannot be had."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        _sweep(file.parent)
        handle = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except OSError:  # such as a cache that others filled, and that is read only
        yield False
        return
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
        except OSError as error:
            if error.errno not in UNSUPPORTED:
                raise
            yield False
        else:
            yield True
    finally:
        os.close(handle)


def _has_company() -> bool:
    return os.environ.get("LOCAL_WORLD_SIZE", "1").strip() not in ("", "0", "1")


def _note(mine: bool, record: Path, what: str, text: str) -> None:
    """Where it cannot be written, the next rank does the work again."""
    with contextlib.suppress(RunError, OSError):
        if mine:
            write_json(record, {what: text})


def _digest(work: str) -> str:
    """Of the work and of this start of the ranks, whose parent is one process: what another found may no longer be so."""
    parent, attempt = os.getppid(), os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return hashlib.sha256(to_json([work, boot_id(), parent, start_of(parent), attempt]).encode()).hexdigest()[:32]


def _sweep(folder: Path) -> None:
    """Remove what earlier starts left."""
    oldest = time.time() - KEPT_SECONDS
    for path in folder.iterdir():
        with contextlib.suppress(OSError):
            if path.suffix in (".json", ".lock") and path.stat().st_mtime < oldest:
                path.unlink()
