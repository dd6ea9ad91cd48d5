"""The one call behind which all ways to judge candidates are equal."""

from __future__ import annotations

import dataclasses
from typing import Protocol

import torch

from ..algorithm.selection import CapabilityState
from .base import Candidates, Choice, Knowledge, Leg
from .evidence import Evidence
from .prober import Prober


class Judge(Protocol):
    """One way to judge; its fields are named as the recipe's keys, and ``build`` fills them (``recipe.keys.JUDGES``)."""

    def legs(self, slots: int) -> list[Leg]:
        """What it samples in one draw, in this order."""
        ...

    def evidence(self, rewards: int, slots: int, prompts: int, device: torch.device) -> Evidence | None:
        """What it remembers before the first draw of ``prompts`` prompts; None keeps nothing."""
        ...

    def __call__(self, prober: Prober, candidates: Candidates, knowledge: Knowledge) -> Choice:
        """One draw."""
        ...


@dataclasses.dataclass(frozen=True)
class Curriculum:
    """A judge with what it samples and scores by: ``(candidates, knowledge) -> Choice``.

    Attributes:
        unseen: who judges while prompts are candidates for the first time; the same where that makes no difference.
        per_slot: every slot has a level of its own, instead of one for all.
    """

    judge: Judge
    unseen: Judge
    prober: Prober
    per_slot: bool = False

    def __call__(self, candidates: Candidates, knowledge: Knowledge) -> Choice:
        """One draw: probe and select."""
        judge = self.unseen if candidates.unseen else self.judge
        return judge(self.prober, candidates, knowledge)

    def beginning(self, slots: int, prompts: int) -> Knowledge:
        """Before the first draw, of ``prompts`` training prompts."""
        rewards, device = len(self.prober.weights), self.prober.weights.device
        evidence = self.judge.evidence(rewards, slots, prompts, device)
        level = CapabilityState.for_rewards(rewards, device, slots * self.per_slot)
        return Knowledge(level, evidence, torch.zeros((), dtype=torch.int64, device=device))
