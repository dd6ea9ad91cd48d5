"""``short``: every candidate by a short ODE of its own, against a level of such scores."""

from __future__ import annotations

import dataclasses

import torch

from .base import Candidates, Choice, Knowledge, Leg, whole_leg
from .evidence import Evidence
from .picks import Pick
from .prober import Prober


@dataclasses.dataclass(frozen=True)
class Short:
    """Judges by ``probe_rows``, table rows of a grid of its own; picks and uniform candidates are then sampled whole.

    Attributes:
        candidates: B. steps: T. forks: fork steps of the plan.
        probe_rows: table rows of the short ODE.
        strategy, pick: as of ``Full``.
    """

    candidates: int
    steps: int
    forks: tuple[int, ...]
    probe_rows: tuple[int, ...]
    strategy: str
    pick: Pick

    def legs(self, slots: int) -> list[Leg]:
        """All candidates shortly, then the picks (where forks need them) and the uniform ones."""
        rows = slots * self.candidates
        return [Leg(rows, self.probe_rows, (rows,)), whole_leg(slots, int(bool(self.forks)), self.steps)]

    def evidence(self, rewards: int, slots: int, prompts: int, device: torch.device) -> Evidence:
        """A level of short scores."""
        return Evidence.empty(rewards, slots, self.candidates, device, stages=1)

    def __call__(self, prober: Prober, candidates: Candidates, knowledge: Knowledge) -> Choice:
        """One draw."""
        assert knowledge.evidence is not None
        slots, draw, share = candidates.slots, candidates.draw, candidates.share
        uniform = prober.uniform(share.total, self.candidates, draw, step=1)
        short, whole = self.legs(slots)
        field = prober.start(candidates.everyone(uniform.device), draw)
        scores = prober.score.overlapped(candidates.shown(field.rows))
        prober.executor.run(short.plan(), field.x, candidates.conditioning, draw, "probe", finished=scores)
        judged = share.gather(scores.result().unflatten(1, (slots, -1)), 1)
        with prober.executor.phase("select"):
            fold = prober.folded(knowledge.evidence.levels[0], judged, self.strategy)
            knowledge = dataclasses.replace(knowledge, evidence=knowledge.evidence.with_level(0, fold.state))
            picks = self.pick(judged, fold, prober.weights)
        rows = share.own(uniform)
        rows = torch.cat([share.own(picks).clamp_min(0), rows]) if self.forks else rows
        return prober.choice(prober.sampled_whole(rows, whole, candidates), picks, judged, uniform, candidates, knowledge)
