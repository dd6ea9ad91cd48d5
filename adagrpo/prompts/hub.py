"""Data sets of the Hub, or of a local folder, by the package ``datasets``."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..disk.turns import hub_folder, in_turn
from ..errors import InputError
from ..text.user_text import cut, shown
from .checks import cleaned
from .fields import prompt_field, shows_pictures
from .index import Index
from .prompt import Prompt
from .reading import Part, Reading

_MEDIA = {"Image", "Audio", "Video", "Pdf", "Nifti"}


class HubRows:
    """The prompts of a data set (``Rows``); its rows stay on the disk.

    Args:
        name: ``owner/name``, ``owner/name/configuration`` or a folder; behind a colon the name of a split.

    Raises:
        InputError: there is no such data set, or it cannot be meant as prompts.
    """

    def __init__(self, name: str, named: str, reading: Reading, part: Part | None) -> None:
        self.named = named
        rows = _load(name, named)
        kept = [column for column, feature in rows.features.items() if type(feature).__name__ not in _MEDIA]
        if not kept:
            raise InputError(f"{named}: has no column of text")
        self._field, self.pictures = prompt_field(kept, reading.field, named), shows_pictures(list(rows.features))
        self._rows = rows.select_columns([self._field] if self.pictures else kept)
        self.has_data = len(self._rows.features) > 1
        index = Index(named, lambda row: f"row {row}", reading, part)
        row = 0
        for batch in rows.select_columns([self._field]).iter(1000):
            for text in batch[self._field]:
                if not isinstance(text, str) or not cleaned(text):
                    index.refuse(row, f"holds {shown(text)} where the prompt should be")
                else:
                    index.add(row, row + 1, cleaned(text))
                row += 1
        self._numbers, _, self.keys = index.columns()
        self.notes = index.notes

    def some(self, rows: NDArray[np.int64]) -> Iterator[Prompt]:
        """The prompts of these rows."""
        for row in self._numbers[rows].tolist():
            data: dict[str, Any] = self._rows[row]
            text = cleaned(data.pop(self._field))
            yield Prompt(text, data) if data else Prompt(text)

    def place(self, row: int) -> str:
        """The number of a row, from 0 as on the Hub."""
        return f"row {self._numbers[row]}"


def _load(name: str, named: str) -> Any:
    """The rows of a data set."""
    try:
        import datasets
    except ImportError as error:
        raise InputError(f"{named}: needs the package datasets: pip install 'adagrpo[data]'") from error
    path, _, split = name.partition(":")
    owner, _, configuration = path.partition("/")
    title, _, configuration = configuration.partition("/")
    where = (path, None) if Path(path).is_dir() else (f"{owner}/{title}" if title else owner, configuration or None)
    try:
        with in_turn(hub_folder(), f"data set {where}"):
            found = datasets.load_dataset(*where)
    except Exception as error:  # of many packages, the network's included
        raise InputError(f"{named}: cannot be loaded: {type(error).__name__}: {cut(str(error), 400)}") from error
    splits = ", ".join(found)
    if split and split not in found:
        raise InputError(f"{named}: has no split {split}: it has {splits}")
    if not split and len(found) > 1:
        raise InputError(f"{named}: has the splits {splits}; name one behind a colon: hub:{path}:{next(iter(found))}")
    return found[split or next(iter(found))]
