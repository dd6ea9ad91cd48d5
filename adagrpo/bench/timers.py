"""Timers: quantiles 0.5, 0.2, 0.8 of a call, in seconds."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Protocol

import torch

QUANTILES = (0.5, 0.2, 0.8)
ROUNDS = 9


class Timer(Protocol):
    """What times a call."""

    def __call__(self, run: Callable[[], object]) -> list[float]:
        """Quantiles of ``run()``, whose work on the device counts, the host's does not."""


def quantiles(values: Sequence[float]) -> list[float]:
    """``QUANTILES`` of ``values``, interpolated."""
    found = torch.tensor(values, dtype=torch.float64).quantile(torch.tensor(QUANTILES, dtype=torch.float64))
    return found.tolist()


class GraphTimer:
    """Time of a call inside a CUDA graph, with a cold L2: neither launches from the host nor a warm cache flatter or hide it.

    One graph holds ``n`` times (overwrite more than the L2, call), another overwrites alone; their difference over ``n`` is the
    call. Both are replayed in turn. ``n`` calls take about 20 ms, or 50 are enough.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        size = max(2 * torch.cuda.get_device_properties(device).L2_cache_size, 2**26)
        self.cold = torch.empty(size, dtype=torch.uint8, device=device)
        self.alone: dict[int, torch.cuda.CUDAGraph] = {}  # by how often it overwrites

    def __call__(self, run: Callable[[], object]) -> list[float]:
        """Quantiles of ``run``.

        Raises:
            RuntimeError: ``run`` is too short to be told from the overwriting.
        """
        warm_up(run, self.device)
        number = max(1, min(50, int(0.02 / max(events(run), 1e-6))))

        def cold_run() -> None:
            self.cold.zero_()
            run()

        both = capture(cold_run, number)
        if number not in self.alone:
            self.alone[number] = capture(self.cold.zero_, number)
        alone = self.alone[number]
        found = quantiles([(events(both.replay) - events(alone.replay)) / number for _ in range(ROUNDS)])
        if found[0] <= 0:
            raise RuntimeError("the call is shorter than what overwriting the L2 varies by")
        return found


def warm_up(run: Callable[[], object], device: torch.device) -> None:
    """Compile and fill caches, on a stream beside the current one, as a capture wants it."""
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream(device).wait_stream(stream)


def capture(run: Callable[[], object], number: int) -> torch.cuda.CUDAGraph:
    """A graph of ``number`` calls, replayed once."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(number):
            run()
    graph.replay()
    return graph


class EventTimer:
    """Time of a call as a run makes it: launched from the host, caches as they are. For calls of milliseconds."""

    def __init__(self, rounds: int = 3) -> None:
        self.rounds = rounds

    def __call__(self, run: Callable[[], object]) -> list[float]:
        run()
        return quantiles([events(run) for _ in range(self.rounds)])


def events(run: Callable[[], object]) -> float:
    """Seconds of one call on the device."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1000


class Deadline:
    """The time a part may take.

    Args:
        seconds: from now.
        clock: monotonic, in seconds.
    """

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock, self.end = clock, clock() + seconds

    @property
    def passed(self) -> bool:
        return self.clock() > self.end
