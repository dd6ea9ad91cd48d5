"""Exposed time of the phases of an iteration."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator

import torch

PHASES = ("sync", "probe", "select", "prefix", "rollout", "decode", "reward", "advantage", "update")


class PhaseTimer:
    """Adds up seconds per phase; on CUDA with events, read once per iteration, so that timing waits for nothing.

    Attributes:
        listener: told the name of each phase as it begins.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._seconds: dict[str, float] = {}
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []
        self._open: str | None = None
        self.listener: Callable[[str], object] = lambda phase: None

    @contextlib.contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Time what runs inside as ``phase``.

        Raises:
            RuntimeError: inside another phase: its seconds would count twice.
        """
        if self._open is not None:
            raise RuntimeError(f"phase {phase} inside phase {self._open}: phases do not nest")
        self.listener(phase)
        self._open, start = phase, self._mark()
        try:
            with torch.profiler.record_function(phase):
                yield
        finally:
            self._open = None
        end = self._mark()
        if self._cuda:
            self._events.append((phase, start, end))
        else:
            self._seconds[phase] = self._seconds.get(phase, 0.0) + end - start

    def read(self) -> dict[str, float]:
        """Seconds per phase since the last call."""
        for phase, start, end in self._events:
            end.synchronize()
            self._seconds[phase] = self._seconds.get(phase, 0.0) + start.elapsed_time(end) / 1000
        seconds, self._seconds, self._events = self._seconds, {}, []
        return seconds

    def _mark(self):
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event
