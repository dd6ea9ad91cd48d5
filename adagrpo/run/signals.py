"""Stopping politely: the first signal lets the iteration finish and saves, a second Ctrl-C leaves at once.

Outside the iterations there is nothing to save: a signal leaves at once, but as an exception, so that drafts and locks go.
Signals that are ignored when the process starts, as ``nohup`` and background jobs have it, stay ignored.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from types import FrameType

from ..errors import Stopped

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
Handler = Callable[[int, FrameType | None], None]


class StopRequest:
    """Whether a signal asked the run to stop.

    Attributes:
        signal: the first signal received, or None.
    """

    def __init__(self, say: Callable[[str], None]) -> None:
        self.signal: signal.Signals | None = None
        self._say = say
        self._interrupted = False

    @property
    def exit_code(self) -> int:
        """128 plus the signal's number, as shells count: 129 SIGHUP, 130 Ctrl-C, 138 SIGUSR1, 143 SIGTERM."""
        return 128 + self.signal if self.signal else 0

    @contextlib.contextmanager
    def listening(self) -> Iterator[StopRequest]:
        """Handle the signals inside; earlier handlers come back afterwards."""
        with handling(SIGNALS, self._receive):
            yield self

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self._interrupted and number == signal.SIGINT:
            raise KeyboardInterrupt
        first = self.signal is None
        self._interrupted |= number == signal.SIGINT
        self.signal = self.signal or signal.Signals(number)
        again = "Ctrl-C once more" if self._interrupted else "Ctrl-C twice"
        if first or number == signal.SIGINT:
            # A line that was being written may not be written into; the request counts all the same.
            with contextlib.suppress(RuntimeError, OSError):
                self._say(f"{self.signal.name}: finishing this iteration, then saving ({again} leaves at once without saving)")


@contextlib.contextmanager
def leaving() -> Iterator[None]:
    """Inside, SIGTERM, SIGHUP and SIGUSR1 raise ``Stopped``, once, as Ctrl-C raises ``KeyboardInterrupt``."""
    received = False

    def leave(number: int, frame: FrameType | None) -> None:
        nonlocal received
        if not received:
            received = True
            raise Stopped(signal.Signals(number))

    with handling(SIGNALS[1:], leave):
        yield


def ignore_signals() -> None:
    """From now on none of them disturbs a process that is ending."""
    if threading.current_thread() is threading.main_thread():
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)


@contextlib.contextmanager
def handling(numbers: Sequence[signal.Signals], handler: Handler) -> Iterator[None]:
    """Handle those of the signals that are not ignored; only the main thread can."""
    earlier = {}
    if threading.current_thread() is threading.main_thread():
        for number in numbers:
            if (before := signal.getsignal(number)) not in (signal.SIG_IGN, None):
                earlier[number] = before
                signal.signal(number, handler)
    try:
        yield
    finally:
        for number, before in earlier.items():
            signal.signal(number, before)
