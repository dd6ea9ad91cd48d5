"""Samples to learn from: forked groups (AdaGRPO) and whole trajectories (Flow-GRPO, DanceGRPO, Flow-CPS, MixGRPO)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from ..algorithm.host_choices import WINDOW, host_generator
from ..algorithm.sde import Stream
from ..models.base import Conditioning
from .executor import Finished, RolloutExecutor
from .plans import Plan, Window, branch_plan, device_integers, probe_plan, trajectory_plan, update_batches
from .rollout import Rollout, Transitions
from .share import Share

Tails = Mapping[int, Sequence[Sequence[int]]]
"""``RolloutTable.tails``."""


@dataclasses.dataclass(frozen=True)
class Samples:
    """What a rollout hands to reward and update.

    Attributes:
        final: [R, L, C] clean latents, ordered (slot, group, tail, member).
        groups: number of groups; R = groups * tails * group size.
        transitions: the stored stochastic steps.
        batches: micro-batches of each optimizer step, see ``update_batches``.
        merged: some slots come from a second draw, whose fork velocities had another batch geometry.
        tails: images of each sample, by tails of several granularities.
    """

    final: Tensor
    groups: int
    transitions: Transitions
    batches: list[list[Tensor]]
    merged: bool = False
    tails: int = 1

    def by_group(self, scores: Tensor) -> Tensor:
        """Scores [M, R] of the final latents by group and member: [M*tails, groups, G]."""
        return scores.unflatten(1, (self.groups, self.tails, -1)).movedim(2, 1).flatten(0, 1)


@dataclasses.dataclass(frozen=True)
class StepSchedule:
    """Which steps of an iteration are stochastic, and which of those are trained.

    Attributes:
        steps: T.
        sde_steps: the stochastic steps, where no window moves.
        window: the stochastic steps, where it moves (MixGRPO, Flow-GRPO-Fast); None without.
        trained: how many of the stochastic steps are trained, drawn anew in each iteration (DanceGRPO).
        seed: of that draw.
        of_prompt: each slot has one of the stochastic steps to itself, drawn anew in each iteration (Flash-GRPO).
        of_sample: each sample draws its trained steps (DanceGRPO); else they are those of the iteration.
    """

    steps: int
    sde_steps: tuple[int, ...]
    window: Window | None
    trained: int
    seed: int
    of_prompt: bool = False
    of_sample: bool = False

    def stochastic(self, iteration: int | None) -> tuple[int, ...]:
        """The stochastic steps of an iteration, counted from 0; of None those that end last."""
        if self.window is None:
            return self.sde_steps
        return tuple(range(self.window.end))[-self.window.size :] if iteration is None else self.window.steps(iteration)

    def own(self, iteration: int | None, share: Share) -> tuple[int, ...] | None:
        """The step that each of this rank's slots has to itself; None where all have the same steps."""
        if not self.of_prompt:
            return None
        generator = host_generator(self.seed, iteration or 0, WINDOW)
        drawn = torch.randint(len(self.sde_steps), (share.total,), generator=generator).tolist()
        return tuple(self.sde_steps[drawn[number]] for number in share.numbers)

    def of_rows(self, iteration: int | None, share: Share, group_size: int) -> tuple[tuple[int, ...], ...] | None:
        """The trained steps of each of this rank's samples; None where all train the same."""
        if not self.of_sample:
            return None
        stochastic, generator = self.stochastic(iteration), host_generator(self.seed, iteration or 0)
        drawn = torch.rand(share.total, group_size, len(stochastic), generator=generator)[list(share.numbers)]
        steps = drawn.argsort(2)[..., : self.trained].sort(2).values.flatten(0, 1)
        return tuple(tuple(stochastic[i] for i in row) for row in steps.tolist())

    def learnt(self, iteration: int) -> tuple[int, ...]:
        """The trained ones among the stochastic steps, of all samples together."""
        stochastic = self.stochastic(iteration)
        if self.of_sample:
            return stochastic
        generator = host_generator(self.seed, iteration)
        order = torch.randperm(len(stochastic), generator=generator)[: self.trained].sort().values
        return tuple(stochastic[i] for i in order.tolist())


