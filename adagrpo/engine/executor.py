"""The rollout executor: one loop advances the rows of any plan, counts what it evaluates and stores transitions."""

from __future__ import annotations

import dataclasses
import functools
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any

import torch
from adagrpo_kernels import MAX_STEP, History
from adagrpo_kernels._dispatch import device_word
from torch import Tensor

from ..algorithm.sde import Draw, Stream, affine_mean, group_log_prob, philox_normal, sde_step
from ..algorithm.tables import RolloutTable
from ..errors import RunError
from ..forward.forwards import Forward, PolicyForward
from ..models.base import Conditioning, FlowModel
from .graphs import StepGraphs
from .plans import KEPT_PLANS, Plan, chunk_slices, device_integers, entered
from .timing import PhaseTimer

Finished = Callable[[Tensor, Tensor], None]
MAX_LANES = 16


@dataclasses.dataclass
class Count:
    """Work of one phase: image-forwards of the transformer, and batched calls."""

    evaluations: int = 0
    calls: int = 0


@dataclasses.dataclass(frozen=True)
class Transitions:
    """Stored stochastic steps: N latents with G successors each, after rounding to the storage dtype.

    Attributes:
        latent: [N, L, C], x_k.
        successors: [N, G, L, C].
        mean: [N, L, C], compute dtype.
        logp: [N, G], compute dtype.
        index: int64 [N], row of the step table.
        slot: int64 [N], row of the conditioning batch.
        sample: int64 [N, G], the rollout row (final image) each successor led to.
    """

    latent: Tensor
    successors: Tensor
    mean: Tensor
    logp: Tensor
    index: Tensor
    slot: Tensor
    sample: Tensor

    def rows(self, index: Tensor) -> Transitions:
        """The transitions ``index``, an int64 vector on their device."""
        fields = (f.name for f in dataclasses.fields(self))
        return Transitions(**{name: getattr(self, name).index_select(0, index) for name in fields})

    def with_logp(self, logp: Tensor) -> Transitions:
        """The same transitions with other stored log-probabilities."""
        return dataclasses.replace(self, logp=logp)


@dataclasses.dataclass(frozen=True)
class Rollout:
    """What a plan produced, in the plan's row order.

    Attributes:
        final: [R, L, C], latents after the last step.
        latents, velocities: [R, L, C] at each step of ``plan.keep``.
        transitions: steps of ``plan.record``, ordered (row, step); None without any.
    """

    final: Tensor
    latents: dict[int, Tensor]
    velocities: dict[int, Tensor]
    transitions: Transitions | None


@dataclasses.dataclass(frozen=True, eq=False)
class _Chunk:
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
class _Lane:
    """The tensors of a rolling chunk that steps read and write in place.

    Attributes:
        chunk: the rows.
        x: [r, L, C], latents.
        clean: [r, L, C] in the compute dtype, previews of the step before; None for first-order plans.
        step, iteration: int64 0-dim.
        prepared: what the calls share, by forward.
        static: every run with this chunk uses these very tensors, so that its steps may be captured.
    """

    chunk: _Chunk
    x: Tensor
    clean: Tensor | None
    step: Tensor
    iteration: Tensor
    prepared: tuple[Conditioning, ...]
    static: bool

    def statics(self) -> list[Tensor]:
        """Every tensor a captured step refers to."""
        chunk = (self.chunk.index, self.chunk.conditioning, self.chunk.noise_row)
        own = [t for t in (self.x, self.clean, self.step, self.iteration) if t is not None]
        return [*own, *chunk, *(t for c in self.prepared for t in c.tensors.values())]


