"""Encoders that several rewards hold: one module for all that name the same checkpoint and use it alike."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Hashable, Iterator
from contextvars import ContextVar
from pathlib import Path
from typing import TypeVar
from weakref import WeakValueDictionary

from torch import nn

M = TypeVar("M", bound=nn.Module)

_held: WeakValueDictionary[Hashable, nn.Module] = WeakValueDictionary()
_loading = threading.Lock()
_use: ContextVar[Hashable] = ContextVar("use", default=None)


@contextlib.contextmanager
def used(how: Hashable) -> Iterator[None]:
    """Within it a module is shared only with those that use it so, such as on one device: between two it would travel."""
    token = _use.set(how)
    try:
        yield
    finally:
        _use.reset(token)


def shared(key: Hashable, load: Callable[[], M]) -> M:
    """The module that a living reward of this use (``used``) holds under ``key``, else ``load()``; it is frozen.

    It is gone with its last holder.

    Args:
        key: all that the module depends on: its kind, files (``place``), architecture and dtype.
    """
    key = (_use.get(), key)
    with _loading:
        module = _held.get(key)
        if module is None:
            module = _held[key] = load()
        return module  # type: ignore[return-value]


def place(path: str | Path) -> str:
    """What two names of one file or folder share; a Hub id is itself."""
    return str(Path(path).resolve()) if Path(path).exists() else str(path)