@dataclasses.dataclass(frozen=True)
class GroupShape:
    """Sizes of groups, and how their transitions are dealt to the update (``update_batches``).

    Attributes:
        group_size: G. optimizer_steps: per iteration. slots_per_batch: slots that share a micro-batch.
        dealt_by: what optimizer steps divide among them: steps, slots or samples.
    """

    group_size: int
    optimizer_steps: int = 1
    slots_per_batch: int = 1
    dealt_by: str = "steps"

    def group_index(self, samples: int, device: torch.device | str) -> Tensor:
        """int64 [R], the group of each sample of a rollout, which are ordered (slot, group, member)."""
        return torch.arange(samples, device=device) // self.group_size

    def batches(self, slots: int, samples: int, steps: int, max_rows: int, device: torch.device | str) -> list[list[Tensor]]:
        """Micro-batches of ``samples`` transitions per slot at each of ``steps`` steps."""
        sizes = (slots, samples, steps, self.optimizer_steps, self.slots_per_batch, max_rows)
        return update_batches(*sizes, device, self.dealt_by)


class Sampler(Protocol):
    """Draws the groups of an iteration by one of the plans, and tells what that runs."""

    @property
    def shape(self) -> GroupShape:
        """Sizes of groups, and which sample is in which."""
        ...

    @property
    def fresh_velocity(self) -> bool:
        """Whether the update's micro-batches are run before the rollout, for the velocities that groups fork with."""
        ...

    def plan(self, share: Share, tails: Tails | None = None, iteration: int | None = None) -> Plan:
        """The rollout of this rank's slots in an iteration; None is one that trains every stochastic step and runs as much as
        any. ``tails`` are ``RolloutTable.tails``."""
        ...

    def anchor_plan(self, slots: int) -> Plan | None:
        """What is sampled before the rollout; None is nothing."""
        ...

    def batches(self, slots: int, max_rows: int, device: torch.device | str = "cpu") -> list[list[Tensor]]:
        """Micro-batches of the update, see ``update_batches``."""
        ...

    def rows_per_slot(self, iteration: int) -> int:
        """Samples of each slot."""
        ...

    def __call__(
        self,
        executor: RolloutExecutor,
        anchors: Rollout | None,
        anchor_row: Tensor,
        conditioning: Conditioning,
        iteration: int,
        draw: int,
        finished: Finished | None = None,
        share: Share | None = None,
    ) -> Samples:
        """Groups of P slots.

        Args:
            anchors, anchor_row: ODE rollout that kept the fork steps, and the row of each slot in it, int64 [P].
            conditioning: of the P slots.
            iteration: counted from 0; of the step schedule.
            draw: number of the draw, of the noise.
            finished: see ``RolloutExecutor.run``.
            share: of the slots, which are this rank's; None is all there are.
        """
        ...


