"""Rollout plans: ODE probing, forked groups, whole trajectories and windows are rows with different indices, not loops.

The executor's table holds the deterministic rows 0 … T-1, then the stochastic rows T … 2T-1, then those of shortened tails
(``tables``). A plan gives every row the step at which it enters and its table row at each step; all live on the host, so
planning never reads the device. Equal arguments give the same plan object, so that what the executor keeps for it on the
device is reused.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence

import torch
from adagrpo_kernels import Stream
from torch import Tensor

from ..algorithm.host_choices import WINDOW, host_generator

KEPT_PLANS = 64
DEALT = ("slots", "samples", "steps")
"""What an iteration's transitions may be dealt to its optimizer steps by: their axes, in order."""


@dataclasses.dataclass(frozen=True, eq=False)
class Plan:
    """R rows that advance together over S steps.

    Attributes:
        start: int64 [R], the first step each row takes; a row that starts at S is already finished.
        index: int64 [R, S], table row taken at each step.
        conditioning: int64 [R], row of the conditioning batch.
        noise_row: int64 [R], global row number of the noise, counted over all ranks.
        noise_stream: the ``Stream`` of its stochastic steps.
        stochastic: steps that draw noise.
        history: steps are second order: each row carries the preview of its step before.
        keep: steps at which the executor keeps the latents (and velocities) of all rows, before the step.
        record: steps whose transitions are stored for the update.
        own: int64 [R, K], which of ``record`` each row stores; None is all of them.
    """

    start: Tensor
    index: Tensor
    conditioning: Tensor
    noise_row: Tensor
    noise_stream: Stream = Stream.TRAJECTORY_STEP
    stochastic: tuple[int, ...] = ()
    history: bool = False
    keep: tuple[int, ...] = ()
    record: tuple[int, ...] = ()
    own: Tensor | None = None

    @property
    def stored(self) -> int:
        """Transitions that each row stores."""
        return len(self.record) if self.own is None else self.own.shape[1]

    @property
    def num_rows(self) -> int:
        return self.start.shape[0]

    @property
    def num_steps(self) -> int:
        return self.index.shape[1]

    def evaluations(self) -> int:
        """Transformer evaluations of the plan, in rows."""
        return int((self.num_steps - self.start).sum())

    def calls(self, max_rows: int = 0) -> list[int]:
        """Rows of each batched transformer call, in order; 0 is unlimited."""
        order = self.start.sort().values
        return [rows for part in order.split(max_rows or self.num_rows) for rows in entered(part, self.num_steps) if rows]


def entered(start: Tensor, num_steps: int) -> tuple[int, ...]:
    """How many of the rows that start at ``start`` [r] have entered at each step."""
    return tuple(torch.bincount(start, minlength=num_steps + 1).cumsum(0)[:num_steps].tolist())


def chunk_slices(rows: int, *limits: int) -> list[slice]:
    """The batches that ``rows`` rows run in, none larger than any of ``limits``; 0 is unlimited."""
    size = min(limit for limit in (*limits, max(rows, 1)) if limit)
    return [slice(first, min(first + size, rows)) for first in range(0, rows, size)]


def chunk_sizes(rows: int, *limits: int) -> list[int]:
    """Sizes of ``chunk_slices``."""
    return [part.stop - part.start for part in chunk_slices(rows, *limits)]


def probe_plan(conditioning: Sequence[int], steps: int | Sequence[int], keep: Sequence[int] = ()) -> Plan:
    """Deterministic sampling of every row from step 0; also what held-out evaluation uses.

    Args:
        steps: T, or the table rows to take.
    """
    table_rows = tuple(range(steps)) if isinstance(steps, int) else tuple(steps)
    return _probe_plan(tuple(conditioning), table_rows, tuple(keep))


@functools.lru_cache(KEPT_PLANS)
def _probe_plan(conditioning: tuple[int, ...], table_rows: tuple[int, ...], keep: tuple[int, ...]) -> Plan:
    rows = torch.tensor(conditioning, dtype=torch.int64)
    return Plan(
        start=torch.zeros_like(rows),
        index=torch.tensor(table_rows).repeat(len(rows), 1),
        conditioning=rows,
        noise_row=torch.arange(len(rows)),
        keep=keep,
    )


