"""``racing``: successive halving over previews of the image, on the trajectories that go on."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from ..algorithm.selection import CapabilityState, closest_distance
from .base import Candidates, Choice, Knowledge, Leg
from .evidence import Evidence
from .picks import Nearest
from .prober import Prober


@dataclasses.dataclass(frozen=True)
class Heat:
    """A part of a race: ``per_slot`` candidates of each slot take steps ``first`` to ``last - 1``; ``left`` of them go on.

    After the first part the uniformly drawn candidate runs beside them.
    """

    per_slot: int
    first: int
    last: int
    left: int

    def leg(self, slots: int) -> Leg:
        """Its rows, all of which are scored."""
        rows = slots * (self.per_slot + (self.first > 0))
        return Leg(rows, tuple(range(self.first, self.last)), (rows,))


def heats(candidates: int, race_steps: Sequence[int]) -> list[Heat]:
    """The halving of a field at each preview; whoever is left after the last one goes on to the image."""
    bounds, field, found = (0, *race_steps), candidates, []
    for first, last in itertools.pairwise(bounds):
        left = 1 if last == bounds[-1] else -(-field // 2)
        found.append(Heat(field, first, last, left))
        field = left
    return found


@dataclasses.dataclass(frozen=True)
class Racing:
    """Who is nearest by a preview goes on, on the same trajectory.

    The first preview is judged against an EMA over all candidates, later ones, which only survivors reach, against one over
    the uniform candidates of the last B draws.

    Attributes:
        candidates: B. steps: T. forks: fork steps of the plan.
        race_steps: steps sampled before each preview.
        nearest: who competes.
    """

    candidates: int
    steps: int
    forks: tuple[int, ...]
    race_steps: tuple[int, ...]
    nearest: Nearest

    def legs(self, slots: int) -> list[Leg]:
        """One to each preview, then the winners (where forks need them) and the uniform candidates to the end."""
        rest = Leg(slots * (1 + bool(self.forks)), tuple(range(self.race_steps[-1], self.steps)), (slots,))
        return [*(heat.leg(slots) for heat in heats(self.candidates, self.race_steps)), rest]

    def evidence(self, rewards: int, slots: int, prompts: int, device: torch.device) -> Evidence:
        """A level for each preview."""
        return Evidence.empty(rewards, slots, self.candidates, device, stages=len(self.race_steps))

    def __call__(self, prober: Prober, candidates: Candidates, knowledge: Knowledge) -> Choice:
        """One draw."""
        slots, draw, share = candidates.slots, candidates.draw, candidates.share
        uniform = prober.uniform(share.total, self.candidates, draw, step=1)
        *previewed, rest = self.legs(slots)
        racers = torch.arange(len(candidates.prompts), device=uniform.device)
        field = prober.start(candidates.everyone(uniform.device), draw)
        at_uniform = share.local(share.own(uniform), self.candidates)
        judged = torch.empty(len(prober.weights), len(racers), dtype=torch.float64, device=uniform.device)
        for number, (heat, leg) in enumerate(zip(heats(self.candidates, self.race_steps), previewed, strict=True)):
            text = candidates.conditioning if number == 0 else candidates.text(field.rows)
            field = prober.sampled(field, leg, text, draw, preview=True)
            assert field.preview is not None
            scores, racing = prober.score(field.preview, candidates.shown(field.rows)), slots * heat.per_slot
            scores, beside = share.gather(scores[:, :racing], 1), share.gather(scores[:, racing:], 1) if number else None
            with prober.executor.phase("select"):
                judged = judged.index_copy(1, racers, scores)
                knowledge = self._taught(number, scores, beside, prober, knowledge, draw)
                distance = closest_distance(scores, _level(knowledge, number), prober.weights)
                distance = distance.unflatten(0, (share.total, -1))
                left = self.nearest(distance, heat.left)
                picks = torch.where(distance.flatten()[left].isfinite(), racers[left], -1)
                racers, over = racers[left], heat.last == self.race_steps[-1] and not self.forks
                drawn = field.only(at_uniform)  # over: nobody needs the pick's own trajectory
                field = drawn if over else field.only(slice(0, racing)).taken(share.own(left), candidates).beside(drawn)
                at_uniform = torch.arange(-slots, 0, device=uniform.device) + len(field.rows)
        field = prober.sampled(field, rest, candidates.text(field.rows), draw)
        return prober.choice(field, picks, judged.unflatten(1, (share.total, -1)), uniform, candidates, knowledge)

    def _taught(
        self, number: int, scores: Tensor, uniform: Tensor | None, prober: Prober, knowledge: Knowledge, draw: int
    ) -> Knowledge:
        """With the scores [M, R] of the first preview, or those of the uniform candidates [M, P] at a later one, in the level
        of preview ``number``."""
        evidence = knowledge.evidence
        assert evidence is not None
        if uniform is not None:
            evidence = evidence.with_recent(number - 1, uniform, draw)
            scores = evidence.recent[number - 1]
        fold = prober.folded(evidence.levels[number], scores.unsqueeze(1))
        return dataclasses.replace(knowledge, evidence=evidence.with_level(number, fold.state))


def _level(knowledge: Knowledge, number: int) -> CapabilityState:
    """What preview ``number`` is judged against."""
    assert knowledge.evidence is not None
    return knowledge.evidence.levels[number]
