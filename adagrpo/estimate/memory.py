"""The memory plan of a run: what will be held and when, worked out before anything is trained, and compared afterwards."""

from __future__ import annotations

import dataclasses
import os
import resource
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError

NOT_COUNTED = "not in it: workspaces of libraries, the allocator's rounding and fragmentation, the CUDA context"


@dataclasses.dataclass(frozen=True)
class Entry:
    """One thing that takes memory.

    Attributes:
        why: where the figure comes from, in a line.
        phase: when it is held; empty is always.
        loaded: bytes of it that lay on the device already when the plan was made.
        remedy: the key of the recipe that makes it smaller.
        device: where it is, if not on the model's device; it is then in none of the sums.
    """

    name: str
    bytes: int
    why: str
    phase: str = ""
    loaded: int = 0
    remedy: str = ""
    device: str = ""


@dataclasses.dataclass(frozen=True)
class MemoryPlan:
    """What a run holds; phases do not overlap.

    Attributes:
        checkpoint, checkpoints: bytes of one checkpoint, and how many lie on disk at most (one is being written).
        unknown: what could not be measured; empty if everything was.
    """

    entries: tuple[Entry, ...]
    checkpoint: int
    checkpoints: int
    unknown: str = ""

    @property
    def resident(self) -> int:
        """Bytes held in every phase."""
        return sum(entry.bytes for entry in self._here if not entry.phase)

    @property
    def phases(self) -> dict[str, int]:
        """Bytes each phase adds to the resident ones."""
        found: dict[str, int] = {}
        for entry in self._here:
            if entry.phase:
                found[entry.phase] = found.get(entry.phase, 0) + entry.bytes
        return found

    @property
    def peak_phase(self) -> str:
        """The phase that needs most; empty without any."""
        phases = self.phases
        return max(phases, key=phases.__getitem__) if phases else ""

    @property
    def peak(self) -> int:
        """Bytes held at most."""
        return self.resident + max(self.phases.values(), default=0)

    @property
    def loaded(self) -> int:
        """Bytes that lay on the device when the plan was made."""
        return sum(entry.loaded for entry in self._here)

    @property
    def elsewhere(self) -> dict[str, int]:
        """Bytes on other devices that are yet to be taken there, by device."""
        found: dict[str, int] = {}
        for entry in self.entries:
            if entry.device:
                found[entry.device] = found.get(entry.device, 0) + entry.bytes - entry.loaded
        return found

    @property
    def _here(self) -> list[Entry]:
        return [entry for entry in self.entries if not entry.device]

    def table(self) -> str:
        """A readable page; what takes nothing is left out, rewards excepted."""
        unit, divisor = ("GiB", 2**30) if self.peak >= 2**30 else ("MiB", 2**20)
        shown_entries = (e for e in self.entries if e.bytes or e.name.startswith("reward"))
        entries = sorted(shown_entries, key=lambda e: (bool(e.device), bool(e.phase)))
        width = max(len(e.name) for e in entries)
        number = lambda size: f"{size / divisor:9.2f}"  # noqa: E731
        line = lambda when, what, size, why: f"{when:13} {what:{width}} {number(size)}  {why}".rstrip()  # noqa: E731
        lines, shown = [f"{'when':13} {'what':{width}} {unit:>9}"], ""
        for entry in entries:
            when = f"on {entry.device}" if entry.device else entry.phase or "always"
            lines.append(line("" if when == shown else when, entry.name, entry.bytes, entry.why))
            shown = when
        disk = f"{self.checkpoints} checkpoints of {size_text(self.checkpoint)}, the one being written included"
        lines += ["", line("always", "", self.resident, "")]
        lines += [line(f"+ {phase}", "", size, "") for phase, size in self.phases.items()]
        lines.append(line("peak", "", self.peak, f"in phase {self.peak_phase}" if self.peak_phase else ""))
        lines.append(line("disk", "", self.checkpoint * self.checkpoints, disk))
        return "\n".join([*lines, *([self.unknown] if self.unknown else []), NOT_COUNTED])

    def summary(self) -> str:
        """The plan in a line."""
        phase = f" + {size_text(self.peak - self.resident)} in phase {self.peak_phase}" if self.peak_phase else ""
        disk = f"{size_text(self.checkpoint * self.checkpoints)} of checkpoints"
        unknown = f"; {self.unknown}" if self.unknown else ""
        return f"memory plan: {size_text(self.resident)}{phase} = {size_text(self.peak)}; {disk}{unknown}"

    def check(self, free_device: int | None, free_disk: int | None = None, device: str = "the device") -> None:
        """Refuse a run that cannot fit; None is not checked.

        Args:
            free_device: bytes free beside what is ``loaded``.
            free_disk: bytes free for all checkpoints.

        Raises:
            InputError: naming what is too large, by how much, and the keys that help.
        """
        needed = self.peak - self.loaded
        if free_device is not None and needed > free_device:
            missing = needed - free_device
            held = [e for e in self._here if e.phase in ("", self.peak_phase) and e.bytes > e.loaded]
            held.sort(key=lambda e: e.loaded - e.bytes)
            parts = ", ".join(f"{e.name} {size_text(e.bytes)}" for e in held[:4])
            remedies = dict.fromkeys(e.remedy for e in held if e.remedy and 20 * e.bytes >= missing)
            help_ = ", ".join(remedies) or "a device with more memory"
            phase = f" in phase {self.peak_phase}" if self.peak_phase else ""
            raise InputError(
                f"memory: this run needs {size_text(needed)} more{phase}, {device} has {size_text(free_device)} free: "
                f"{size_text(missing)} too little ({parts}); what helps: {help_}"
            )
        disk = self.checkpoint * self.checkpoints
        if free_disk is not None and disk > free_disk:
            raise InputError(
                f"disk: {self.checkpoints} checkpoints of {size_text(self.checkpoint)} need {size_text(disk)}, "
                f"{size_text(free_disk)} are free: {size_text(disk - free_disk)} too little; what helps: output.keep_last"
            )

    def check_elsewhere(self, free: Callable[[torch.device], int | None]) -> None:
        """Refuse rewards that cannot fit on their own devices; ``free`` tells the bytes free on one, None where unknown.

        Raises:
            InputError: naming the device, what is too large, and the keys that help.
        """
        for device, needed in self.elsewhere.items():
            there = free(torch.device(device))
            if there is not None and needed > there:
                names = ", ".join(f"{e.name} {size_text(e.bytes)}" for e in self.entries if e.device == device)
                raise InputError(
                    f"memory: rewards on {device} need {size_text(needed)}, it has {size_text(there)} free ({names}); what "
                    "helps: rewards.N.device, rewards.N.rows, rewards.N.dtype"
                )

    def compare(self, peak: int) -> str:
        """The plan beside the ``peak`` bytes a run took."""
        return f"planned {size_text(self.peak)}, peak {size_text(peak)} ({(peak / max(self.peak, 1) - 1) * 100:+.0f} %)"

    def as_dict(self) -> dict[str, Any]:
        """For ``memory.json``."""
        totals = {"resident_bytes": self.resident, "peak_bytes": self.peak, "peak_phase": self.peak_phase}
        entries = [{k: v for k, v in dataclasses.asdict(e).items() if v != ""} for e in self.entries]
        disk = {"checkpoint_bytes": self.checkpoint, "checkpoints": self.checkpoints}
        return {**totals, **disk, "unknown": self.unknown, "not_counted": NOT_COUNTED, "entries": entries}


