"""Points of the roofline: FLOPs, bytes and seconds of the phases and of our kernels."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from torch import Tensor

from ..engine.executor import Count
from ..estimate.rehearsal import rehearse
from ..estimate.roofline import Work, work
from ..models.base import FlowModel

# Float operations per element of a kernel's largest tensor [calc]; Philox and rounding are integers and do not count. Kernels
# that a roofline does not describe (one program, integers only) are missing.
KERNEL_FLOPS = {
    "sde_step": 8,  # mean 3, noise 2, squared distance 3
    "group_log_prob": 3,
    "group_log_prob_backward": 3,
    "quantize_rowwise": 2,
    "layer_norm_modulate": 8,
    "gelu_join": 8,
}


@dataclasses.dataclass(frozen=True)
class Point:
    """Work done in some seconds, of one iteration."""

    name: str
    kind: Literal["phase", "kernel"]
    flops: float
    bytes: float
    seconds: float

    @property
    def intensity(self) -> float:
        """FLOPs per byte."""
        return self.flops / self.bytes

    @property
    def tflops(self) -> float:
        """TFLOP/s."""
        return self.flops / self.seconds / 1e12

    @property
    def gigabytes(self) -> float:
        """GB/s."""
        return self.bytes / self.seconds / 1e9


def phase_points(
    model: FlowModel, prompt: str, pictures: Sequence[int], seconds: Mapping[str, float], counts: Mapping[str, Count]
) -> list[Point] | str:
    """The phases that run the transformer or the decoder, counted on the meta device; or why they cannot be counted.

    Bytes are those of the eager model, each operator's operands once.

    Args:
        pictures: of each call of the decoder.
        seconds, counts: of an iteration, by phase.
    """
    rehearsal = rehearse(model, prompt)
    if isinstance(rehearsal, str):
        return rehearsal
    forward = work(rehearsal.forward)
    done = {phase: [(forward, counts[phase])] for phase in ("probe", "prefix", "rollout") if phase in counts}
    done["decode"] = [(work(rehearsal.decode), Count(sum(pictures), len(pictures)))]
    done["update"] = [(work(rehearsal.update), counts["update"])] if "update" in counts else []
    done["update"] += [(forward, counts[phase]) for phase in ("recompute", "reference") if phase in counts]
    points = []
    for phase, parts in done.items():
        flops = sum(each.flops * count.evaluations for each, count in parts)
        if flops and seconds.get(phase):
            points.append(Point(phase, "phase", flops, sum(moved_bytes(*part) for part in parts), seconds[phase]))
    return points


def moved_bytes(each: Work, count: Count) -> float:
    """Bytes of the calls of ``count``, each doing ``each``."""
    once, row = each.fixed_bytes + each.small_fixed_bytes, each.row_bytes + each.small_row_bytes
    return count.calls * once + count.evaluations * row


class KernelMeter:
    """Observes the launches of our kernels: how many, and the bytes and float operations of their tensors, each once.

    Attributes:
        launches, moved, flops: by operator.
        functions: names of the device functions by operator, as a profiler shows them.
    """

    def __init__(self) -> None:
        self.launches: Counter[str] = Counter()
        self.moved: Counter[str] = Counter()
        self.flops: Counter[str] = Counter()
        self.functions: dict[str, str] = {}

    def __call__(self, name: str, kernel: Any, arguments: Mapping[str, Any]) -> None:
        """A launch, as ``adagrpo_kernels._dispatch.observed`` tells of it."""
        tensors = [value for value in arguments.values() if isinstance(value, Tensor)]
        self.launches[name] += 1
        self.moved[name] += sum(t.numel() * t.element_size() for t in tensors)
        self.flops[name] += KERNEL_FLOPS.get(name, 0) * max(t.numel() for t in tensors)
        self.functions[name] = getattr(kernel, "__name__", name)

    def points(self, seconds: Mapping[str, float]) -> list[Point]:
        """The kernels that took time: ``seconds`` by device function."""
        return [
            Point(name, "kernel", self.flops[name], self.moved[name], seconds[function])
            for name, function in self.functions.items()
            if seconds.get(function) and self.flops[name]
        ]