@dataclasses.dataclass(frozen=True)
class ForkSampler:
    """Plan ``fork``: groups branch off an ODE anchor at each trained step, then follow the ODE to the end (AdaGRPO).

    Attributes:
        fresh_velocity: compute the fork velocities anew, in the micro-batches of the update (same rows, same kernels),
            instead of taking the anchor's.
        seeds: anchors of each slot: the pick's own, and others from noise of their own (TempFlow-GRPO).
        tails: of each sample (``RolloutTable.tails``).
    """

    schedule: StepSchedule
    shape: GroupShape
    fresh_velocity: bool = True
    seeds: int = 1
    tails: int = 1

    def rows_per_slot(self, iteration: int) -> int:
        """A group at each trained step of each anchor, and for each of its tails."""
        return self.shape.group_size * len(self.schedule.learnt(iteration)) * self.seeds * self.tails

    def anchor_plan(self, slots: int) -> Plan | None:
        """The anchors beyond the picks' own."""
        rows = [slot for slot in range(slots) for _ in range(self.seeds - 1)]
        return probe_plan(rows, self.schedule.steps, self.schedule.sde_steps) if rows else None

    def plan(self, share: Share, tails: Tails | None = None, iteration: int | None = None) -> Plan:
        """The tails of the groups."""
        steps, size = self.schedule.sde_steps if iteration is None else self.schedule.learnt(iteration), self.shape.group_size
        return branch_plan(share.each, steps, size, self.schedule.steps, share.numbers, tails, self.seeds)

    def batches(self, slots: int, max_rows: int, device: torch.device | str = "cpu") -> list[list[Tensor]]:
        """A fork is one transition, whatever its members; an anchor is a sample."""
        return self.shape.batches(slots, self.seeds, self.schedule.trained, max_rows, device)

    def __call__(
        self,
        executor: RolloutExecutor,
        anchors: Rollout | None,
        anchor_row: Tensor,
        conditioning: Conditioning,
        iteration: int,
        draw: int,
        finished: Finished | None = None,
        share: Share | None = None,
    ) -> Samples:
        """See ``Sampler``."""
        assert anchors is not None
        steps, group_size = self.schedule.learnt(iteration), self.shape.group_size
        slots, device = anchor_row.shape[0], anchor_row.device
        share, groups = share or Share.alone(slots), slots * self.seeds * len(steps)
        latent = self._forked(executor, _at_forks(anchors.latents, steps, anchor_row), conditioning, draw, steps, share)
        index = (device_integers(steps, device) + executor.num_steps).repeat(slots * self.seeds)
        slot = torch.arange(slots, device=device).repeat_interleave(groups // slots)
        batches = self.batches(slots, executor.limit.max_rows, device)
        if self.fresh_velocity:
            v = _fresh_velocities(executor, latent, index, conditioning, slot, batches)
        else:
            v = _at_forks(anchors.velocities, steps, anchor_row)
        plan = self.plan(share, executor.rollout_table.tails, iteration)
        noise_row = share.rows(groups // slots * group_size, device).reshape(groups, group_size)
        with executor.phase("rollout"):
            transitions = executor.fork(latent, v, index, slot, noise_row, draw)
        start = transitions.successors.unsqueeze(1).expand(-1, self.tails, -1, -1, -1).flatten(0, 2)
        rollout = executor.run(plan, start, conditioning, draw, "rollout", finished=finished)
        return Samples(rollout.final, groups, transitions, batches, tails=self.tails)

    def _forked(
        self,
        executor: RolloutExecutor,
        latent: Tensor,
        conditioning: Conditioning,
        draw: int,
        steps: Sequence[int],
        share: Share,
    ) -> Tensor:
        """Latents [P*seeds*K, L, C] at the fork steps of every anchor, from those [P*K, L, C] of the picks' own."""
        plan = self.anchor_plan(share.each)
        if plan is None:
            return latent
        rows = torch.arange(plan.num_rows, device=latent.device)
        x = executor.initial_noise(share.rows(self.seeds - 1, latent.device), draw, Stream.TRAJECTORY_INIT)
        others = executor.run(plan, x, conditioning, draw, "rollout").latents
        by_anchor = (share.each, -1, len(steps))
        pair = (latent.unflatten(0, by_anchor), _at_forks(others, steps, rows).unflatten(0, by_anchor))
        return torch.cat(pair, 1).flatten(0, 2)


def _at_forks(kept: Mapping[int, Tensor], steps: Sequence[int], rows: Tensor) -> Tensor:
    """Of what was kept at each of K steps that of the anchors ``rows`` [P]: [P*K, L, C]."""
    return torch.stack([kept[k].index_select(0, rows) for k in steps], 1).flatten(0, 1)


def _fresh_velocities(
    executor: RolloutExecutor,
    latent: Tensor,
    index: Tensor,
    conditioning: Conditioning,
    slot: Tensor,
    batches: Sequence[Sequence[Tensor]],
) -> Tensor:
    """The policy's velocities [N, L, C] of the transitions to come, in the micro-batches of the update."""
    v = torch.empty(latent.shape, dtype=executor.model.dtype, device=latent.device)
    with torch.no_grad(), executor.phase("prefix"):
        for rows in (batch for step in batches for batch in step):
            v.index_copy_(0, rows, executor.prefix_velocity(latent[rows], index[rows], conditioning, slot[rows]))
    return v


@dataclasses.dataclass(frozen=True)
class TrajectorySampler:
    """Plans ``trajectory`` and ``window``: whole trajectories, stochastic at the scheduled steps, of which the trained ones
    are stored (Flow-GRPO, DanceGRPO, Flow-CPS; MixGRPO).

    Attributes:
        shared_noise: trajectories of a group start from one initial noise (DanceGRPO).
    """

    schedule: StepSchedule
    shape: GroupShape
    shared_noise: bool = False

    def rows_per_slot(self, iteration: int) -> int:
        """One group."""
        return self.shape.group_size

    @property
    def fresh_velocity(self) -> bool:
        """Nothing forks."""
        return False

    def anchor_plan(self, slots: int) -> Plan | None:
        """Nothing forks."""
        return None

    def plan(self, share: Share, tails: Tails | None = None, iteration: int | None = None) -> Plan:
        """The trajectories; None is the longest."""
        stochastic = self.schedule.stochastic(iteration)
        learnt = stochastic if iteration is None else self.schedule.learnt(iteration)
        tail, own = tails[stochastic[-1]][0] if tails else None, self.schedule.own(iteration, share)
        if own is not None:
            stochastic = learnt = tuple(sorted(set(own)))
        sizes = (share.each, self.shape.group_size, self.schedule.steps)
        of_rows = self.schedule.of_rows(iteration, share, self.shape.group_size)
        return trajectory_plan(*sizes, stochastic, learnt, share.numbers, tail, own, of_rows)

    def batches(self, slots: int, max_rows: int, device: torch.device | str = "cpu") -> list[list[Tensor]]:
        """Each trained step of a trajectory is a transition."""
        return self.shape.batches(slots, self.shape.group_size, self.schedule.trained, max_rows, device)

    def __call__(
        self,
        executor: RolloutExecutor,
        anchors: Rollout | None,
        anchor_row: Tensor,
        conditioning: Conditioning,
        iteration: int,
        draw: int,
        finished: Finished | None = None,
        share: Share | None = None,
    ) -> Samples:
        """See ``Sampler``; anchors are not used."""
        slots, group_size = anchor_row.shape[0], self.shape.group_size
        share = share or Share.alone(slots)
        plan = self.plan(share, executor.rollout_table.tails, iteration)
        start_row = share.rows(group_size, executor.model.device)
        start_row = start_row // group_size if self.shared_noise else start_row
        x = executor.initial_noise(start_row, draw, Stream.TRAJECTORY_INIT)
        rollout = executor.run(plan, x, conditioning, draw, "rollout", finished=finished)
        assert rollout.transitions is not None
        batches = self.batches(slots, executor.limit.max_rows, x.device)
        return Samples(rollout.final, slots, rollout.transitions, batches)


def merge_slots(samples: Samples, other: Samples, slots: Tensor, number: int) -> Samples:
    """``samples`` of ``number`` slots with the slots ``slots`` (int64 vector) taken from the first of ``other``, in order."""
    per_slot = samples.transitions.latent.shape[0] // number
    rows_per_slot = samples.final.shape[0] // number
    moved = slots.repeat_interleave(per_slot)
    home = torch.arange(slots.shape[0], device=slots.device).repeat_interleave(per_slot)
    fresh = other.transitions.rows(torch.arange(len(moved), device=slots.device))
    fresh = dataclasses.replace(fresh, slot=moved, sample=fresh.sample + ((moved - home) * rows_per_slot).unsqueeze(1))
    target = (slots.unsqueeze(1) * per_slot + torch.arange(per_slot, device=slots.device)).flatten()
    rows = (slots.unsqueeze(1) * rows_per_slot + torch.arange(rows_per_slot, device=slots.device)).flatten()
    fields = (f.name for f in dataclasses.fields(Transitions))
    merged = {name: getattr(samples.transitions, name).index_copy(0, target, getattr(fresh, name)) for name in fields}
    final = samples.final.index_copy(0, rows, other.final[: len(rows)])
    return dataclasses.replace(samples, final=final, transitions=Transitions(**merged), merged=True)