def branch_plan(
    slots: int,
    steps: Sequence[int],
    group_size: int,
    num_steps: int,
    numbers: Sequence[int] | None = None,
    tails: Mapping[int, Sequence[Sequence[int]]] | None = None,
    seeds: int = 1,
) -> Plan:
    """The tails of forked groups: rows ordered (slot, seed, fork step, tail, member), each entering after its fork step.

    The fork itself is ``RolloutExecutor.fork``; branches merge with earlier ones as soon as they enter.

    Args:
        numbers: of the slots, counted over all ranks; None is from 0.
        tails: table rows of each fork step's tails (``RolloutTable.tails``); they end together, so that all merge. None takes
            every step of the grid.
        seeds: anchors of each slot.
    """
    rows = tuple(tuple(map(tuple, tails[k])) for k in steps) if tails else None
    return _branch_plan(slots, tuple(steps), group_size, num_steps, _numbered(slots, numbers), rows, seeds)


@functools.lru_cache(KEPT_PLANS)
def _branch_plan(
    slots: int,
    steps: tuple[int, ...],
    group_size: int,
    num_steps: int,
    numbers: tuple[int, ...],
    tails: tuple[tuple[tuple[int, ...], ...], ...] | None,
    seeds: int,
) -> Plan:
    if tails is None:
        start = torch.tensor(steps, dtype=torch.int64) + 1
        index = torch.arange(num_steps).repeat(len(steps), 1)
    else:
        each = [tail for of_step in tails for tail in of_step]
        longest = max(map(len, each))
        start = torch.tensor([longest - len(tail) for tail in each])
        index = torch.tensor([(0,) * (longest - len(tail)) + tail for tail in each])
    per_slot = seeds * len(start) * group_size
    return Plan(
        start=start.repeat_interleave(group_size).repeat(slots * seeds),
        index=index.repeat_interleave(group_size, 0).repeat(slots * seeds, 1),
        conditioning=torch.arange(slots).repeat_interleave(per_slot),
        noise_row=_noise_rows(numbers, per_slot),
        noise_stream=Stream.FORK,
        history=tails is not None,
    )


def trajectory_plan(
    slots: int,
    group_size: int,
    num_steps: int,
    stochastic: Sequence[int],
    trained: Sequence[int],
    numbers: Sequence[int] | None = None,
    tail: Sequence[int] | None = None,
    own: Sequence[int] | None = None,
    of_rows: Sequence[Sequence[int]] | None = None,
) -> Plan:
    """Whole trajectories, rows ordered (slot, member): stochastic at some steps, deterministic at the others.

    Args:
        numbers: of the slots, counted over all ranks; None is from 0.
        own: the step of each slot that alone is stochastic, and trained, in it; ``stochastic``, ``trained`` hold them all.
        tail: table rows that lead from the last stochastic step to the image; None takes every step of the grid.
        of_rows: the steps that each row trains, equally many of ``trained``; None is all of them.
    """
    rows, of_slots = (None if given is None else tuple(given) for given in (tail, own))
    steps = (tuple(stochastic), tuple(trained))
    kept = None if of_rows is None else tuple(map(tuple, of_rows))
    return _trajectory_plan(slots, group_size, num_steps, *steps, _numbered(slots, numbers), rows, of_slots, kept)


