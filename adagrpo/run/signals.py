"""Stopping politely: the first signal lets the iteration finish and saves, a second Ctrl-C leaves at once."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Iterator
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class StopRequest:
    """Whether a signal asked the run to stop.

    Attributes:
        signal: the first signal received, or None.
    """

    def __init__(self, say: Callable[[str], None]) -> None:
        self.signal: signal.Signals | None = None
        self._say = say

    @property
    def exit_code(self) -> int:
        """128 plus the signal's number, as shells count: 130 Ctrl-C, 143 SIGTERM, 138 SIGUSR1."""
        return 128 + self.signal if self.signal else 0

    @contextlib.contextmanager
    def listening(self) -> Iterator[StopRequest]:
        """Handle the signals inside; earlier handlers come back afterwards."""
        earlier = {number: signal.signal(number, self._receive) for number in SIGNALS}
        try:
            yield self
        finally:
            for number, handler in earlier.items():
                signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        if self.signal is None:
            self.signal = signal.Signals(number)
            self._say(f"{self.signal.name}: finishing this iteration, then saving (Ctrl-C leaves at once without saving)")
