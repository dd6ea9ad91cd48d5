"""The rollout executor: one loop advances the rows of any plan, counts what it evaluates and stores transitions."""

from __future__ import annotations

import dataclasses
import functools
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from adagrpo_kernels import MAX_STEP, History
from adagrpo_kernels._dispatch import device_word
from torch import Tensor

from ..algorithm.sde import Draw, Stream, affine_mean, group_log_prob, philox_normal, sde_step
from ..algorithm.tables import RolloutTable
from ..forward.forwards import Forward, PolicyForward
from ..models.base import Conditioning, FlowModel
from .batch_limit import BatchLimit
from .graphs import StepGraphs
from .lanes import Chunk, Lane, Lanes
from .plans import Plan, device_integers
from .rollout import Rollout, Transitions, merged
from .timing import PhaseTimer

Finished = Callable[[Tensor, Tensor], None]


@dataclasses.dataclass
class Count:
    """Work of one phase: image-forwards of the transformer, and batched calls."""

    evaluations: int = 0
    calls: int = 0


@dataclasses.dataclass(frozen=True)
class Backends:
    """How an executor computes.

    Attributes:
        impl: implementation of the operators (``adagrpo_kernels._dispatch``).
        rollout: what computes the velocities of rollouts; None is the policy itself.
        graphs: capture the rollout's steps.
    """

    impl: str | None = None
    rollout: Forward | None = None
    graphs: StepGraphs | None = None


