"""Encoders that several rewards hold: one module for all that name the same checkpoint."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import TypeVar
from weakref import WeakValueDictionary

from torch import nn

M = TypeVar("M", bound=nn.Module)

_held: WeakValueDictionary[Hashable, nn.Module] = WeakValueDictionary()
_loading = threading.Lock()


def shared(key: Hashable, load: Callable[[], M]) -> M:
    """The module that a living reward holds under ``key``, else ``load()``; it is frozen, and gone with its last holder.

    Args:
        key: all that the module depends on: its kind, files (``place``), architecture and dtype.
    """
    with _loading:
        module = _held.get(key)
        if module is None:
            module = _held[key] = load()
        return module  # type: ignore[return-value]


def place(path: str | Path) -> str:
    """What two names of one file or folder share; a Hub id is itself."""
    return str(Path(path).resolve()) if Path(path).exists() else str(path)