def checkpoint_bytes(trained: Iterable[Tensor], averages: bool, reference: bool = False) -> int:
    """Size of one checkpoint: the portable weights, masters, two moments, weight EMA, and adapters that are the reference."""
    wide, narrow = (4 if averages else 3), (2 if reference else 1)
    return sum(p.numel() * p.element_size() * narrow + wide_bytes(p) * wide for p in trained)


def free_bytes(device: torch.device) -> int | None:
    """Bytes a run may still take on ``device``; on a CPU what the system calls available. None where nothing can be known."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if device.type != "cpu":
        return None
    try:
        for line in Path("/proc/meminfo").read_text("ascii").splitlines():
            if line.startswith("MemAvailable:"):  # free pages and what the page cache can give back
                return int(line.split()[1]) * 1024
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError):
        return None


class PeakMeter:
    """The most memory a run took: torch's own peak on CUDA; on a CPU that of the whole process, libraries included."""

    def __init__(self, device: torch.device) -> None:
        self.device, self._cuda_peak, self._start = device, 0, resident_set()

    def observe(self) -> None:
        """Read CUDA's peak, before somebody resets it."""
        if self.device.type == "cuda":
            self._cuda_peak = max(self._cuda_peak, torch.cuda.max_memory_allocated(self.device))

    def report(self, planned: MemoryPlan) -> tuple[dict[str, int], str]:
        """Bytes for ``memory.json``, and a line for people."""
        if self.device.type == "cuda":
            self.observe()
            return {"peak_bytes": self._cuda_peak}, planned.compare(self._cuda_peak)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        grown = max(0, peak - self._start)
        line = (
            f"planned {size_text(planned.peak)} of tensors; the process peaked at {size_text(peak)}, {size_text(grown)} above"
        )
        line += " what it held before training (Python and libraries included)"
        return {"process_peak_bytes": peak, "process_growth_bytes": grown}, line


def size_text(size: float) -> str:
    """Bytes for people, in GiB or MiB."""
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 / 10 else f"{size / 2**20:.2f} MiB"


def wide_bytes(p: Tensor) -> int:
    """Bytes of ``p`` in fp32, or as it is where it is wider."""
    return p.numel() * max(p.element_size(), 4)


def resident_set() -> int:
    """Bytes of this process in memory now; where that cannot be read, its peak so far."""
    try:
        return int(Path("/proc/self/statm").read_text("ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
