"""What every way to judge candidates has in common: candidates and knowledge in, one ``Choice`` out.

Shape letters: P slots of all ranks, B candidates per slot, M rewards; one latent is [L, C]. Rows of candidates count over all
ranks; what is sampled, with its embeddings, is this rank's.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..algorithm.selection import CapabilityState
from ..engine.plans import Plan, probe_plan
from ..engine.rollout import Rollout
from ..engine.share import Share
from ..models.base import Conditioning
from ..rewards import PromptRows
from .evidence import Evidence


@dataclasses.dataclass(frozen=True)
class Leg:
    """Rows that take the same steps of the deterministic sampler together; judges run these, and estimates count them.

    Attributes:
        rows: how many.
        steps: table rows they take (``RolloutTable``).
        scored: rows of each batch that is decoded and scored at its end.
    """

    rows: int
    steps: tuple[int, ...]
    scored: tuple[int, ...]

    def plan(self, keep: Sequence[int] = ()) -> Plan:
        """The rollout plan of these rows; ``keep`` counts within ``steps``."""
        return probe_plan(range(self.rows), self.steps, keep)


def whole_leg(slots: int, picked: int, steps: int) -> Leg:
    """``picked`` candidates of each slot and the uniformly drawn one to the end, where the latter are scored."""
    return Leg(slots * (picked + 1), tuple(range(steps)), (slots,))


@dataclasses.dataclass(frozen=True)
class Candidates:
    """The candidates of one draw.

    Attributes:
        prompts: of the P*B candidates of all ranks.
        conditioning: of those of this rank's slots.
        share: which slots these are.
        draw: number of the draw, of the noise.
        numbers: int64 [P, B], the prompts' numbers in the data, where evidence is kept.
        pooled: a slot may take a candidate of another one.
        unseen: one of them was never a candidate before.
    """

    prompts: Sequence[str]
    conditioning: Conditioning
    share: Share
    draw: int
    numbers: Tensor | None = None
    pooled: bool = False
    unseen: bool = False

    @property
    def slots(self) -> int:
        """This rank's slots, which it probes."""
        return self.share.each

    @property
    def per_slot(self) -> int:
        """B."""
        return len(self.prompts) // self.share.total

    def everyone(self, device: torch.device) -> Tensor:
        """Rows of this rank's candidates, int64."""
        return self.share.rows(self.per_slot, device)

    def text(self, rows: Tensor) -> Conditioning:
        """Embeddings of the candidates ``rows`` int64 [R], which this rank samples."""
        parts = self.conditioning.tensors.items()
        return Conditioning({name: self.share.taken(part, rows, self.pooled) for name, part in parts})

    def shown(self, rows: Tensor) -> PromptRows:
        """Prompts of the candidates ``rows`` int64 [R], which this rank samples."""
        if self.pooled or self.share.ranks.size == 1:
            return PromptRows(self.prompts, rows)
        return PromptRows(self.share.part(self.prompts), self.share.local(rows, self.per_slot))


@dataclasses.dataclass(frozen=True)
class Knowledge:
    """What earlier draws taught; immutable, so that a draw that ran out of memory is repeated from the same.

    Attributes:
        level: the capability EMA, over full-length scores that no filter chose.
        evidence: what a judge remembers beside it; None for ``full``.
        status: of the last fold (``capability_step``).
    """

    level: CapabilityState
    evidence: Evidence | None
    status: Tensor

    def with_groups(self, candidates: Candidates, choice: Choice, rewards: Tensor) -> Knowledge:
        """With the group rewards [M, groups, G] of the picked prompts."""
        if self.evidence is None or candidates.numbers is None:
            return self
        picked = candidates.numbers.flatten()[choice.rows]
        return dataclasses.replace(self, evidence=self.evidence.with_groups(picked, rewards, candidates.draw))


@dataclasses.dataclass(frozen=True)
class Choice:
    """What a judge found.

    Attributes:
        picks: int64 [P], rows among the candidates P*B of all ranks; -1 where none has a judging score.
        anchors: rollout of this rank with what forks need; None where nothing was sampled.
        anchor_row: int64, the row in ``anchors`` of the pick of each of this rank's slots.
        scores: [M, P, B], the last scores that candidates of all ranks were judged by; None where nothing reads them.
        knowledge: with this draw's scores.
    """

    picks: Tensor
    anchors: Rollout | None
    anchor_row: Tensor
    scores: Tensor | None
    knowledge: Knowledge

    @property
    def rows(self) -> Tensor:
        """int64 [P], the picks as rows; of slots without a pick the first."""
        return self.picks.clamp_min(0)


def selection_metrics(scores: Tensor | None, picks: Tensor, knowledge: Knowledge) -> dict[str, Any]:
    """The EMA, and how far from it the picked prompts were judged to be; first reward."""
    level, evidence = knowledge.level, knowledge.evidence
    if scores is None and (evidence is None or not len(evidence.recent)):
        return {}
    mean, std = level.mean[..., 0], level.std[..., 0]  # where each slot has its own: their means
    metrics = {"selection/ema_mean": mean.mean(), "selection/ema_std": std.mean()}
    if evidence is not None:
        return metrics | {"selection/probe_mean": evidence.recent[-1, 0].nanmean(), "selection/status": knowledge.status}
    assert scores is not None
    picked = torch.where(picks >= 0, scores[0].flatten()[picks.clamp_min(0)], torch.nan)
    return metrics | {
        "selection/probe_mean": scores[0].nanmean(),
        "selection/status": knowledge.status,
        "selection/distance": (picked - mean).abs().nanmean(),
    }
