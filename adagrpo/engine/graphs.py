"""CUDA graphs of rollout steps, and the checker that runs the same path where there is no CUDA."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")
Layout = tuple[tuple[int, tuple[int, ...], tuple[int, ...]], ...]


class StepGraphs:
    """Captures each step of a rollout once and replays it.

    A step is a function of static tensors: everything that changes between iterations (latents, step index, seed,
    iteration) is in their contents. The first call with a key runs directly, which compiles kernels and fills caches; the
    second is captured; all graphs share one memory pool. What a step returns lies in that pool and is overwritten by its
    next replay.

    Without CUDA every call runs directly, but under the contract of a capture: the static tensors of a key never move nor
    change their shape. (That nothing reads the device is checked by running on the meta device, where every read raises.)

    Args:
        device: of the tensors.
        say: told when a capture fails; the rollout then goes on without graphs.

    Attributes:
        pool_bytes: memory the graphs hold.
        captured: keys with a graph (CUDA) or with a recorded layout (elsewhere).
    """

    def __init__(self, device: torch.device, say: Callable[[str], None] = print) -> None:
        self.device, self.say = device, say
        self.enabled, self.pool_bytes = True, 0
        self._pool: Any = None
        self._seen: dict[Hashable, Layout] = {}
        self._graphs: dict[Hashable, tuple[torch.cuda.CUDAGraph, object]] = {}

    @property
    def captured(self) -> list[Hashable]:
        return list(self._graphs if self.device.type == "cuda" else self._seen)

    def __call__(self, key: Hashable, step: Callable[[], T], statics: Sequence[Tensor]) -> T:
        """``step()`` or its replay.

        Args:
            key: everything that is baked into the graph: rows, kind of step, which buffers.
            statics: every tensor the step reads or writes that outlives it.

        Raises:
            RuntimeError: a static tensor moved or changed its shape.
        """
        if not self.enabled:
            return step()
        layout = tuple((t.data_ptr(), tuple(t.shape), t.stride()) for t in statics)
        known = self._seen.setdefault(key, layout)
        if known != layout:
            raise RuntimeError(f"rollout step {key}: a static tensor moved or changed shape; a graph would read old memory")
        if known is layout or self.device.type != "cuda":
            return step()
        if key not in self._graphs:
            try:
                self._capture(key, step)
            except RuntimeError as error:
                self.enabled = False
                self._graphs.clear()
                first = (str(error).strip() or type(error).__name__).splitlines()[0]
                self.say(f"CUDA graphs are off: the step {key} cannot be captured: {first}")
                return step()
        graph, result = self._graphs[key]
        graph.replay()
        return result  # type: ignore[return-value]

    def forget(self) -> None:
        """Drop every graph and layout: buffers were released or weights moved."""
        self._seen.clear()
        self._graphs.clear()
        self._pool, self.pool_bytes = None, 0

    def _capture(self, key: Hashable, step: Callable[[], object]) -> None:
        before = torch.cuda.memory_allocated(self.device)
        graph = torch.cuda.CUDAGraph()
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        with torch.cuda.graph(graph, pool=self._pool):
            result = step()
        self._graphs[key] = (graph, result)
        self.pool_bytes += max(0, torch.cuda.memory_allocated(self.device) - before)
