"""Recording whole iterations of a trainer: one under the profiler, then some undisturbed ones."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from adagrpo_kernels import implementations
from adagrpo_kernels._dispatch import observed
from torch.autograd import DeviceType

from ..engine.executor import Count
from ..errors import RunError
from ..run.metrics import read_metrics
from ..train import Trainer
from .memory import AllocatorHistory, MemoryTimeline, Sample, from_out_of_memory
from .points import KernelMeter, Point
from .power import Energy, PowerMeter

TRACE, SNAPSHOT = "trace.json.gz", "memory.pickle"
TOP = 15


@dataclasses.dataclass(frozen=True)
class Operator:
    """An operator of the host or a kernel of the device: seconds of its own, and their share of those of all."""

    name: str
    calls: int
    seconds: float
    share: float


@dataclasses.dataclass(frozen=True)
class Iteration:
    """One iteration: wall seconds, seconds by phase, work by phase."""

    seconds: float
    phases: dict[str, float]
    counts: dict[str, Count]


@dataclasses.dataclass(frozen=True)
class Recording:
    """What was recorded.

    Attributes:
        warmup: iterations before.
        timed: without the profiler.
        traced: the one under it.
        operators: of the traced iteration, by their own time on ``clock``: CUDA or CPU.
        kernels: launches of our own kernels in the traced iteration, and their points where they took device time.
        implementations: what ran for each operator of the algorithm.
        memory: of the last timed iteration.
        peak: most bytes: CUDA tensors of the timed iterations, or the process at their phases' boundaries.
        energy: of the timed iterations; a string says why there is none.
        notices: what the trainer had to tell.
    """

    warmup: int
    timed: list[Iteration]
    traced: Iteration
    clock: str
    operators: list[Operator]
    launches: dict[str, int]
    kernels: list[Point]
    implementations: dict[str, str]
    memory: list[Sample]
    peak: int
    energy: Energy | str
    notices: list[str]

    @property
    def seconds(self) -> float:
        """Of a timed iteration, mean."""
        return sum(one.seconds for one in self.timed) / len(self.timed)

    @property
    def phases(self) -> dict[str, float]:
        """Mean seconds by phase of a timed iteration, in the order they begin, ``other`` last."""
        named = {phase: sum(one.phases.get(phase, 0.0) for one in self.timed) / len(self.timed) for phase in self.phase_names}
        return named | {"other": max(0.0, self.seconds - sum(named.values()))}

    @property
    def phase_names(self) -> list[str]:
        began = [sample.phase for sample in self.memory if sample.phase not in ("begin", "end")]
        return list(dict.fromkeys([*began, *(phase for one in self.timed for phase in one.phases)]))


def record(trainer: Trainer, iterations: int, folder: Path, snapshot: Path, say: Callable[[str], object] = print) -> Recording:
    """Run ``trainer`` for a warm-up, one traced and ``iterations`` timed iterations; the trace goes into ``folder``.

    The allocator's history is recorded until the timed iterations begin. It is written to ``snapshot`` then, or where memory
    runs out.

    Raises:
        RunError: out of memory, or another reason that would end a run.
    """
    history, timeline = AllocatorHistory(trainer.model.device), MemoryTimeline(trainer.model.device)
    trainer.phase.listener = timeline.listener
    history.start()
    try:
        return _record(trainer, iterations, folder / TRACE, snapshot, history, timeline, say)
    except (RunError, RuntimeError) as error:
        if not from_out_of_memory(error):
            raise
        phase = timeline.samples[-1].phase if timeline.samples else "begin"
        kept = history.dump(snapshot)
        where = f"allocator history: {snapshot}" if kept else "no allocator history on this device"
        raise RunError(f"iteration {trainer.iterations_done + 1}, phase {phase}: {_first_line(error)}; {where}") from error
    finally:
        history.stop()


def _record(
    trainer: Trainer,
    iterations: int,
    trace: Path,
    snapshot: Path,
    history: AllocatorHistory,
    timeline: MemoryTimeline,
    say: Callable[[str], object],
) -> Recording:
    device, notices = trainer.model.device, list[str]()
    trainer.notices.say = notices.append
    warmup = 2 if device.type == "cuda" else 1  # of two, the second has the optimizer's moments and compiled forwards
    meter, found = KernelMeter(), list[Any]()

    def ready(profiler: torch.profiler.profile) -> None:
        profiler.export_chrome_trace(str(trace))
        found.extend(profiler.key_averages())

    schedule = torch.profiler.schedule(wait=warmup - 1, warmup=1, active=1, repeat=1)
    say(f"warm-up: {warmup} iteration{'s' * (warmup > 1)}")
    with torch.profiler.profile(schedule=schedule, on_trace_ready=ready) as profiler:
        for _ in range(warmup):
            _iterate(trainer, timeline)
            profiler.step()
        say("traced: 1 iteration")
        with observed(meter):
            traced = _iterate(trainer, timeline)
        profiler.step()
    history.dump(snapshot)
    history.stop()
    say(f"timed: {iterations} iteration{'s' * (iterations > 1)}")
    timed, held = [], list[int]()
    with PowerMeter(device) as power:
        for _ in range(iterations):
            timed.append(_iterate(trainer, timeline))
            held += [max(sample.held, sample.peak or 0) for sample in timeline.samples]
    on_device = device.type == "cuda"
    spent = {event.key: event.self_device_time_total / 1e6 for event in found if event.device_type == DeviceType.CUDA}
    return Recording(
        warmup,
        timed,
        traced,
        "CUDA" if on_device else "CPU",
        top_operators(found, set(traced.phases), on_device),
        dict(sorted(meter.launches.items())),
        meter.points(spent),
        implementations(),
        timeline.samples,
        max(held),
        power.energy() or str(power.problem),
        notices,
    )


def _iterate(trainer: Trainer, timeline: MemoryTimeline) -> Iteration:
    """One iteration with its one copy to the host."""
    timeline.begin()
    started = time.perf_counter()
    read_metrics(trainer.iteration())
    seconds = time.perf_counter() - started
    timeline.end()
    counts = {phase: Count(count.evaluations, count.calls) for phase, count in trainer.executor.counts.items()}
    return Iteration(seconds, trainer.phase.read(), counts)


def top_operators(events: list[Any], phases: set[str], on_device: bool, count: int = TOP) -> list[Operator]:
    """The ``count`` operators with most time of their own: kernels on a device, else operators of the host; no ranges."""
    kept: list[tuple[float, Any]] = []
    for event in events:
        ranged = event.key in phases or event.key.startswith("ProfilerStep") or getattr(event, "is_user_annotation", False)
        if not ranged and (event.device_type == DeviceType.CUDA) == on_device:
            own = event.self_device_time_total if on_device else event.self_cpu_time_total
            kept.append((own / 1e6, event))
    total = sum(own for own, _ in kept) or 1.0
    kept.sort(key=lambda pair: -pair[0])
    return [Operator(event.key, event.count, own, own / total) for own, event in kept[:count]]


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