@functools.lru_cache(KEPT_PLANS)
def _trajectory_plan(
    slots: int,
    group_size: int,
    num_steps: int,
    stochastic: tuple[int, ...],
    trained: tuple[int, ...],
    numbers: tuple[int, ...],
    tail: tuple[int, ...] | None,
    own: tuple[int, ...] | None,
    of_rows: tuple[tuple[int, ...], ...] | None,
) -> Plan:
    row = torch.arange(num_steps)
    row[list(stochastic)] += num_steps
    if tail is not None:
        row = torch.cat([row[: stochastic[-1] + 1], torch.tensor(tail, dtype=row.dtype)])
    rows, index = slots * group_size, row.repeat(slots, 1)
    if own is not None:
        index = torch.arange(num_steps) + num_steps * (torch.arange(num_steps) == torch.tensor(own).unsqueeze(1))
        of_rows = tuple((k,) for k in own for _ in range(group_size))
    return Plan(
        start=torch.zeros(rows, dtype=torch.int64),
        index=index.repeat_interleave(group_size, 0),
        conditioning=torch.arange(slots).repeat_interleave(group_size),
        noise_row=_noise_rows(numbers, group_size),
        stochastic=stochastic,
        history=tail is not None,
        record=trained,
        own=None if of_rows is None else torch.tensor([[trained.index(k) for k in steps] for steps in of_rows]),
    )


def _numbered(slots: int, numbers: Sequence[int] | None) -> tuple[int, ...]:
    return tuple(range(slots) if numbers is None else numbers)


def _noise_rows(slots: tuple[int, ...], per_slot: int) -> Tensor:
    return (torch.tensor(slots, dtype=torch.int64).unsqueeze(1) * per_slot + torch.arange(per_slot)).flatten()


@dataclasses.dataclass(frozen=True)
class Window:
    """A window of stochastic steps that moves every ``every`` iterations.

    Attributes:
        size: in steps.
        first, end: it lies within the steps first … end - 1; the last step of all is none: its noise would stay in the image.
        every: iterations per move.
        stride: by which it slides, and wraps (MixGRPO).
        seed: of its place, drawn anew at each move (Flow-GRPO-Fast); None slides.
    """

    size: int
    first: int
    end: int
    every: int = 1
    stride: int = 1
    seed: int | None = None

    def steps(self, iteration: int) -> tuple[int, ...]:
        """Its steps in an iteration, counted from 0."""
        places, move = self.end - self.first - self.size + 1, iteration // self.every
        place = move * self.stride % places
        if self.seed is not None:
            place = int(torch.randint(places, (), generator=host_generator(self.seed, move, WINDOW)))
        return tuple(range(self.first + place, self.first + place + self.size))


@functools.lru_cache(KEPT_PLANS)
def update_batches(
    slots: int,
    samples: int,
    steps: int,
    optimizer_steps: int,
    slots_per_batch: int,
    max_rows: int,
    device: torch.device | str = "cpu",
    by: str = "steps",
) -> list[list[Tensor]]:
    """Transitions of each optimizer step, dealt into micro-batches.

    This IS the geometry of the update: whatever must match it (the fork call, recomputed log-probabilities) iterates the
    same list, because GPU kernels round differently for different batch shapes.

    Args:
        slots, samples, steps: transitions are ordered (slot, sample, trained step); forks have one sample per slot.
        optimizer_steps: divides ``steps``, ``slots`` or ``samples``, whichever ``by`` says: they are dealt to them in order.
        slots_per_batch: slots that share a micro-batch.
        max_rows: largest micro-batch; 0 is unlimited.
        device: of the result, which is made once and reused: not to be written to.
        by: see ``optimizer_steps``.

    Returns:
        For each optimizer step its micro-batches, int64 index vectors into the transitions.
    """
    ids = torch.arange(slots * samples * steps).reshape(slots, samples, steps)
    batches = []
    for share in ids.tensor_split(optimizer_steps, dim=DEALT.index(by)):
        parts = [part.reshape(-1) for part in share.split(slots_per_batch)]
        batches.append([piece.to(device) for part in parts for piece in part.split(max_rows or len(part))])
    return batches


def host_integers(values: Sequence[int], device: torch.device) -> Tensor:
    """int64 vector on ``device`` that changes every time; from pinned memory, so that nothing waits for the copy."""
    vector = torch.tensor(values, dtype=torch.int64)
    return vector.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else vector.to(device)


@functools.lru_cache(KEPT_PLANS)
def device_integers(values: tuple[int, ...], device: torch.device) -> Tensor:
    """int64 vector on ``device``, copied there once: not to be written to."""
    return torch.tensor(values, dtype=torch.int64, device=device)
