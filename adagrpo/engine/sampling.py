"""Samples to learn from: forked groups (AdaGRPO) and whole trajectories (Flow-GRPO, DanceGRPO, Flow-CPS, MixGRPO)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from ..algorithm.sde import Stream
from ..models.base import Conditioning
from .executor import Finished, RolloutExecutor
from .plans import branch_plan, device_integers, trajectory_plan, update_batches
from .rollout import Rollout, Transitions


@dataclasses.dataclass(frozen=True)
class Samples:
    """What a rollout hands to reward and update.

    Attributes:
        final: [R, L, C] clean latents, ordered (slot, group, member).
        groups: number of reward groups; R = groups * group size.
        transitions: the stored stochastic steps.
        batches: micro-batches of each optimizer step, see ``update_batches``.
        merged: some slots come from a second draw, whose fork velocities had another batch geometry.
    """

    final: Tensor
    groups: int
    transitions: Transitions
    batches: list[list[Tensor]]
    merged: bool = False


def sample_forks(
    anchors: Rollout,
    anchor_row: Tensor,
    *,
    executor: RolloutExecutor,
    conditioning: Conditioning,
    iteration: int,
    steps: Sequence[int],
    group_size: int,
    fresh_velocity: bool,
    optimizer_steps: int = 1,
    slots_per_batch: int = 1,
    first_slot: int = 0,
    finished: Finished | None = None,
) -> Samples:
    """Fork ``group_size`` samples off each slot's ODE anchor at each of ``steps``, then follow the ODE to the end.

    Args:
        anchors: probe rollout that kept latents (and velocities) at ``steps``.
        anchor_row: int64 [P], the anchor of each slot.
        conditioning: of the P slots.
        fresh_velocity: compute the fork velocities anew, in the micro-batches of the update (same rows, same kernels),
            instead of taking the probe's.
        first_slot: global number of the first slot, over all ranks.
        finished: see ``RolloutExecutor.run``.
    """
    slots, forks = anchor_row.shape[0], len(steps)
    device = anchor_row.device
    flat = lambda kept: torch.stack([kept[k].index_select(0, anchor_row) for k in steps], 1).flatten(0, 1)  # noqa: E731
    latent = flat(anchors.latents)
    index = (device_integers(tuple(steps), device) + executor.num_steps).repeat(slots)
    slot = torch.arange(slots, device=device).repeat_interleave(forks)
    batches = update_batches(slots, 1, forks, optimizer_steps, slots_per_batch, executor.max_rows, device)
    if fresh_velocity:
        v = torch.empty(latent.shape, dtype=executor.model.dtype, device=device)
        with torch.no_grad(), executor.phase("prefix"):
            for rows in (batch for step in batches for batch in step):
                fresh = executor.prefix_velocity(latent[rows], index[rows], conditioning, slot[rows])
                v.index_copy_(0, rows, fresh)
    else:
        v = flat(anchors.velocities)
    plan = branch_plan(slots, steps, group_size, executor.num_steps, first_slot, executor.rollout_table.tails)
    first_row = first_slot * forks * group_size
    noise_row = torch.arange(first_row, first_row + plan.num_rows, device=device).reshape(slots * forks, group_size)
    with executor.phase("rollout"):
        transitions = executor.fork(latent, v, index, slot, noise_row, iteration)
    start = transitions.successors.flatten(0, 1)
    rollout = executor.run(plan, start, conditioning, iteration, "rollout", finished=finished)
    return Samples(rollout.final, slots * forks, transitions, batches)


def sample_trajectories(
    slots: int,
    stochastic: Sequence[int],
    trained: Sequence[int],
    *,
    executor: RolloutExecutor,
    conditioning: Conditioning,
    iteration: int,
    group_size: int,
    shared_noise: bool = False,
    optimizer_steps: int = 1,
    slots_per_batch: int = 1,
    first_slot: int = 0,
    finished: Finished | None = None,
) -> Samples:
    """Whole trajectories, ``group_size`` per slot: stochastic at some steps, of which ``trained`` are stored."""
    plan = trajectory_plan(slots, group_size, executor.num_steps, stochastic, trained, first_slot)
    start_row = torch.arange(plan.num_rows, device=executor.model.device) + first_slot * group_size
    start_row = start_row // group_size if shared_noise else start_row
    x = executor.initial_noise(start_row, iteration, Stream.TRAJECTORY_INIT)
    rollout = executor.run(plan, x, conditioning, iteration, "rollout", finished=finished)
    assert rollout.transitions is not None
    device = x.device
    batches = update_batches(slots, group_size, len(trained), optimizer_steps, slots_per_batch, executor.max_rows, device)
    return Samples(rollout.final, slots, rollout.transitions, batches)


def merge_slots(samples: Samples, other: Samples, slots: Tensor, number: int) -> Samples:
    """``samples`` of ``number`` slots with the slots ``slots`` (int64 vector) taken from ``other``, in order."""
    per_slot = samples.transitions.latent.shape[0] // number
    rows_per_slot = samples.final.shape[0] // number
    moved = slots.repeat_interleave(per_slot)
    home = torch.arange(slots.shape[0], device=slots.device).repeat_interleave(per_slot)
    fresh = dataclasses.replace(
        other.transitions, slot=moved, sample=other.transitions.sample + ((moved - home) * rows_per_slot).unsqueeze(1)
    )
    target = (slots.unsqueeze(1) * per_slot + torch.arange(per_slot, device=slots.device)).flatten()
    rows = (slots.unsqueeze(1) * rows_per_slot + torch.arange(rows_per_slot, device=slots.device)).flatten()
    fields = (f.name for f in dataclasses.fields(Transitions))
    merged = {name: getattr(samples.transitions, name).index_copy(0, target, getattr(fresh, name)) for name in fields}
    final = samples.final.index_copy(0, rows, other.final)
    return dataclasses.replace(samples, final=final, transitions=Transitions(**merged), merged=True)
