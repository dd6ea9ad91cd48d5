"""``racing``: successive halving over previews of the image, on the trajectories that go on."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from ..algorithm.selection import CapabilityState, closest_distance
from ..rewards import PromptRows
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
        slots, draw = candidates.slots, candidates.draw
        uniform = prober.uniform(slots, self.candidates, draw, step=1)
        *previewed, rest = self.legs(slots)
        everyone = torch.arange(previewed[0].rows, device=uniform.device)
        field, at_uniform = prober.start(everyone, len(everyone), draw), uniform
        judged = torch.empty(len(prober.weights), len(everyone), dtype=torch.float64, device=uniform.device)
        for number, (heat, leg) in enumerate(zip(heats(self.candidates, self.race_steps), previewed, strict=True)):
            text = candidates.conditioning if number == 0 else candidates.conditioning.rows(field.rows)
            field = prober.sampled(field, leg, text, draw, preview=True)
            assert field.preview is not None
            scores = prober.score(field.preview, PromptRows(candidates.prompts, field.rows))
            with prober.executor.phase("select"):
                racing = slots * heat.per_slot
                judged = judged.index_copy(1, field.rows[:racing], scores[:, :racing])
                knowledge = self._taught(number, scores, scores[:, racing:], prober, knowledge, draw)
                distance = closest_distance(scores[:, :racing], _level(knowledge, number), prober.weights)
                distance = distance.unflatten(0, (slots, -1))
                left = self.nearest(distance, heat.left)
                picks = torch.where(distance.flatten()[left].isfinite(), field.rows[left], -1)
                over = heat.last == self.race_steps[-1] and not self.forks  # nobody needs the pick's own trajectory
                field = field.only(at_uniform if over else torch.cat([left, at_uniform]))
                at_uniform = torch.arange(-slots, 0, device=uniform.device) + len(field.rows)
        field = prober.sampled(field, rest, candidates.conditioning.rows(field.rows), draw)
        return prober.choice(field, picks, judged.unflatten(1, (slots, -1)), candidates, knowledge)

    def _taught(
        self, number: int, scores: Tensor, uniform: Tensor, prober: Prober, knowledge: Knowledge, draw: int
    ) -> Knowledge:
        """With the scores [M, R] of preview ``number``, those of uniform candidates [M, P] among them, in its level."""
        evidence = knowledge.evidence
        assert evidence is not None
        if number:
            evidence = evidence.with_recent(number - 1, uniform, draw)
            scores = evidence.recent[number - 1]
        fold = prober.folded(evidence.levels[number], scores.unsqueeze(1))
        return dataclasses.replace(knowledge, evidence=evidence.with_level(number, fold.state))


def _level(knowledge: Knowledge, number: int) -> CapabilityState:
    """What preview ``number`` is judged against."""
    assert knowledge.evidence is not None
    return knowledge.evidence.levels[number]
