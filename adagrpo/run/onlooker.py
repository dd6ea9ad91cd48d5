"""The run folder as ranks other than the first have it: they read checkpoints, and write nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .folder import RunFolder


class Onlooker(RunFolder):
    """What the first rank writes is no other's to write; what it finds in the folder, the others are told (``Ranks.told``).

    Args:
        continued: as the first rank's.
    """

    def __init__(self, path: Path, continued: bool) -> None:
        super().__init__(path)
        self.continued = continued

    def write_json(self, name: str, value: Any) -> None:
        """Nothing."""

    def extend_manifest(self, entries: dict[str, Any]) -> None:
        """Nothing."""

    def log(self, record: dict[str, Any]) -> None:
        """Nothing."""

    def event(self, iteration: int, kind: str, message: str) -> None:
        """Nothing."""

    def vouch(self, picture: Path) -> None:
        """Nothing."""
