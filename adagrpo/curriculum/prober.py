"""What judges sample and score candidates by, and how all but ``full`` end."""

from __future__ import annotations

import dataclasses
import functools

import torch
from torch import Tensor

from ..algorithm.sde import Draw, Stream, philox_uniform
from ..algorithm.selection import CapabilityState, Selection, capability_step
from ..engine.executor import RolloutExecutor
from ..engine.rollout import Rollout
from ..engine.scoring import Scorer
from ..models.base import Conditioning
from .base import Candidates, Choice, Knowledge, Leg


@dataclasses.dataclass(frozen=True)
class Field:
    """Candidates on the way to their images, those that this rank samples.

    Attributes:
        rows: int64 [R], among the candidates of all ranks.
        x: [R, L, C], latents now.
        latents: [R, L, C] at the fork steps behind.
        preview: [R, L, C], the image expected at the last step, where it was asked for.
    """

    rows: Tensor
    x: Tensor
    latents: dict[int, Tensor] = dataclasses.field(default_factory=dict)
    preview: Tensor | None = None

    def only(self, index: Tensor | slice) -> Field:
        """Those at ``index``, int64 [R'] or a slice."""
        return Field(self.rows[index], self.x[index], {k: t[index] for k, t in self.latents.items()})

    def taken(self, index: Tensor, candidates: Candidates) -> Field:
        """Those at ``index`` int64 [R'], which counts the rows of the fields of all ranks by slot (``Share.taken``)."""
        taken = functools.partial(candidates.share.taken, rows=index, anywhere=candidates.pooled)
        return Field(taken(self.rows), taken(self.x), {k: taken(t) for k, t in self.latents.items()})

    def beside(self, other: Field) -> Field:
        """These, and behind them those of ``other``, which is as far."""
        latents = {k: torch.cat([t, other.latents[k]]) for k, t in self.latents.items()}
        return Field(torch.cat([self.rows, other.rows]), torch.cat([self.x, other.x]), latents)


@dataclasses.dataclass(frozen=True)
class Prober:
    """Samples by the deterministic ODE, scores, and folds scores into levels; without state of its own.

    Attributes:
        weights: of the rewards, [M].
        alpha: memory of the levels.
        forks: steps whose latents groups fork from; empty where nobody needs a candidate's own trajectory.
    """

    executor: RolloutExecutor
    score: Scorer
    weights: Tensor
    alpha: float
    forks: tuple[int, ...]

    def start(self, rows: Tensor, draw: int) -> Field:
        """The noise that the candidates ``rows`` start from; the same by every judge."""
        with self.executor.phase("probe"):
            return Field(rows, self.executor.initial_noise(rows, draw, Stream.PROBE_INIT))

    def sampled(self, field: Field, leg: Leg, conditioning: Conditioning, draw: int, preview: bool = False) -> Field:
        """The field at the end of ``leg``, steps of the full grid; ``conditioning`` is of its rows.

        Args:
            preview: also give the image expected at its last step.
        """
        first, last = leg.steps[0], leg.steps[-1]
        kept = [k for k in self.forks if first <= k <= last]
        plan = leg.plan(sorted({k - first for k in kept} | ({last - first} if preview else set())))
        out = self.executor.run(plan, field.x, conditioning, draw, "probe")
        latents = field.latents | {k: out.latents[k - first] for k in kept}
        return Field(field.rows, out.final, latents, self._expected(out, first, last) if preview else None)

    def sampled_whole(self, rows: Tensor, leg: Leg, candidates: Candidates) -> Field:
        """The candidates ``rows`` [R], sampled to the end."""
        return self.sampled(self.start(rows, candidates.draw), leg, candidates.text(rows), candidates.draw)

    def _expected(self, out: Rollout, first: int, last: int) -> Tensor:
        """``x - sigma*v`` at the step ``last``."""
        x, v, sigma = out.latents[last - first], out.velocities[last - first], self.executor.table.sigma[last]
        return (x.to(sigma.dtype) - sigma * v.to(sigma.dtype)).to(x.dtype)

    def word(self, slots: int, draw: int, step: int = 0) -> Draw:
        """The noise of the selection: a row for each of the ``slots`` of all ranks."""
        return Draw(self.executor.seed, torch.arange(slots, device=self.weights.device), draw, Stream.SELECT, step)

    def drawn(self, word: Draw, per_slot: int) -> Tensor:
        """A uniformly drawn candidate of each slot, int64 [P], counted within its slot."""
        return (philox_uniform(*word) * per_slot).long()

    def uniform(self, slots: int, per_slot: int, draw: int, step: int) -> Tensor:
        """Row of a uniformly drawn candidate of each of the ``slots`` of all ranks, int64 [P]."""
        word = self.word(slots, draw, step)
        return word.rows * per_slot + self.drawn(word, per_slot)

    def each(self, slots: int, per_slot: int, draw: int, step: int) -> Tensor:
        """A uniform number in [0, 1) for each candidate of the ``slots`` of all ranks, float32 [P, B]."""
        return philox_uniform(*self.word(slots * per_slot, draw, step)).reshape(slots, per_slot)

    def folded(self, level: CapabilityState, scores: Tensor, strategy: str = "closest", draw: Draw | None = None) -> Selection:
        """Scores [M, P, B] of all ranks folded into an EMA, or each slot's into its own, and the picks by it."""
        weights = self.weights if len(self.weights) > 1 else None
        fold = functools.partial(
            capability_step, alpha=self.alpha, strategy=strategy, reward_weights=weights, impl=self.executor.impl
        )
        if not level.slots:
            return fold(level, scores, draw=draw)
        words = [None if draw is None else draw._replace(rows=draw.rows[p : p + 1]) for p in range(level.slots)]
        found = [fold(level[p], scores[:, p : p + 1], draw=word) for p, word in enumerate(words)]
        picks, distance = (torch.cat([getattr(one, name) for one in found]) for name in ("picks", "distance"))
        status = torch.stack([one.status for one in found]).amax()
        return Selection(CapabilityState.of_slots([one.state for one in found]), picks, distance, status)

    def choice(
        self, field: Field, picks: Tensor, judged: Tensor | None, uniform: Tensor, candidates: Candidates, knowledge: Knowledge
    ) -> Choice:
        """Score the uniform candidates, the last rows of ``field``, and fold those of the last B draws into the EMA.

        Only they feed it, because an EMA fed by winners would measure the filter. Over the last B draws there are as many of
        them as ``full`` has in one.

        Args:
            field: whole, of this rank; its first rows are its slots' picks, where forks need them.
            picks: int64 [P]. judged: [M, P, B], the scores that they were picked by; None where there are none.
            uniform: int64 [P].
        """
        evidence, slots, draw = knowledge.evidence, candidates.slots, candidates.draw
        assert evidence is not None and candidates.numbers is not None
        scores = self.score(field.x[-slots:], candidates.shown(field.rows[-slots:]))
        scores = candidates.share.gather(scores, 1)
        with self.executor.phase("select"):
            evidence = evidence.with_recent(-1, scores, draw).with_images(candidates.numbers.flatten()[uniform], scores, draw)
            found = self.folded(knowledge.level, evidence.recent[-1].unsqueeze(1))
        anchors = Rollout(field.x, field.latents, {}, None)  # forks of its picks take fresh velocities
        anchor_row = torch.arange(slots, device=uniform.device)
        return Choice(picks, anchors, anchor_row, judged, Knowledge(found.state, evidence, found.status))
