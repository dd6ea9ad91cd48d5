"""Rollout plans: ODE probing, forked groups, whole trajectories and windows are rows with different indices, not loops.

The executor's step table holds the deterministic rows 0 … T-1, then the stochastic rows T … 2T-1. A plan gives every row
the step at which it enters and its table row at each step; all live on the host, so planning never reads the device.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from adagrpo_kernels import Stream
from torch import Tensor


@dataclasses.dataclass(frozen=True)
class Plan:
    """R rows that advance together over T steps.

    Attributes:
        start: int64 [R], the first step each row takes; a row that starts at T is already finished.
        index: int64 [R, T], table row taken at each step.
        conditioning: int64 [R], row of the conditioning batch.
        noise_row: int64 [R], global row number of the noise, counted over all ranks.
        noise_stream: the ``Stream`` of its stochastic steps.
        keep: steps at which the executor keeps the latents (and velocities) of all rows, before the step.
        record: steps whose transitions are stored for the update.
    """

    start: Tensor
    index: Tensor
    conditioning: Tensor
    noise_row: Tensor
    noise_stream: Stream = Stream.TRAJECTORY_STEP
    keep: tuple[int, ...] = ()
    record: tuple[int, ...] = ()

    @property
    def num_rows(self) -> int:
        return self.start.shape[0]

    @property
    def num_steps(self) -> int:
        return self.index.shape[1]

    def stochastic_at(self, step: int) -> bool:
        """Whether any row takes a stochastic step here."""
        return bool((self.index[:, step] >= self.num_steps).any())

    def evaluations(self) -> int:
        """Transformer evaluations of the plan, in rows."""
        return int((self.num_steps - self.start).sum())


def probe_plan(conditioning: Sequence[int], num_steps: int, keep: Sequence[int] = ()) -> Plan:
    """Deterministic sampling of every row from step 0; also what held-out evaluation uses."""
    rows = torch.as_tensor(conditioning, dtype=torch.int64)
    return Plan(
        start=torch.zeros_like(rows),
        index=torch.arange(num_steps).repeat(len(rows), 1),
        conditioning=rows,
        noise_row=torch.arange(len(rows)),
        keep=tuple(keep),
    )


def branch_plan(slots: int, steps: Sequence[int], group_size: int, num_steps: int, first_slot: int = 0) -> Plan:
    """The tails of forked groups: rows ordered (slot, fork step, member), each entering after its fork step.

    The fork itself is ``RolloutExecutor.fork``; branches merge with earlier ones as soon as they enter.
    """
    forks = torch.as_tensor(tuple(steps), dtype=torch.int64)
    rows = slots * len(forks) * group_size
    return Plan(
        start=(forks + 1).repeat_interleave(group_size).repeat(slots),
        index=torch.arange(num_steps).repeat(rows, 1),
        conditioning=torch.arange(slots).repeat_interleave(len(forks) * group_size),
        noise_row=torch.arange(rows) + first_slot * len(forks) * group_size,
        noise_stream=Stream.FORK,
    )


def trajectory_plan(
    slots: int,
    group_size: int,
    num_steps: int,
    stochastic: Sequence[int],
    trained: Sequence[int],
    first_slot: int = 0,
) -> Plan:
    """Whole trajectories, rows ordered (slot, member): stochastic at some steps, deterministic at the others."""
    row = torch.arange(num_steps)
    row[list(stochastic)] += num_steps
    rows = slots * group_size
    return Plan(
        start=torch.zeros(rows, dtype=torch.int64),
        index=row.repeat(rows, 1),
        conditioning=torch.arange(slots).repeat_interleave(group_size),
        noise_row=torch.arange(rows) + first_slot * group_size,
        record=tuple(trained),
    )


def window_steps(iteration: int, num_steps: int, size: int, stride: int, every: int) -> tuple[int, ...]:
    """Stochastic steps of a window that moves by ``stride`` every ``every`` iterations and wraps (MixGRPO).

    The last step is never in the window: its noise would stay in the image.
    """
    positions = num_steps - size
    first = (iteration // every * stride) % positions
    return tuple(range(first, first + size))


def update_batches(
    slots: int, samples: int, steps: int, optimizer_steps: int, slots_per_batch: int, max_rows: int
) -> list[list[Tensor]]:
    """Transitions of each optimizer step, dealt into micro-batches.

    This IS the geometry of the update: whatever must match it (the fork call, recomputed log-probabilities) iterates the
    same list, because GPU kernels round differently for different batch shapes.

    Args:
        slots, samples, steps: transitions are ordered (slot, sample, trained step); forks have one sample per slot.
        optimizer_steps: divides ``steps``; the trained steps are dealt to them in order.
        slots_per_batch: slots that share a micro-batch.
        max_rows: largest micro-batch; 0 is unlimited.

    Returns:
        For each optimizer step its micro-batches, int64 index vectors into the transitions.
    """
    ids = torch.arange(slots * samples * steps).reshape(slots, samples, steps)
    batches = []
    for share in ids.tensor_split(optimizer_steps, dim=2):
        parts = [part.reshape(-1) for part in share.split(slots_per_batch)]
        batches.append([piece for part in parts for piece in part.split(max_rows or len(part))])
    return batches
