"""What a run tells: lines for the user, and the events of its folder."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

from ..text.redaction import scrubbed
from ..train import Trainer
from .folder import RunFolder


class Telling:
    """Tells the user, and writes down what was told.

    Args:
        trainer: whose notices are told, and whose finished iterations date the events.
        run: the folder.
        say: receives lines for the user; a terminal or log that takes no more ends nothing.
    """

    def __init__(self, trainer: Trainer, run: RunFolder, say: Callable[[str], None]) -> None:
        self.trainer, self.run, self._say = trainer, run, say
        trainer.notices.say = self.noticed

    def say(self, line: str) -> None:
        """A line for the user alone, by one rank; the run's own record is its folder."""
        if not self.trainer.ranks.writes:
            return
        with contextlib.suppress(OSError, ValueError):
            self._say(line)

    def event(self, kind: str, message: str, iteration: int | None = None) -> None:
        """An event of ``iteration``, the last finished one unless it is named."""
        if self.trainer.ranks.writes:
            self.run.event(self.trainer.iterations_done if iteration is None else iteration, kind, message)
        self.say(scrubbed(message))

    def noticed(self, message: str) -> None:
        """What the trainer has to tell, as an event."""
        self.event("memory" if message.startswith("out of memory") else "warning", message)

    def warn(self, message: str) -> None:
        """An event that is a warning."""
        self.event("warning", message)

    def notices(self) -> None:
        """What the run folder found on opening, to the user and the events; what was told of the trainer's making, to those."""
        for notice in self.trainer.notices.told_early():
            if self.trainer.ranks.writes:
                self.run.event(self.trainer.iterations_done, "warning", notice)
        notices, self.run.notices = self.run.notices, []
        for notice in notices:
            self.warn(notice)
