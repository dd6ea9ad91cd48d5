"""``full``: every candidate is sampled to the end and scored (AdaGRPO, section 3)."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from ..engine.rollout import Rollout
from .base import Candidates, Choice, Knowledge, Leg
from .picks import Pick, rows_of
from .prober import Prober


@dataclasses.dataclass(frozen=True)
class Full:
    """The paper's probe; forks start from the pick's own trajectory.

    Attributes:
        candidates: B; with one there is nothing to pick.
        steps: T.
        forks: fork steps of the plan.
        scored: whether anything reads the scores.
        strategy: of the fold's picks.
        pick: from scores to rows.
    """

    candidates: int
    steps: int
    forks: tuple[int, ...]
    scored: bool
    strategy: str
    pick: Pick

    def legs(self, slots: int) -> list[Leg]:
        """All candidates, unless neither forks nor scores need them."""
        rows = slots * self.candidates
        return [Leg(rows, tuple(range(self.steps)), (rows,) * self.scored)] if self.scored or self.forks else []

    def evidence(self, rewards: int, slots: int, prompts: int, device: torch.device) -> None:
        """None: all it knows is the level."""

    def __call__(self, prober: Prober, candidates: Candidates, knowledge: Knowledge) -> Choice:
        """Fold the scores into the level, then pick."""
        anchors, scores = self._probe(prober, candidates)
        with prober.executor.phase("select"):
            picks, knowledge = self._select(prober, scores, candidates, knowledge)
        return Choice(picks, *self._anchors(anchors, picks, candidates), scores, knowledge)

    def _probe(self, prober: Prober, candidates: Candidates) -> tuple[Rollout | None, Tensor | None]:
        """The trajectories that forks start from, and scores [M, P, B] of all ranks; either is None where nothing would read
        it."""
        legs = self.legs(candidates.slots)
        if not legs:
            return None, None
        field = prober.start(candidates.everyone(prober.weights.device), candidates.draw)
        scores = prober.score.overlapped(candidates.shown(field.rows)) if self.scored else None
        plan, text = legs[0].plan(keep=self.forks), candidates.conditioning
        anchors = prober.executor.run(plan, field.x, text, candidates.draw, "probe", finished=scores)
        if scores is None:
            return anchors, None
        return anchors, candidates.share.gather(scores.result().unflatten(1, (candidates.slots, -1)), 1)

    @staticmethod
    def _anchors(anchors: Rollout | None, picks: Tensor, candidates: Candidates) -> tuple[Rollout | None, Tensor]:
        """The trajectories of this rank, and the row of each of its slots' picks in them; of a pool's, which other ranks may
        have sampled, just these."""
        share = candidates.share
        own = share.own(picks).clamp_min(0)
        if anchors is None or not candidates.pooled or share.ranks.size == 1:
            return anchors, share.local(own, candidates.per_slot)
        taken = lambda kept: {k: share.taken(t, own, anywhere=True) for k, t in kept.items()}  # noqa: E731
        picked = Rollout(share.taken(anchors.final, own, True), taken(anchors.latents), taken(anchors.velocities), None)
        return picked, torch.arange(candidates.slots, device=own.device)

    def _select(
        self, prober: Prober, scores: Tensor | None, candidates: Candidates, knowledge: Knowledge
    ) -> tuple[Tensor, Knowledge]:
        word = prober.word(candidates.share.total, candidates.draw)
        if scores is not None:
            fold = prober.folded(knowledge.level, scores, self.strategy, word)
            knowledge = dataclasses.replace(knowledge, level=fold.state, status=fold.status)
        if self.candidates == 1:
            return word.rows, knowledge
        if scores is None:
            return rows_of(prober.drawn(word, self.candidates), self.candidates), knowledge
        return self.pick(scores, fold, prober.weights), knowledge