class RolloutExecutor:
    """Advances rows through a table of steps.

    Args:
        model: the policy.
        table: every step a rollout can take; moved to the model's device.
        seed: of the counter-based noise.
        storage: dtype in which latents are kept between steps.
        limit: of its batches; None is none.
        phase: timer of the trainer's phases.
        backends: how it computes; the default is by the policy itself.
        tables: what ``table`` holds at each picture size (height, width), where its values depend on it.
    """

    def __init__(
        self,
        model: FlowModel,
        table: RolloutTable,
        seed: int,
        storage: torch.dtype,
        limit: BatchLimit | None = None,
        phase: PhaseTimer | None = None,
        backends: Backends = Backends(),
        tables: Mapping[tuple[int, int], RolloutTable] | None = None,
    ) -> None:
        self.model, self.seed, self.storage, self.limit = model, seed, storage, limit or BatchLimit()
        self.phase, self.impl = phase or PhaseTimer(model.device), backends.impl
        self.num_steps = table.num_steps
        if self.num_steps > MAX_STEP:
            raise ValueError(f"{self.num_steps} steps: the counter of the noise holds {MAX_STEP}")
        wide = torch.float64 if storage is torch.float64 else torch.float32
        self.rollout_table = table.to(model.device, wide)
        self.table = self.rollout_table.steps
        self._tables = {size: each.to(model.device, wide) for size, each in (tables or {}).items()}
        self.policy: Forward = PolicyForward(model, self.rollout_table)
        self.rollout = backends.rollout or self.policy
        self.lanes = Lanes(self.table.a, self.limit, backends.graphs)
        self._seed, self._zero = self._word(seed), self._word(0)
        self._size: tuple[int, int] | None = None  # graphs hold it: pictures on their side have latents of the same shape
        self.counts: dict[str, Count] = defaultdict(Count)

    @property
    def graphs(self) -> StepGraphs | None:
        """What captures the rollout's steps; None runs them directly."""
        return self.lanes.graphs

    def refresh(self) -> None:
        """Let the rollout's weights follow the policy's."""
        self.rollout.refresh()

    def resize(self, height: int, width: int) -> None:
        """Sample pictures of this size, one of ``tables`` if there are any, from now on."""
        self.model.resize(height, width)
        self._size = height, width
        if self._tables:
            self.rollout_table.take(self._tables[height, width])

    def reset_counts(self) -> None:
        """Forget all counts."""
        self.counts.clear()

    def halve_rows(self, error: Exception | None, largest: int | None = None) -> None:
        """After an out-of-memory error, of this rank or (None) another one: halve the largest batch, once per executor.

        Args:
            largest: batch of any rank; None is of this one.

        Raises:
            RunError: it was halved before, or is one row already.
        """
        self.limit.halve(error, self.limit.largest if largest is None else largest, graphs=self.graphs is not None)
        self.lanes.forget()

    def initial_noise(self, noise_row: Tensor, draw: int, stream: Stream) -> Tensor:
        """Starting latents [R, L, C] in the storage dtype for global rows ``noise_row``."""
        length, channels = self.model.latent_shape
        rows = noise_row.to(self.model.device)
        number = self._word(draw)
        noise = philox_normal(self._seed, rows, length * channels, number, stream, self._zero, self.storage, self.impl)
        return noise.reshape(-1, length, channels)

    def velocity(self, x: Tensor, index: Tensor, conditioning: Conditioning, slot: Tensor, phase: str) -> Tensor:
        """The policy's velocity [R, L, C] at table rows ``index`` for conditioning rows ``slot``, in chunks, counted."""
        parts = []
        for part in self.limit.chunks(x.shape[0]):
            parts.append(self.policy.velocity(x[part], index[part], conditioning, slot[part]))
            self.counts[phase].calls += 1
            self.counts[phase].evaluations += x[part].shape[0]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    @torch.no_grad()
    def prefix_velocity(self, x: Tensor, index: Tensor, conditioning: Conditioning, slot: Tensor) -> Tensor:
        """``velocity`` of one micro-batch of the update without gradient, captured where steps are: same kernels, same rows."""
        if self.graphs is None:
            return self.velocity(x, index, conditioning, slot, "prefix")
        fresh = [x, index, slot, *conditioning.tensors.values()]
        key = ("prefix", tuple(conditioning.tensors), tuple((tuple(t.shape), t.dtype) for t in fresh), self._size)
        buffers = self.lanes.buffers(key, fresh)

        def call() -> Tensor:
            kept_x, kept_index, kept_slot, *tensors = buffers
            own = Conditioning(dict(zip(conditioning.tensors, tensors, strict=True)))
            return self.policy.velocity(kept_x, kept_index, own, kept_slot)

        self.counts["prefix"].calls += 1
        self.counts["prefix"].evaluations += x.shape[0]
        return self.graphs(key, call, buffers).clone()

    @torch.no_grad()
    def run(
        self,
        plan: Plan,
        x: Tensor,
        conditioning: Conditioning,
        draw: int,
        phase: str,
        on_policy: bool = False,
        finished: Finished | None = None,
    ) -> Rollout:
        """Advance every row of ``plan`` from its entry latent to the last step, one chunk of ``max_rows`` after the other.

        Args:
            x: entry latents [R, L, C].
            conditioning: of the prompts that ``plan.conditioning`` counts.
            draw: its number, of the noise.
            phase: name under which work is counted and timed.
            on_policy: by the policy itself, whatever computes rollouts.
            finished: told the final latents [r, L, C] and the places int64 [r] of each chunk's rows when they are sampled.
        """
        forwards: tuple[Forward, ...] = (self.policy if on_policy else self.rollout,)
        if plan.stochastic and forwards[0].lossy:
            forwards += (self.policy,)  # a Gaussian that is to be reinforced has the policy's own mean
        with self.phase(phase):
            prepared = tuple(forward.prepare(conditioning) for forward in forwards)
        chunks = self.lanes.chunks(plan)
        parts = []
        for chunk in chunks:
            with self.phase(phase):
                lane = self.lanes.lane(plan, chunk, x, prepared, draw, keep=not on_policy)
                parts.append(self._advance(plan, lane, forwards, phase))
            if finished is not None:
                finished(parts[-1].final, chunk.rows)
        if len(parts) == 1 and _in_order(plan):
            return parts[0]
        return merged(parts, torch.cat([chunk.rows for chunk in chunks]), plan.stored)

    def _advance(self, plan: Plan, lane: Lane, forwards: tuple[Forward, ...], phase: str) -> Rollout:
        """All steps of one chunk; results in the chunk's row order."""
        latents, velocities, stored = {}, {}, []
        graphs, own = (self.graphs, torch.clone) if lane.static else (None, lambda t: t)  # static tensors are written again
        for k in range(plan.num_steps):
            live = lane.chunk.entered[k]
            if live == 0:
                continue
            noisy, recorded, kept = k in plan.stochastic, k in plan.record, k in plan.keep
            before = lane.x[:live].clone() if recorded or kept else None
            which = len(forwards) - 1 if noisy else 0
            step = functools.partial(self._step, plan, lane, live, noisy, recorded, forwards[which], lane.prepared[which])
            lane.step.fill_(k)
            key = (id(lane), phase, live, noisy, recorded, which, self._size)
            v, mean, logp = step() if graphs is None else graphs(key, step, lane.statics())
            self.counts[phase].calls += 1
            self.counts[phase].evaluations += live
            if kept:
                assert before is not None
                latents[k], velocities[k] = before, own(v)
            if recorded:
                assert before is not None
                stored.append((before, lane.x.clone(), own(mean), own(logp)))
        transitions = self._collect(plan, lane.chunk, stored) if stored else None
        return Rollout(own(lane.x), latents, velocities, transitions)

    def _step(
        self, plan: Plan, lane: Lane, live: int, noisy: bool, recorded: bool, forward: Forward, prepared: Conditioning
    ) -> tuple[Tensor, Tensor, Tensor]:
        """One step of the first ``live`` rows, in place; a function of the lane's tensors alone, so that it can be captured."""
        chunk, x = lane.chunk, lane.x[:live]
        index = chunk.index[:live].gather(1, lane.step.reshape(1, 1).expand(live, 1)).squeeze(1)
        v = forward.velocity(x, index, prepared, chunk.conditioning[:live])
        noise = Draw(self._seed, chunk.noise_row[:live], lane.draw, plan.noise_stream, lane.step) if noisy else None
        keywords: dict[str, Any] = {"with_mean": recorded, "impl": self.impl}
        weight = self.rollout_table.history
        if lane.clean is not None and weight is not None:
            keywords |= {"history": History(lane.clean[:live], weight), "with_clean": True}
        step = sde_step(x, v, self.table, index, noise, **keywords)
        x.copy_(step.next)
        if lane.clean is not None and step.clean is not None:
            lane.clean[:live].copy_(step.clean)
        return v, step.mean, step.logp

    @torch.no_grad()
    def fork(self, x: Tensor, v: Tensor, index: Tensor, slot: Tensor, noise_row: Tensor, draw: int) -> Transitions:
        """Draw G successors of each of N latents that share one mean.

        Args:
            x, v: latents and velocities [N, L, C] at the fork steps.
            index: int64 [N], stochastic rows of the table.
            slot: int64 [N], conditioning rows.
            noise_row: int64 [N, G], global rows of the noise.
            draw: its number, of the noise.

        Returns:
            Transitions whose ``sample`` counts the branches in order (N, G); log-probabilities are computed exactly as
            the update computes them.
        """
        groups, size = noise_row.shape
        source = torch.arange(groups, device=x.device).repeat_interleave(size)
        forked = index.repeat_interleave(size)
        noise = Draw(self._seed, noise_row.flatten(), self._word(draw), Stream.FORK, forked - self.num_steps)
        step = sde_step(x, v, self.table, forked, noise, source=source, with_mean=False, impl=self.impl)
        successors = step.next.unflatten(0, (groups, size))
        return Transitions(
            latent=x,
            successors=successors,
            mean=affine_mean(x, v, self.table, index),
            logp=group_log_prob(x, v, successors, self.table, index, self.impl),
            index=index,
            slot=slot,
            sample=torch.arange(groups * size, device=x.device).reshape(groups, size),
        )

    def update_velocity(self, transitions: Transitions, conditioning: Conditioning, phase: str) -> Tensor:
        """Velocity at the stored latents of one micro-batch, with gradient if enabled; one call."""
        return self.velocity(transitions.latent, transitions.index, conditioning, transitions.slot, phase)

    @torch.no_grad()
    def recompute(
        self, transitions: Transitions, conditioning: Conditioning, batches: Iterable[Tensor], phase: str = "recompute"
    ) -> Transitions:
        """The transitions with means and log-probabilities under the current weights, in the geometry of the update's
        micro-batches."""
        mean, logp = torch.empty_like(transitions.mean), torch.empty_like(transitions.logp)
        for batch in batches:
            part = transitions.rows(batch)
            v = self.update_velocity(part, conditioning, phase)
            fresh = group_log_prob(part.latent, v, part.successors, self.table, part.index, self.impl)
            logp.index_copy_(0, batch, fresh)
            mean.index_copy_(0, batch, affine_mean(part.latent, v, self.table, part.index))
        return dataclasses.replace(transitions, mean=mean, logp=logp)

    def _word(self, value: int) -> Tensor:
        """A number of the noise's counter on the device, by a fill: no copy from the host, and a graph can change it."""
        return device_word(value, self.table.a)

    def _collect(self, plan: Plan, chunk: Chunk, stored: Sequence[tuple[Tensor, ...]]) -> Transitions:
        """Transitions ordered (row, step) from per-step tensors; recorded plans start all rows at step 0."""
        device = chunk.rows.device
        index = chunk.index.index_select(1, device_integers(plan.record, device))
        by_row = [torch.stack(parts, 1) for parts in zip(*stored, strict=True)]
        if plan.own is not None:
            which = device_integers(tuple(plan.own.flatten().tolist()), device).reshape(plan.own.shape)
            which, row = which.index_select(0, chunk.rows), torch.arange(len(chunk.rows), device=device).unsqueeze(1)
            index, by_row = index[row, which], [parts[row, which] for parts in by_row]
        latent, successor, mean, logp = (parts.flatten(0, 1) for parts in by_row)
        return Transitions(
            latent=latent,
            successors=successor.unsqueeze(1),
            mean=mean,
            logp=logp.unsqueeze(1),
            index=index.flatten(),
            slot=chunk.conditioning.repeat_interleave(plan.stored),
            sample=chunk.rows.repeat_interleave(plan.stored).unsqueeze(1),
        )


def _in_order(plan: Plan) -> bool:
    """Whether rows enter in the plan's order."""
    return bool((plan.start[1:] >= plan.start[:-1]).all())
