"""The rollout executor: one loop advances the rows of any plan, counts what it evaluates and stores transitions."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Iterable, Mapping

import torch
from adagrpo_kernels import MAX_STEP
from adagrpo_kernels._dispatch import device_word
from torch import Tensor

from ..algorithm.sde import Draw, StepTable, Stream, affine_mean, group_log_prob, philox_normal, sde_step
from ..errors import RunError
from ..models.base import Conditioning, FlowModel
from ..run.timing import PhaseTimer
from .plans import Plan


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


class RolloutExecutor:
    """Advances rows through a step table.

    Args:
        model: the policy.
        table: 2T rows: deterministic, then stochastic, float64 or float32; moved to the model's device.
        seed: of the counter-based noise.
        storage: dtype in which latents are kept between steps.
        max_rows: largest batch of one transformer call; 0 is unlimited.
        phase: timer of the trainer's phases.
        impl: implementation of the operators (``adagrpo_kernels._dispatch``).
    """

    def __init__(
        self,
        model: FlowModel,
        table: StepTable,
        seed: int,
        storage: torch.dtype,
        max_rows: int = 0,
        phase: PhaseTimer | None = None,
        impl: str | None = None,
    ) -> None:
        self.model, self.seed, self.storage, self.max_rows = model, seed, storage, max_rows
        self.phase, self.impl = phase or PhaseTimer(model.device), impl
        self._largest, self._halved = 0, False
        self.num_steps = len(table) // 2
        if self.num_steps > MAX_STEP:
            raise ValueError(f"{self.num_steps} steps: the counter of the noise holds {MAX_STEP}")
        wide = torch.float64 if storage is torch.float64 else torch.float32
        self.table = table.to(model.device, wide)
        self._seed, self._steps = self._word(seed), torch.arange(self.num_steps, device=model.device)
        self.counts: dict[str, Count] = defaultdict(Count)

    def reset_counts(self) -> None:
        """Forget all counts."""
        self.counts.clear()

    def chunks(self, rows: int) -> list[slice]:
        """Slices of at most ``max_rows`` rows."""
        size = self.max_rows or max(rows, 1)
        self._largest = max(self._largest, min(size, rows))
        return [slice(first, min(first + size, rows)) for first in range(0, rows, size)]

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
            raise RunError(
                f"out of memory while sampling, also in batches of {self._largest}: set engine.max_rows lower, use a smaller "
                "resolution, or free device memory (model.prompt_cache, model.tuning = lora)"
            ) from error
        self._halved, self.max_rows, self._largest = True, self._largest // 2, 0

    def initial_noise(self, noise_row: Tensor, iteration: int, stream: Stream) -> Tensor:
        """Starting latents [R, L, C] in the storage dtype for global rows ``noise_row``."""
        length, channels = self.model.latent_shape
        rows = noise_row.to(self.model.device)
        number = self._word(iteration)
        noise = philox_normal(self._seed, rows, length * channels, number, stream, self._steps[0], self.storage, self.impl)
        return noise.reshape(-1, length, channels)

    def velocity(self, x: Tensor, index: Tensor, conditioning: Conditioning, slot: Tensor, phase: str) -> Tensor:
        """The model's velocity [R, L, C] at table rows ``index`` for conditioning rows ``slot``, in chunks, counted."""
        sigma = self.table.sigma.index_select(0, index)
        parts = []
        for part in self.chunks(x.shape[0]):
            parts.append(self.model.velocity(x[part], sigma[part], conditioning.rows(slot[part])))
            self.counts[phase].calls += 1
            self.counts[phase].evaluations += x[part].shape[0]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    @torch.no_grad()
    def run(self, plan: Plan, x: Tensor, conditioning: Conditioning, iteration: int, phase: str) -> Rollout:
        """Advance every row of ``plan`` from its entry latent ``x`` [R, L, C] to the last step."""
        device, num_steps = x.device, plan.num_steps
        order = torch.argsort(plan.start, stable=True)
        entered = torch.bincount(plan.start, minlength=num_steps + 1).cumsum(0).tolist()
        undo = torch.argsort(order).to(device)
        x = x.index_select(0, order.to(device))
        index = plan.index[order].to(device)
        slot, noise_row = plan.conditioning[order].to(device), plan.noise_row[order].to(device)
        latents, velocities, stored = {}, {}, {}
        number = self._word(iteration)
        for k in range(num_steps):
            live = entered[k]
            if live == 0:
                continue
            before = x[:live]
            v = self.velocity(before, index[:live, k], conditioning, slot[:live], phase)
            noise = None
            if plan.stochastic_at(k):
                noise = Draw(self._seed, noise_row[:live], number, plan.noise_stream, self._steps[k])
            recorded = k in plan.record
            step = sde_step(before, v, self.table, index[:live, k], noise, with_mean=recorded, impl=self.impl)
            if k in plan.keep:
                latents[k], velocities[k] = (t.index_select(0, undo) for t in (before, v))
            if recorded:
                stored[k] = (before, step.next, step.mean, step.logp)
            x = step.next if live == x.shape[0] else torch.cat([step.next, x[live:]])
        transitions = self._collect(plan, stored, device) if stored else None
        return Rollout(x.index_select(0, undo), latents, velocities, transitions)

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
            batch = batch.to(logp.device)
            part = transitions.rows(batch)
            v = self.update_velocity(part, conditioning, phase)
            fresh = group_log_prob(part.latent, v, part.successors, self.table, part.index, self.impl)
            logp.index_copy_(0, batch, fresh)
        return logp

    def _word(self, value: int) -> Tensor:
        """A number of the noise's counter on the device, by a fill: no copy from the host, and a graph can change it."""
        return device_word(value, self.table.a)

    def _collect(self, plan: Plan, stored: Mapping[int, tuple[Tensor, ...]], device: torch.device) -> Transitions:
        """Transitions ordered (row, step) from per-step tensors; recorded plans start all rows at step 0."""
        latent, successor, mean, logp = (torch.stack(parts, 1).flatten(0, 1) for parts in zip(*stored.values(), strict=True))
        steps = list(stored)
        rows = torch.arange(plan.num_rows, device=device).repeat_interleave(len(steps))
        return Transitions(
            latent=latent,
            successors=successor.unsqueeze(1),
            mean=mean,
            logp=logp.unsqueeze(1),
            index=plan.index[:, steps].flatten().to(device),
            slot=plan.conditioning.to(device)[rows],
            sample=rows.unsqueeze(1),
        )
