"""The policy update: replay the stored transitions under the current weights and step the optimizer."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from ..algorithm.losses import (
    clipped_surrogate,
    guarded,
    log_prob_divergence,
    mean_space_kl,
    step_weights,
    velocity_distance,
)
from ..algorithm.sde import affine_mean, group_log_prob
from ..models.base import Conditioning, FlowModel
from .executor import RolloutExecutor
from .optimizer import PolicyOptimizer
from .ranks import Ranks
from .rollout import Transitions
from .sampling import Samples

SUMS = ("loss", "kl", "ratio", "high", "low", "valid", "deviation", "norm")
"""What each rank adds to the metrics of an update."""


@dataclasses.dataclass(frozen=True)
class Objective:
    """The policy-gradient objective, ``loss = mean_N(weight_k * (surrogate + kl_weight * KL))``; weights ``noise``, and the
    lengths of steps that ``guard`` divides by, are of the surrogate alone.

    Attributes:
        old_logp: the ratio's denominator: ``rollout`` (stored while sampling), ``recompute`` or ``detached``.
        ratio: ``plain``, or ``guard`` (``guarded``), whose surrogate is divided by the step's |dt|; ``guard_batch`` pools its
            bias over the micro-batch.
        clip_range: half width of the trust region; None is no clipping.
        kl_weight, kl_space, kl_variance: of the divergence: from the initial model in the space of means (``mean_space_kl``) or
            of velocities (``velocity_distance``), or from the sampling policy, ``logp`` (``log_prob_divergence``).
        step_weighting: of the transitions (``step_weights``).
        average: ``update`` over the transitions of each optimizer step, ``iteration`` over those of all of them.
        skip_empty: average over the transitions with a valid sample only, instead of over all.
    """

    old_logp: str = "rollout"
    ratio: str = "plain"
    clip_range: float | None = None
    kl_weight: float = 0.0
    kl_space: str = "mean"
    kl_variance: str = "step"
    step_weighting: str = "uniform"
    average: str = "update"
    skip_empty: bool = False

    @property
    def replays(self) -> tuple[str, ...]:
        """Phases that run every transition through the transformer."""
        recompute, reference = self.old_logp == "recompute", self.kl_weight > 0 and self.kl_space != "logp"
        return (*["recompute"] * recompute, "update", *["reference"] * reference)


def update_policy(
    executor: RolloutExecutor,
    optimizer: PolicyOptimizer,
    samples: Samples,
    advantage: Tensor,
    valid: Tensor,
    conditioning: Conditioning,
    objective: Objective,
) -> dict[str, Tensor]:
    """One pass over the transitions: one optimizer step per entry of ``samples.batches``.

    Whatever the micro-batches and ranks, the loss is summed over the transitions of an optimizer step and divided by their
    number, or by that of the iteration.

    Args:
        advantage, valid: [R], per final latent.

    Returns:
        0-dim tensors ``loss, ratio_deviation`` (max |ratio - 1| of the first optimizer step), ``ratio_mean, clip_share`` (of
        samples whose gradient the clip takes away; ``_high`` with a ratio above 1, ``_low`` below), ``kl, grad_norm``; over all
        ranks.
    """
    o, transitions, batches, ranks = objective, samples.transitions, samples.batches, optimizer.ranks
    # Slots of a second draw have log-probabilities of another batch geometry.
    old_logp = "recompute" if samples.merged and o.old_logp == "rollout" else o.old_logp
    if old_logp == "recompute":
        transitions = executor.recompute(transitions, conditioning, [b for step in batches for b in step])
    weight, of_kl = _weights(executor, transitions.index, o, ranks)
    tally = _Tally(advantage.device)
    of_steps = [torch.cat(step) for step in batches]
    averages = [torch.cat(of_steps)] if o.average == "iteration" else of_steps
    shares = _shares(valid, transitions, averages, o.skip_empty, ranks)
    for number, step in enumerate(batches):
        share = shares[number % len(shares)]
        for batch in step:
            part = transitions.rows(batch)
            v = executor.update_velocity(part, conditioning, "update")
            logp = group_log_prob(part.latent, v, part.successors, executor.table, part.index, executor.impl)
            part = part.with_logp(logp.detach()) if old_logp == "detached" else part
            mask, of_rows = valid[part.sample], advantage[part.sample].to(logp.dtype)
            pair = (logp, part.logp) if o.ratio == "plain" else _guarded(executor, part, v, logp, old_logp, o.ratio)
            surrogate = clipped_surrogate(*pair, of_rows, o.clip_range, mask)
            loss = surrogate.loss * weight[batch].to(logp.dtype)
            kl = _kl(executor, part, v, logp, mask, conditioning, o) if o.kl_weight else torch.zeros_like(loss)
            loss = (loss + o.kl_weight * kl * of_kl[batch].to(kl.dtype)).sum() * share
            loss.backward()
            optimizer.collect()
            tally.add(loss, kl, surrogate.ratio, surrogate.clipped, mask, first=number == 0)
        tally.grad_norm(optimizer.step())
    return tally.read(sum(map(len, of_steps)), len(averages), ranks)


def _shares(
    valid: Tensor, transitions: Transitions, averages: Sequence[Tensor], skip_empty: bool, ranks: Ranks
) -> list[float] | list[Tensor]:
    """Weight of one transition in each of the averages, which are over these rows and as many of every other rank."""
    if not skip_empty:
        return [1 / (rows.numel() * ranks.size) for rows in averages]
    counts = ranks.sum(torch.stack([valid[transitions.sample[rows]].any(1).sum() for rows in averages]))
    return [1 / count.clamp_min(1) for count in counts]


def _weights(executor: RolloutExecutor, index: Tensor, objective: Objective, ranks: Ranks) -> tuple[Tensor, Tensor]:
    """Weights of the surrogate of each transition and of its divergence; before they are divided by lengths they are 1 on
    average over the transitions of all ranks, whose slots may have drawn other steps."""
    weight = step_weights(executor.table, index, objective.step_weighting, ranks.mean)
    of_kl = torch.ones_like(weight) if objective.step_weighting == "noise" else weight
    if objective.ratio != "plain":
        rows = executor.table.rows(index)
        weight = weight / (rows.sigma - rows.sigma_next)
    return weight, of_kl


def _guarded(
    executor: RolloutExecutor, part: Transitions, v: Tensor, logp: Tensor, old_logp: str, ratio: str
) -> tuple[Tensor, Tensor]:
    mean = affine_mean(part.latent, v, executor.table, part.index)
    old_mean = mean if old_logp == "detached" else part.mean
    return guarded(logp, part.logp, mean, old_mean, executor.table, part.index, ratio == "guard_batch")


def _kl(
    executor: RolloutExecutor,
    part: Transitions,
    v: Tensor,
    logp: Tensor,
    mask: Tensor,
    conditioning: Conditioning,
    objective: Objective,
) -> Tensor:
    if objective.kl_space == "logp":
        return log_prob_divergence(logp, part.logp, mask)
    model: FlowModel = executor.model
    with torch.no_grad(), model.reference():
        reference_v = executor.update_velocity(part, conditioning, "reference")
    if objective.kl_space == "velocity":
        return velocity_distance(v, reference_v, logp.dtype)
    mean, reference_mean = (affine_mean(part.latent, t, executor.table, part.index) for t in (v, reference_v))
    return mean_space_kl(mean, reference_mean, executor.table, part.index, objective.kl_variance)


class _Tally:
    """Sums on the device; nothing is read until the metrics are."""

    def __init__(self, device: torch.device) -> None:
        self.sums = {name: torch.zeros((), dtype=torch.float64, device=device) for name in SUMS}

    def add(self, loss: Tensor, kl: Tensor, ratio: Tensor, clipped: Tensor, mask: Tensor, first: bool) -> None:
        ratio = ratio.detach()
        self.sums["loss"] += loss.detach()
        self.sums["kl"] += kl.detach().sum()
        self.sums["ratio"] += ratio.masked_fill(~mask, 0).sum()
        self.sums["high"] += (clipped & (ratio > 1)).sum()
        self.sums["low"] += (clipped & (ratio < 1)).sum()
        self.sums["valid"] += mask.sum()
        if first:
            deviation = (ratio - 1).abs().masked_fill(~mask, 0).amax().double()
            self.sums["deviation"] = torch.maximum(self.sums["deviation"], deviation)

    def grad_norm(self, norm: Tensor) -> None:
        self.sums["norm"] = torch.maximum(self.sums["norm"], norm.detach().double())

    def read(self, transitions: int, averages: int, ranks: Ranks) -> dict[str, Tensor]:
        """The metrics, over ``transitions`` of every rank; the loss was summed over as many ``averages``."""
        of_ranks = ranks.gather(torch.stack([*self.sums.values()]).unsqueeze(0), 0)
        largest = ("deviation", "norm")
        s = {name: t.amax() if name in largest else t.sum() for name, t in zip(self.sums, of_ranks.unbind(1), strict=True)}
        valid = s["valid"].clamp_min(1)
        return {
            "loss": s["loss"] / averages,
            "ratio_deviation": s["deviation"],
            "ratio_mean": s["ratio"] / valid,
            "clip_share": (s["high"] + s["low"]) / valid,
            "clip_share_high": s["high"] / valid,
            "clip_share_low": s["low"] / valid,
            "kl": s["kl"] / (transitions * ranks.size),
            "grad_norm": s["norm"],
        }