class RolloutExecutor:
    """Advances rows through a table of steps.

    Args:
        model: the policy.
        table: every step a rollout can take; moved to the model's device.
        seed: of the counter-based noise.
        storage: dtype in which latents are kept between steps.
        max_rows: largest batch of one transformer call; 0 is unlimited.
        phase: timer of the trainer's phases.
        impl: implementation of the operators (``adagrpo_kernels._dispatch``).
        rollout: what computes the velocities of rollouts; None is the policy itself.
        graphs: capture the rollout's steps.
        decode_rows: largest batch of decoder and rewards, where it is less than ``max_rows``; 0 is ``max_rows``.
    """

    def __init__(
        self,
        model: FlowModel,
        table: RolloutTable,
        seed: int,
        storage: torch.dtype,
        max_rows: int = 0,
        phase: PhaseTimer | None = None,
        impl: str | None = None,
        rollout: Forward | None = None,
        graphs: StepGraphs | None = None,
        decode_rows: int = 0,
    ) -> None:
        self.model, self.seed, self.storage, self.max_rows, self.decode_rows = model, seed, storage, max_rows, decode_rows
        self.phase, self.impl = phase or PhaseTimer(model.device), impl
        self._largest, self._halved = 0, False
        self.num_steps = table.num_steps
        if self.num_steps > MAX_STEP:
            raise ValueError(f"{self.num_steps} steps: the counter of the noise holds {MAX_STEP}")
        wide = torch.float64 if storage is torch.float64 else torch.float32
        self.rollout_table = table.to(model.device, wide)
        self.table = self.rollout_table.steps
        self.policy: Forward = PolicyForward(model, self.rollout_table)
        self.rollout, self.graphs = rollout or self.policy, graphs
        self._seed, self._zero = self._word(seed), self._word(0)
        self._chunks: OrderedDict[tuple[int, int], tuple[Plan, list[_Chunk]]] = OrderedDict()
        self._lanes: dict[Hashable, _Lane] = {}
        self._prefix: dict[Hashable, list[Tensor]] = {}
        self.counts: dict[str, Count] = defaultdict(Count)

    def refresh(self) -> None:
        """Let the rollout's weights follow the policy's."""
        self.rollout.refresh()

    def reset_counts(self) -> None:
        """Forget all counts."""
        self.counts.clear()

    def decode_chunks(self, rows: int) -> list[slice]:
        """Slices of at most ``max_rows`` and ``decode_rows`` rows."""
        return chunk_slices(rows, self.max_rows, self.decode_rows)

    def chunks(self, rows: int) -> list[slice]:
        """Slices of at most ``max_rows`` rows."""
        self._largest = max(self._largest, min(self.max_rows or rows, rows))
        return chunk_slices(rows, self.max_rows)

    @property
    def batch_limit(self) -> tuple[int, bool]:
        """``max_rows``, and whether it was halved for lack of memory: part of what a resumed run must repeat."""
        return self.max_rows, self._halved

    @batch_limit.setter
    def batch_limit(self, limit: tuple[int, bool]) -> None:
        self.max_rows, self._halved = limit

    def halve_rows(self, error: Exception) -> None:
        """After an out-of-memory error: halve the largest batch, once per executor.

        Raises:
            RunError: it was halved before, or is one row already.
        """
        if self._halved or self._largest < 2:
            graphs = "" if self.graphs is None else ", turn engine.cuda_graphs off,"
            raise RunError(
                f"out of memory while sampling, also in batches of {self._largest}: lower engine.max_rows or "
                f"model.prompt_cache{graphs} and go on with --resume auto; in a new run lower the resolution or take "
                "model.tuning = lora"
            ) from error
        self._halved, self.max_rows, self._largest = True, self._largest // 2, 0
        self._forget_lanes()

    def initial_noise(self, noise_row: Tensor, iteration: int, stream: Stream) -> Tensor:
        """Starting latents [R, L, C] in the storage dtype for global rows ``noise_row``."""
        length, channels = self.model.latent_shape
        rows = noise_row.to(self.model.device)
        number = self._word(iteration)
        noise = philox_normal(self._seed, rows, length * channels, number, stream, self._zero, self.storage, self.impl)
        return noise.reshape(-1, length, channels)

    def velocity(self, x: Tensor, index: Tensor, conditioning: Conditioning, slot: Tensor, phase: str) -> Tensor:
        """The policy's velocity [R, L, C] at table rows ``index`` for conditioning rows ``slot``, in chunks, counted."""
        parts = []
        for part in self.chunks(x.shape[0]):
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
        key = ("prefix", tuple(conditioning.tensors), tuple((tuple(t.shape), t.dtype) for t in fresh))
        buffers = self._prefix.setdefault(key, [t.clone() for t in fresh])
        for buffer, t in zip(buffers, fresh, strict=True):
            buffer.copy_(t)

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
        iteration: int,
        phase: str,
        on_policy: bool = False,
        finished: Finished | None = None,
    ) -> Rollout:
        """Advance every row of ``plan`` from its entry latent to the last step, one chunk of ``max_rows`` after the other.

        Args:
            x: entry latents [R, L, C].
            conditioning: of the prompts that ``plan.conditioning`` counts.
            iteration: of the noise.
            phase: name under which work is counted and timed.
            on_policy: by the policy itself, whatever computes rollouts.
            finished: told the final latents [r, L, C] and the places int64 [r] of each chunk's rows when they are sampled.
        """
        forwards: tuple[Forward, ...] = (self.policy if on_policy else self.rollout,)
        if plan.stochastic and forwards[0].lossy:
            forwards += (self.policy,)  # a Gaussian that is to be reinforced has the policy's own mean
        with self.phase(phase):
            prepared = tuple(forward.prepare(conditioning) for forward in forwards)
        chunks = self._chunked(plan)
        parts = []
        for chunk in chunks:
            with self.phase(phase):
                lane = self._lane(plan, chunk, x, prepared, iteration, keep=not on_policy)
                parts.append(self._advance(plan, lane, forwards, phase))
            if finished is not None:
                finished(parts[-1].final, chunk.rows)
        if len(parts) == 1 and _in_order(plan):
            return parts[0]
        return _merged(parts, torch.cat([chunk.rows for chunk in chunks]), len(plan.record))

    def _advance(self, plan: Plan, lane: _Lane, forwards: tuple[Forward, ...], phase: str) -> Rollout:
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
            key = (id(lane), phase, live, noisy, recorded, which)
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
        self, plan: Plan, lane: _Lane, live: int, noisy: bool, recorded: bool, forward: Forward, prepared: Conditioning
    ) -> tuple[Tensor, Tensor, Tensor]:
        """One step of the first ``live`` rows, in place; a function of the lane's tensors alone, so that it can be captured."""
        chunk, x = lane.chunk, lane.x[:live]
        index = chunk.index[:live].gather(1, lane.step.reshape(1, 1).expand(live, 1)).squeeze(1)
        v = forward.velocity(x, index, prepared, chunk.conditioning[:live])
        noise = Draw(self._seed, chunk.noise_row[:live], lane.iteration, plan.noise_stream, lane.step) if noisy else None
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
    def fork(self, x: Tensor, v: Tensor, index: Tensor, slot: Tensor, noise_row: Tensor, iteration: int) -> Transitions:
        """Draw G successors of each of N latents that share one mean.

        Args:
            x, v: latents and velocities [N, L, C] at the fork steps.
            index: int64 [N], stochastic rows of the table.
            slot: int64 [N], conditioning rows.
            noise_row: int64 [N, G], global rows of the noise.
            iteration: of the noise.

        Returns:
            Transitions whose ``sample`` counts the branches in order (N, G); log-probabilities are computed exactly as
            the update computes them.
        """
        groups, size = noise_row.shape
        source = torch.arange(groups, device=x.device).repeat_interleave(size)
        forked = index.repeat_interleave(size)
        draw = Draw(self._seed, noise_row.flatten(), self._word(iteration), Stream.FORK, forked - self.num_steps)
        step = sde_step(x, v, self.table, forked, draw, source=source, with_mean=False, impl=self.impl)
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
    def recompute_logp(
        self, transitions: Transitions, conditioning: Conditioning, batches: Iterable[Tensor], phase: str = "recompute"
    ) -> Tensor:
        """Log-probabilities [N, G] under the current weights, in the geometry of the update's micro-batches."""
        logp = torch.empty_like(transitions.logp)
        for batch in batches:
            part = transitions.rows(batch)
            v = self.update_velocity(part, conditioning, phase)
            fresh = group_log_prob(part.latent, v, part.successors, self.table, part.index, self.impl)
            logp.index_copy_(0, batch, fresh)
        return logp

    def _word(self, value: int) -> Tensor:
        """A number of the noise's counter on the device, by a fill: no copy from the host, and a graph can change it."""
        return device_word(value, self.table.a)

    def _chunked(self, plan: Plan) -> list[_Chunk]:
        """The plan's rows in batches, in the order they enter; copied to the device once."""
        key = (id(plan), self.max_rows)
        if key not in self._chunks:
            order = torch.argsort(plan.start, stable=True)
            chunks = []
            for part in self.chunks(plan.num_rows):
                rows = order[part]
                tensors = (plan.index[rows], plan.conditioning[rows], plan.noise_row[rows])
                on_device = (t.to(self.model.device) for t in tensors)
                chunks.append(_Chunk(rows.to(self.model.device), entered(plan.start[rows], plan.num_steps), *on_device))
            self._chunks[key] = (plan, chunks)  # holding the plan keeps its id
            if len(self._chunks) > KEPT_PLANS:
                self._chunks.popitem(last=False)
        self._chunks.move_to_end(key)
        for chunk in (chunks := self._chunks[key][1]):
            self._largest = max(self._largest, chunk.rows.shape[0])
        return chunks

    def _lane(
        self, plan: Plan, chunk: _Chunk, x: Tensor, prepared: tuple[Conditioning, ...], iteration: int, keep: bool
    ) -> _Lane:
        """The chunk's tensors, filled; with graphs always the same ones."""
        shapes = tuple((name, tuple(t.shape)) for c in prepared for name, t in c.tensors.items())
        key = (id(chunk), tuple(x.shape[1:]), shapes)
        if self.graphs is None or not keep:
            return self._new_lane(plan, chunk, x, prepared, iteration, static=False)
        lane = self._lanes.get(key)
        if lane is None:
            if len(self._lanes) >= MAX_LANES:
                self._forget_lanes()
            own = tuple(Conditioning({name: t.clone() for name, t in c.tensors.items()}) for c in prepared)
            lane = self._lanes[key] = self._new_lane(plan, chunk, x, own, iteration, static=True)
            return lane
        lane.x.copy_(x.index_select(0, chunk.rows))
        if lane.clean is not None:
            lane.clean.zero_()  # a first step gives the past no weight, but 0 * NaN of a failed sample would stay
        lane.iteration.copy_(self._word(iteration))
        for mine, fresh in zip(lane.prepared, prepared, strict=True):
            for name, t in fresh.tensors.items():
                mine.tensors[name].copy_(t)
        return lane

    def _forget_lanes(self) -> None:
        self._lanes.clear()
        self._prefix.clear()
        if self.graphs is not None:
            self.graphs.forget()

    def _new_lane(
        self, plan: Plan, chunk: _Chunk, x: Tensor, prepared: tuple[Conditioning, ...], iteration: int, static: bool
    ) -> _Lane:
        x = x.index_select(0, chunk.rows)
        clean = torch.zeros_like(x, dtype=self.table.a.dtype) if plan.history else None
        return _Lane(chunk, x, clean, self._word(0), self._word(iteration), prepared, static)

    def _collect(self, plan: Plan, chunk: _Chunk, stored: Sequence[tuple[Tensor, ...]]) -> Transitions:
        """Transitions ordered (row, step) from per-step tensors; recorded plans start all rows at step 0."""
        latent, successor, mean, logp = (torch.stack(parts, 1).flatten(0, 1) for parts in zip(*stored, strict=True))
        steps = device_integers(plan.record, chunk.rows.device)
        return Transitions(
            latent=latent,
            successors=successor.unsqueeze(1),
            mean=mean,
            logp=logp.unsqueeze(1),
            index=chunk.index.index_select(1, steps).flatten(),
            slot=chunk.conditioning.repeat_interleave(len(steps)),
            sample=chunk.rows.repeat_interleave(len(steps)).unsqueeze(1),
        )


def _in_order(plan: Plan) -> bool:
    """Whether rows enter in the plan's order."""
    return bool((plan.start[1:] >= plan.start[:-1]).all())


def _merged(parts: list[Rollout], rows: Tensor, recorded: int) -> Rollout:
    """Chunks of a rollout put together in the plan's order; ``rows`` int64 [R] are the places of their rows."""
    undo = torch.argsort(rows)
    order = lambda tensors: torch.cat(list(tensors)).index_select(0, undo)  # noqa: E731
    by_step = lambda kept: {k: order(getattr(part, kept)[k] for part in parts) for k in getattr(parts[0], kept)}  # noqa: E731
    transitions = None
    if parts[0].transitions is not None:
        steps = torch.arange(recorded, device=rows.device)
        moved = (undo.unsqueeze(1) * recorded + steps).flatten()
        transitions = Transitions(
            **{
                f.name: torch.cat([getattr(part.transitions, f.name) for part in parts]).index_select(0, moved)
                for f in dataclasses.fields(Transitions)
            }
        )
    return Rollout(order(part.final for part in parts), by_step("latents"), by_step("velocities"), transitions)
