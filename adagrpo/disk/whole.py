"""A folder that appears whole or not at all."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

from .files import flush, settle, writing

DRAFT = ".owner.draft"  # what an owner leaves when it is killed: the next one may use the folder all the same


@contextlib.contextmanager
def written_whole(folder: Path) -> Iterator[Path]:
    """A draft inside ``folder``, this process's own, whose content moves up once it is complete; files come after folders, so
    that a pipeline's ``model_index.json`` is not there before its components.

    Raises:
        WriteError: it cannot be written; nothing is left.
    """
    draft = folder / DRAFT
    shutil.rmtree(draft, ignore_errors=True)
    try:
        with writing(folder):
            draft.mkdir()
            yield draft
            settle(draft)
            for path in sorted(draft.iterdir(), key=lambda path: (path.is_file(), path.name)):
                path.rename(folder / path.name)
            flush(folder)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
