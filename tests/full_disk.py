"""A disk that is full from the k-th write on, for everything that Python opens for writing below a folder."""

from __future__ import annotations

import contextlib
import errno
import os
import sys
from collections.abc import Iterator
from pathlib import Path

_state: dict[str, object] = {"root": None, "left": 0, "seen": [], "errno": errno.ENOSPC}
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT


def _hook(event: str, args: tuple) -> None:
    root = _state["root"]
    if root is None or event not in ("open", "os.mkdir"):
        return
    path, mode, flags = (args[0], args[1], args[2]) if event == "open" else (args[0], "w", 0)
    if not isinstance(path, str | bytes | os.PathLike) or not os.fsdecode(path).startswith(root):
        return
    if event == "open" and not ((mode and set(mode) & set("wax+")) or (flags or 0) & _WRITING):
        return
    _state["seen"].append(os.fsdecode(path))  # type: ignore[union-attr]
    _state["left"] -= 1  # type: ignore[operator]
    if _state["left"] < 0:  # type: ignore[operator]
        number = _state["errno"]
        raise OSError(number, os.strerror(number), os.fsdecode(path))  # type: ignore[arg-type]


_installed: list[bool] = []


@contextlib.contextmanager
def full_after(writes: int, root: Path, number: int = errno.ENOSPC) -> Iterator[list[str]]:
    """Within it all writes below ``root`` but the first ``writes`` fail; the list fills with the paths asked for."""
    if not _installed:
        sys.addaudithook(_hook)  # for good; it only acts in here
        _installed.append(True)
    seen: list[str] = []
    _state.update(root=str(root), left=writes, seen=seen, errno=number)
    try:
        yield seen
    finally:
        _state["root"] = None
