"""Files that are whole or absent: written beside their place, flushed to disk, renamed.

Nothing in AdaGRPO writes to a final name. What was cut short leaves a draft, ``.partial-…``, which ``sweep`` removes.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ..errors import InputError, RunError
from ..text.strict_json import from_json, to_json

DRAFT = ".partial-"
SEAL = "seal"
_LARGEST_JSON = 256 * 2**20
_FULL = 2**20
_REMEDIES = {
    errno.ENOSPC: "free disk space",
    errno.EDQUOT: "free space within your quota",
    errno.EFBIG: "raise the limit on file sizes (ulimit -f)",
    errno.EROFS: "make the file system writable",
    errno.EIO: "check the disk: it reports errors",
    errno.EACCES: "give this user the right to write there",
    errno.EPERM: "give this user the right to write there",
}
_DISK = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO})


class WriteError(RunError):
    """A file could not be written; whatever lay in its place is as before.

    Attributes:
        reason: in the system's words, whatever the writing library raised.
        remedy: what the user can do.
        disk: whether the disk or file system refuses to take more, so that other writes will fail too.
    """

    def __init__(self, path: Path, reason: str, remedy: str, disk: bool) -> None:
        then = "repeat the command; a run goes on with --resume auto"
        super().__init__(f"{path}: cannot be written: {reason}; {remedy}, then {then}")
        self.reason, self.remedy, self.disk = reason, remedy, disk


def write_error(path: Path, error: BaseException) -> WriteError:
    """What went wrong when ``path`` was written, as one kind of error whatever a library raised."""
    number = _error_number(error, path)
    if number is None:
        text = str(error).split("\n", 1)[0]
        reason = text if isinstance(error, OSError) and text else f"{type(error).__name__}: {text}"
        return WriteError(path, reason, "remove the cause", disk=False)
    return WriteError(path, os.strerror(number), _REMEDIES.get(number, "remove the cause"), number in _DISK)


def remedy_for(error: OSError) -> str:
    """What to do about an error of the system, as the end of a message; '' where nothing is known."""
    remedy = _REMEDIES.get(error.errno) if error.errno is not None else None
    return f"; {remedy}" if remedy else ""


def _error_number(error: BaseException, path: Path) -> int | None:
    """The system's error number behind an exception, its causes, or the words of a library that keeps no number."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError) and seen.errno is not None:
            return seen.errno
        seen = seen.__cause__ or seen.__context__
    text = str(error)
    if match := re.search(r"os error (\d+)", text):
        return int(match[1])
    for number in _REMEDIES:
        if os.strerror(number) in text:
            return number
    folder = next(p for p in [path, *path.absolute().parents] if p.is_dir())
    with contextlib.suppress(OSError):
        if "writ" in text and shutil.disk_usage(folder).free < _FULL:
            return errno.ENOSPC
    return None


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Whatever writing ``path`` raises inside becomes a ``WriteError``; errors meant for users pass through."""
    try:
        yield
    except (InputError, RunError):
        raise
    except Exception as error:
        raise write_error(path, error) from error


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A draft to write, file or folder; at the end of the block it takes the place of ``path``, else it vanishes.

    Its name ends as that of ``path``, for libraries that go by the suffix. Modes follow the umask.

    Raises:
        WriteError: ``path`` cannot be written; it is as before.
    """
    draft = path.with_name(f"{DRAFT}{uuid.uuid4().hex[:8]}-{path.name}")
    try:
        with writing(path):
            yield draft
            settle(draft)
            os.replace(draft, path)
            flush(path.parent)
    except BaseException:
        _remove(draft)
        raise


def settle(path: Path) -> None:
    """Bring a file, or all of a folder, to disk, with the modes that the umask gives to new files.

    Libraries that write through temporary files leave theirs readable by the owner only.
    """
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    for file in files:
        if not file.stat().st_mode & 0o077:
            file.chmod(_new_mode(path.parent))
        flush(file)
    if path.is_dir():
        for folder in [*(p for p in path.rglob("*") if p.is_dir()), path]:
            flush(folder)


def _new_mode(folder: Path) -> int:
    """The mode that a new file gets in ``folder``."""
    probe = folder / f"{DRAFT}{uuid.uuid4().hex[:8]}-mode"
    os.close(os.open(probe, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
    mode = probe.stat().st_mode & 0o777
    probe.unlink()
    return mode


def flush(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file in one piece.

    Raises:
        WriteError: it cannot be written; ``path`` is as before.
    """
    with replacing(path) as draft, draft.open("xb") as file:
        file.write(content)


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 file in one piece; a lone surrogate becomes its escape.

    Raises:
        WriteError: it cannot be written; ``path`` is as before.
    """
    write_bytes(path, text.encode("utf-8", "backslashreplace"))


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file in one piece; non-finite numbers become null.

    Raises:
        WriteError: it cannot be written; ``path`` is as before.
    """
    write_text(path, to_json(value, indent=1) + "\n")


def read_json(path: Path) -> Any:
    """The value of a JSON file; None where there is no file.

    Raises:
        ValueError: it is damaged, no regular file, unreadable, or too large to be meant.
    """
    if not os.path.lexists(path):
        return None
    try:
        if not path.is_file():
            raise ValueError("not a regular file")
        if path.stat().st_size > _LARGEST_JSON:
            raise ValueError("too large")
        return from_json(path.read_bytes())
    except OSError as error:
        raise ValueError(str(error)) from error


def sealed(value: dict[str, Any]) -> dict[str, Any]:
    """``value`` with a checksum of itself, so that any change shows."""
    rest = from_json(to_json({key: item for key, item in value.items() if key != SEAL}))
    return {**rest, SEAL: _checksum(rest)}


def is_sealed(value: dict[str, Any]) -> bool:
    """Whether a value read from JSON is what ``sealed`` made of it."""
    return value.get(SEAL) == _checksum({key: item for key, item in value.items() if key != SEAL})


def _checksum(value: dict[str, Any]) -> str:
    return hashlib.sha256(to_json(value).encode()).hexdigest()


def set_aside(path: Path, word: str = "damaged") -> Path:
    """Rename ``name.ext`` to the first free ``name.<word>-N.ext``; returns the new path.

    Raises:
        WriteError: it cannot be renamed.
    """
    number = 1
    while os.path.lexists(aside := path.with_name(f"{path.stem}.{word}-{number}{path.suffix}")):
        number += 1
    with writing(aside):
        path.rename(aside)
    return aside


def sweep(folder: Path) -> None:
    """Remove the drafts that killed processes left in ``folder``; for the owner of the folder only."""
    for pattern in (f"{DRAFT}*", ".*.partial", "metrics.partial"):
        for draft in folder.glob(pattern):
            if not draft.name.startswith(".owner."):  # of somebody who asks for this folder now
                _remove(draft)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
        return
    with contextlib.suppress(OSError):
        path.unlink(missing_ok=True)


def told(action: Callable[[], object], say: Callable[[str], object]) -> None:
    """Do what may fail without hiding an error that is on its way already: its own failure is only said."""
    try:
        action()
    except Exception as error:
        with contextlib.suppress(Exception):
            say(f"{type(error).__name__}: {error}")
