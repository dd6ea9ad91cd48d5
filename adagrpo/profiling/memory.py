"""Memory of an iteration: the allocator's history on CUDA, and what is held as its phases begin."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path

import torch

from ..disk.files import replacing
from ..estimate.memory import resident_set
from ..forward.device import out_of_memory

EVENTS = 200_000


class AllocatorHistory:
    """CUDA's record of every allocation with its stack, for pytorch.org/memory_viz; elsewhere it does nothing."""

    def __init__(self, device: torch.device) -> None:
        self.recorded = device.type == "cuda"

    def start(self) -> None:
        """Record from now on; the last ``EVENTS`` events are kept."""
        if self.recorded:
            torch.cuda.memory._record_memory_history(max_entries=EVENTS)

    def stop(self) -> None:
        """Record no longer, and forget."""
        if self.recorded:
            torch.cuda.memory._record_memory_history(enabled=None)

    def dump(self, path: Path) -> bool:
        """Write the history; whether there is one."""
        if self.recorded:
            with replacing(path) as draft:
                torch.cuda.memory._dump_snapshot(str(draft))
        return self.recorded


@dataclasses.dataclass
class Sample:
    """What is held when a phase begins.

    Attributes:
        seconds: since the iteration began, on the host's clock.
        held: bytes: CUDA tensors, or the whole process on a CPU.
        peak: most bytes until the next sample; None on a CPU.
    """

    phase: str
    seconds: float
    held: int
    peak: int | None = None


class MemoryTimeline:
    """Samples of one iteration; its ``listener`` is told of the phases."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.samples = device, list[Sample]()
        self._start = 0.0

    def begin(self) -> None:
        """Forget what was sampled: an iteration begins."""
        self.samples, self._start = [], time.perf_counter()
        self.listener("begin")

    def listener(self, phase: str) -> None:
        """A phase begins, and the one before is over."""
        peak = None
        if self.device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
        if self.samples:
            self.samples[-1].peak = peak
        self.samples.append(Sample(phase, time.perf_counter() - self._start, self._held()))

    def end(self) -> list[Sample]:
        """The samples, closed by one called ``end``."""
        self.listener("end")
        return self.samples

    def _held(self) -> int:
        return torch.cuda.memory_allocated(self.device) if self.device.type == "cuda" else resident_set()


def from_out_of_memory(error: BaseException | None) -> bool:
    """Whether ``error`` or what it was raised from is a lack of device memory."""
    while error is not None:
        if out_of_memory(error):
            return True
        error = error.__cause__
    return False
