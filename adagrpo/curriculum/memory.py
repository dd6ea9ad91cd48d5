"""``memory``: by a posterior of what earlier rewards said of each prompt, without sampling."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from .base import Candidates, Choice, Knowledge, Leg, whole_leg
from .evidence import Evidence
from .picks import Nearest
from .prober import Field, Prober


@dataclasses.dataclass(frozen=True)
class Memory:
    """By the posterior alone, or after a look at one image of each of the few candidates it likes best.

    Attributes:
        candidates: B. steps: T. forks: fork steps of the plan.
        finalists: candidates per slot that are looked at before the posterior decides anew; 1 looks at none.
        half_life, noise_share, group_evidence: of the evidence.
        nearest: who competes.
    """

    candidates: int
    steps: int
    forks: tuple[int, ...]
    finalists: int
    half_life: float
    noise_share: float
    group_evidence: float
    nearest: Nearest

    def legs(self, slots: int) -> list[Leg]:
        """The finalists, where anything needs their images or what is behind them, and the uniform candidates."""
        looks = self.finalists > 1
        leg = whole_leg(slots, self.finalists if looks or self.forks else 0, self.steps)
        return [dataclasses.replace(leg, scored=(slots * self.finalists, *leg.scored)) if looks else leg]

    def evidence(self, rewards: int, slots: int, prompts: int, device: torch.device) -> Evidence:
        """A posterior of every prompt."""
        known = (self.half_life, self.noise_share, self.group_evidence)
        return Evidence.empty(rewards, slots, self.candidates, device, 0, prompts, *known)

    def __call__(self, prober: Prober, candidates: Candidates, knowledge: Knowledge) -> Choice:
        """One draw."""
        assert knowledge.evidence is not None and candidates.numbers is not None
        draw, share = candidates.draw, candidates.share
        uniform = prober.uniform(share.total, self.candidates, draw, step=1)
        (whole,) = self.legs(candidates.slots)
        with prober.executor.phase("select"):
            judged, distance = knowledge.evidence.judged(candidates.numbers, knowledge.level, prober.weights, draw)
            # While nothing tells candidates apart, one is drawn; later ties go to the first, of a stream that is shuffled.
            lucky = prober.uniform(share.total, self.candidates, draw, step=2)
            nearer = torch.full_like(distance[:, 0], -1e-9)
            distance = distance.flatten().index_add(0, lucky, nearer).unflatten(0, (share.total, -1))
            picks = self.nearest(distance, self.finalists)
        rows = share.own(uniform)
        rows = torch.cat([share.own(picks).clamp_min(0), rows]) if self.forks or self.finalists > 1 else rows
        field = prober.sampled_whole(rows, whole, candidates)
        if self.finalists > 1:
            field, picks, knowledge = self._looked_at(field, picks, uniform, prober, candidates, knowledge)
        return prober.choice(field, picks, judged, uniform, candidates, knowledge)

    def _looked_at(
        self, field: Field, finalists: Tensor, uniform: Tensor, prober: Prober, candidates: Candidates, knowledge: Knowledge
    ) -> tuple[Field, Tensor, Knowledge]:
        """The field of picks and uniform candidates, the picks and what is known after a look at ``finalists`` [P*K]."""
        slots, draw, evidence, numbers = candidates.slots, candidates.draw, knowledge.evidence, candidates.numbers
        assert evidence is not None and numbers is not None
        share, looked, rest = candidates.share, field.only(slice(0, -slots)), field.only(slice(-slots, None))
        scores = share.gather(prober.score(looked.x, candidates.shown(looked.rows)), 1)
        with prober.executor.phase("select"):
            shown = numbers.flatten()[finalists]
            seen = evidence.with_images(shown, scores, draw)
            level = knowledge.level.or_else(prober.folded(knowledge.level, scores.unflatten(1, (share.total, -1))).state)
            _, distance = seen.judged(shown.unflatten(0, (share.total, -1)), level, prober.weights, draw)
            best = self.nearest(distance, 1)
            field = looked.taken(share.own(best), candidates).beside(rest)
            again = (finalists.unsqueeze(1) == uniform).any(1)  # the very images that are scored, and remembered, at the end
            evidence = evidence.with_images(shown, scores.masked_fill(again, torch.nan), draw)
        return field, finalists[best], dataclasses.replace(knowledge, evidence=evidence)
