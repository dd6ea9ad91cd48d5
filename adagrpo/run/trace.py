"""Traces of torch's profiler, which says nothing when its temporary file could not be written to the end."""

from __future__ import annotations

import gzip
import tempfile
from pathlib import Path
from typing import Any


def export_trace(profiler: Any, path: str) -> None:
    """Write a finished profile as a Chrome trace; names ending in ``.gz`` are compressed.

    Raises:
        ValueError: only a part of it was written.
    """
    profiler.export_chrome_trace(path)
    opened = gzip.open if path.endswith(".gz") else open
    end = b""
    with opened(Path(path), "rb") as file:
        while chunk := file.read(2**20):
            end = (end + chunk)[-64:]
    if not end.rstrip().endswith(b"}"):
        raise ValueError(f"the profiler wrote only a part of it; is there room in {tempfile.gettempdir()}?")
