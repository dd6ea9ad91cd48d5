"""What the engine has to tell the user, also before anybody listens."""

from __future__ import annotations

from collections.abc import Callable


class Notices:
    """Passes messages on to ``say``, and keeps them until somebody who writes them down has asked for them.

    Attributes:
        say: receives each message.
    """

    def __init__(self, say: Callable[[str], None] = print) -> None:
        self.say = say
        self._early: list[str] | None = []

    def __call__(self, message: str) -> None:
        """Tell ``message``."""
        if self._early is not None:
            self._early.append(message)
        self.say(message)

    def told_early(self) -> list[str]:
        """What was told so far; handed out once."""
        early, self._early = self._early or [], None
        return early
