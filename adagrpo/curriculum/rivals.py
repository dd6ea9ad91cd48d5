"""``bots``, ``greso``, ``procurl``, ``dps``: published ways to choose prompts by the outcomes of their earlier groups.

They judge without sampling, from what was paid for. Theirs choose a batch of many prompts; here each slot has its own B
candidates of the shuffled stream, and one of them is picked: every prompt comes by equally often, and what differs is who is
taken. Among candidates that nothing is known of they choose blindly.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from ..algorithm.rivals import BetaRecord, ChainRecord, Record, SkipRecord, drawn_by, first_kept
from ..algorithm.selection import nearest
from ..engine.rollout import Rollout
from .base import Candidates, Choice, Knowledge, Leg, whole_leg
from .evidence import Evidence
from .picks import rows_of
from .prober import Prober


@dataclasses.dataclass(frozen=True)
class Rival:
    """What they have in common: their picks are sampled only where groups fork from them.

    Attributes:
        candidates: B. steps: T. forks: fork steps of the plan.
        level_read: whether anything reads the capability EMA; then it is fed by a uniformly drawn candidate, as with memory.
        success_range: rewards of an image that failed and of one that succeeded.
    """

    candidates: int
    steps: int
    forks: tuple[int, ...]
    level_read: bool
    success_range: tuple[float, float]

    def record(self, prompts: int, slots: int, device: torch.device) -> Record:
        """What it knows before the first draw."""
        raise NotImplementedError

    def chosen(self, record: Record, numbers: Tensor, uniform: Tensor) -> Tensor:
        """The candidate of each slot, int64 [P], of the prompts ``numbers`` [P, B], by luck ``uniform`` [P, B] in [0, 1)."""
        raise NotImplementedError

    def legs(self, slots: int) -> list[Leg]:
        """The picks, where groups fork from them, and the uniform candidates, where their scores are read."""
        picked = int(bool(self.forks))
        if self.level_read:
            return [whole_leg(slots, picked, self.steps)]
        return [Leg(slots, tuple(range(self.steps)), ())] * picked

    def evidence(self, rewards: int, slots: int, prompts: int, device: torch.device) -> Evidence:
        """Its record of every prompt."""
        found = Evidence.empty(rewards, slots, self.candidates, device)
        recent = found.recent if self.level_read else found.recent[:0]
        record = self.record(prompts, slots, device)
        return dataclasses.replace(found, recent=recent, record=record, success_range=self.success_range)

    def __call__(self, prober: Prober, candidates: Candidates, knowledge: Knowledge) -> Choice:
        """One draw."""
        evidence, numbers, draw, share = knowledge.evidence, candidates.numbers, candidates.draw, candidates.share
        assert evidence is not None and evidence.record is not None and numbers is not None
        with prober.executor.phase("select"):
            luck = prober.each(share.total, self.candidates, draw, step=3)
            picks = rows_of(self.chosen(evidence.record, numbers, luck), self.candidates)
        uniform = prober.uniform(share.total, self.candidates, draw, step=1)
        rows = [share.own(picks)] * bool(self.forks) + [share.own(uniform)] * self.level_read
        anchors, anchor_row = None, torch.arange(candidates.slots, device=picks.device)
        if rows:
            (leg,) = self.legs(candidates.slots)
            field = prober.sampled_whole(torch.cat(rows), leg, candidates)
            if self.level_read:
                return prober.choice(field, picks, None, uniform, candidates, knowledge)
            anchors = Rollout(field.x, field.latents, {}, None)  # forks take fresh velocities
        return Choice(picks, anchors, anchor_row, None, knowledge)


@dataclasses.dataclass(frozen=True)
class Bots(Rival):
    """BOTS: the success of every candidate is drawn from its posterior (Thompson), and the one nearest to a target is picked.

    Attributes:
        half_life: draws after which evidence counts half. target_success: what success should be.
    """

    half_life: float
    target_success: float

    def record(self, prompts: int, slots: int, device: torch.device) -> BetaRecord:
        """A uniform distribution each."""
        return BetaRecord.empty(prompts, self.half_life, device)

    def chosen(self, record: Record, numbers: Tensor, uniform: Tensor) -> Tensor:
        """Nearest draw."""
        assert isinstance(record, BetaRecord)
        return nearest((record.sample(numbers, uniform) - self.target_success).abs(), 1).squeeze(1)


@dataclasses.dataclass(frozen=True)
class Procurl(Rival):
    """ProCuRL: a candidate is drawn with a chance in proportion to exp(sharpness * p*(1 - p)), p its expected success.

    How p is known is ours: by the posterior of BOTS.

    Attributes:
        half_life: draws after which evidence counts half. sharpness: how much is made of p*(1 - p).
    """

    half_life: float
    sharpness: float

    def record(self, prompts: int, slots: int, device: torch.device) -> BetaRecord:
        """A uniform distribution each."""
        return BetaRecord.empty(prompts, self.half_life, device)

    def chosen(self, record: Record, numbers: Tensor, uniform: Tensor) -> Tensor:
        """The drawn one."""
        assert isinstance(record, BetaRecord)
        p = record.mean(numbers)
        return drawn_by(self.sharpness * p * (1 - p), uniform[:, 0])


@dataclasses.dataclass(frozen=True)
class Greso(Rival):
    """GRESO: candidates in their order are skipped by chance, the more surely the more often in a row they came out without
    spread; the first that is not skipped is picked, or the last one where all are.

    Skipped prompts are not replaced by more of the stream, nor are groups without spread drawn once more, as theirs are.
    """

    def record(self, prompts: int, slots: int, device: torch.device) -> SkipRecord:
        """Nothing to skip."""
        return SkipRecord.empty(prompts, slots * self.candidates, device)

    def chosen(self, record: Record, numbers: Tensor, uniform: Tensor) -> Tensor:
        """The first that is kept."""
        assert isinstance(record, SkipRecord)
        return first_kept(record.keeping(numbers), uniform)


@dataclasses.dataclass(frozen=True)
class Dps(Rival):
    """DPS: the candidate that most probably comes out mixed, by a Markov chain of its outcomes; the first of equal ones.

    Attributes:
        half_life: draws after which counts of transitions count half.
    """

    half_life: float

    def record(self, prompts: int, slots: int, device: torch.device) -> ChainRecord:
        """Every outcome equally probable."""
        return ChainRecord.empty(prompts, self.half_life, device)

    def chosen(self, record: Record, numbers: Tensor, uniform: Tensor) -> Tensor:
        """The most probable."""
        assert isinstance(record, ChainRecord)
        return nearest(-record.mixed(numbers), 1).squeeze(1)
