"""CUDA graphs of rollout steps, and the checker that runs the same path where there is no CUDA."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Hashable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..forward.device import out_of_memory

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
        self._stream: torch.cuda.Stream | None = None
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
            Exception: what the step raises. If its capture ran out of memory (``out_of_memory``) that error, and nothing is
                left capturing; any other failure of a capture is told, and the step runs directly from then on.
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
            except Exception as error:
                if out_of_memory(error):  # not the step's fault: with fewer rows it can be captured
                    raise
                self.enabled = False
                self.forget()
                first = (str(error).strip() or type(error).__name__).splitlines()[0]
                self.say(f"CUDA graphs are off: the step {key} cannot be captured: {first}")
            if not self.enabled:  # behind the handler, whose error still holds the failed capture's tensors
                return step()
        graph, result = self._graphs[key]
        graph.replay()
        return result  # type: ignore[return-value]

    def forget(self) -> None:
        """Drop every graph and layout: buffers were released or weights moved. Waits for replays that still run."""
        if self._graphs:
            torch.cuda.synchronize(self.device)
        self._seen.clear()
        self._graphs.clear()
        self._pool, self.pool_bytes = None, 0

    def _capture(self, key: Hashable, step: Callable[[], object]) -> None:
        """Record ``step``; whatever fails, the stream is left, the allocator captures no more and the first error is raised.

        ``torch.cuda.graph`` promises neither: ending a broken capture raises inside its ``__exit__``, over the first error
        and before the stream is left.
        """
        torch.cuda.synchronize(self.device)
        torch.cuda.empty_cache()  # what is cached is of no use to the pool
        before = torch.cuda.memory_allocated(self.device)
        graph = torch.cuda.CUDAGraph()
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        if self._stream is None:
            self._stream = torch.cuda.Stream(self.device)  # one for all: blocks of the pool are reused on their stream only
        with torch.cuda.stream(self._stream):
            try:
                graph.capture_begin(pool=self._pool)
                result = step()
            except BaseException:
                for end in (functools.partial(self._end, graph), graph.reset):
                    with contextlib.suppress(RuntimeError):  # that it cannot be ended is no news beside the first error
                        end()
                raise
            self._end(graph)
        self._graphs[key] = (graph, result)
        self.pool_bytes += max(0, torch.cuda.memory_allocated(self.device) - before)

    def _end(self, graph: torch.cuda.CUDAGraph) -> None:
        """End the capture. If that fails the allocator is taken out of it too: in a capture it would free no cached block and
        never let go of the pool. Both calls are those that ``torch.cuda.use_mem_pool`` ends with."""
        try:
            graph.capture_end()
        except RuntimeError:
            index = torch.cuda.current_device() if self.device.index is None else self.device.index
            with contextlib.suppress(RuntimeError):  # it is out already, and the graph itself lets go
                torch._C._cuda_endAllocateToPool(index, self._pool)
                torch._C._cuda_releasePool(index, self._pool)
            raise
