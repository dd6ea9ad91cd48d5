"""What rollouts run on: chunks of plans on the device, and the tensors that their steps read and write in place."""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from collections.abc import Hashable, Sequence

import torch
from adagrpo_kernels._dispatch import device_word
from torch import Tensor

from ..models.base import Conditioning
from .batch_limit import BatchLimit
from .graphs import StepGraphs
from .plans import KEPT_PLANS, Plan, entered

MAX_LANES = 16


@dataclasses.dataclass(frozen=True, eq=False)
class Chunk:
    """Rows of a plan that advance in one batch, ordered by the step they enter; indices on the device.

    Attributes:
        rows: int64 [r], their place in the plan.
        entered: how many of them have entered at each step.
        index: int64 [r, S]. conditioning, noise_row: int64 [r].
    """

    rows: Tensor
    entered: tuple[int, ...]
    index: Tensor
    conditioning: Tensor
    noise_row: Tensor


@dataclasses.dataclass(frozen=True, eq=False)
class Lane:
    """The tensors of a rolling chunk that steps read and write in place.

    Attributes:
        chunk: the rows.
        x: [r, L, C], latents.
        clean: [r, L, C] in the compute dtype, previews of the step before; None for first-order plans.
        step, draw: int64 0-dim.
        prepared: what the calls share, by forward.
        static: every run with this chunk uses these very tensors, so that its steps may be captured.
    """

    chunk: Chunk
    x: Tensor
    clean: Tensor | None
    step: Tensor
    draw: Tensor
    prepared: tuple[Conditioning, ...]
    static: bool

    def statics(self) -> list[Tensor]:
        """Every tensor a captured step refers to."""
        chunk = (self.chunk.index, self.chunk.conditioning, self.chunk.noise_row)
        own = [t for t in (self.x, self.clean, self.step, self.draw) if t is not None]
        return [*own, *chunk, *(t for c in self.prepared for t in c.tensors.values())]


class Lanes:
    """Hands out chunks and lanes; where steps are captured, the same ones to equal rollouts.

    Args:
        like: its device is the rows' and its dtype, the compute dtype, that of previews.
        limit: of rows per chunk.
        graphs: refer to the lanes; None where nothing is captured.
    """

    def __init__(self, like: Tensor, limit: BatchLimit, graphs: StepGraphs | None) -> None:
        self.like, self.limit, self.graphs = like, limit, graphs
        self._chunks: OrderedDict[tuple[int, int], tuple[Plan, list[Chunk]]] = OrderedDict()
        self._lanes: dict[Hashable, Lane] = {}
        self._buffers: dict[Hashable, list[Tensor]] = {}

    def __len__(self) -> int:
        """How many lanes are kept."""
        return len(self._lanes)

    def chunks(self, plan: Plan) -> list[Chunk]:
        """The plan's rows in batches, in the order they enter; copied to the device once."""
        key = (id(plan), self.limit.max_rows)
        if key not in self._chunks:
            order = torch.argsort(plan.start, stable=True)
            chunks = []
            for part in self.limit.chunks(plan.num_rows):
                rows = order[part]
                tensors = (plan.index[rows], plan.conditioning[rows], plan.noise_row[rows])
                on_device = (t.to(self.like.device) for t in tensors)
                chunks.append(Chunk(rows.to(self.like.device), entered(plan.start[rows], plan.num_steps), *on_device))
            self._chunks[key] = (plan, chunks)  # holding the plan keeps its id
            if len(self._chunks) > KEPT_PLANS:
                self._chunks.popitem(last=False)
        self._chunks.move_to_end(key)
        for chunk in (chunks := self._chunks[key][1]):
            self.limit.note(chunk.rows.shape[0])
        return chunks

    def lane(self, plan: Plan, chunk: Chunk, x: Tensor, prepared: tuple[Conditioning, ...], draw: int, keep: bool) -> Lane:
        """The chunk's tensors, filled; with graphs always the same ones."""
        shapes = tuple((name, tuple(t.shape)) for c in prepared for name, t in c.tensors.items())
        key = (id(chunk), tuple(x.shape[1:]), shapes)
        if self.graphs is None or not keep:
            return self._new(plan, chunk, x, prepared, draw, static=False)
        lane = self._lanes.get(key)
        if lane is None:
            if len(self._lanes) >= MAX_LANES:
                self.forget()
            own = tuple(Conditioning({name: t.clone() for name, t in c.tensors.items()}) for c in prepared)
            lane = self._lanes[key] = self._new(plan, chunk, x, own, draw, static=True)
            return lane
        lane.x.copy_(x.index_select(0, chunk.rows))
        if lane.clean is not None:
            lane.clean.zero_()  # a first step gives the past no weight, but 0 * NaN of a failed sample would stay
        lane.draw.copy_(device_word(draw, self.like))
        for mine, fresh in zip(lane.prepared, prepared, strict=True):
            for name, t in fresh.tensors.items():
                mine.tensors[name].copy_(t)
        return lane

    def buffers(self, key: Hashable, fresh: Sequence[Tensor]) -> list[Tensor]:
        """Tensors that hold the values of ``fresh``: the same ones whenever the key is."""
        buffers = self._buffers.setdefault(key, [t.clone() for t in fresh])
        for buffer, t in zip(buffers, fresh, strict=True):
            buffer.copy_(t)
        return buffers

    def forget(self) -> None:
        """Drop every lane and buffer, and the graphs that refer to them."""
        self._lanes.clear()
        self._buffers.clear()
        if self.graphs is not None:
            self.graphs.forget()

    def _new(self, plan: Plan, chunk: Chunk, x: Tensor, prepared: tuple[Conditioning, ...], draw: int, static: bool) -> Lane:
        x = x.index_select(0, chunk.rows)
        clean = torch.zeros_like(x, dtype=self.like.dtype) if plan.history else None
        return Lane(chunk, x, clean, device_word(0, self.like), device_word(draw, self.like), prepared, static)
