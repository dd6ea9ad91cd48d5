"""Probes that do not sample every candidate to the end: short ODEs, races over previews, and memory.

All end alike: the picks and one uniformly drawn candidate per slot are sampled to the end, and only the full-length scores of
the uniform ones feed the capability EMA, because an EMA fed by winners would measure the filter. Over the last B draws there
are as many of them as the paper's probes have in one.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..algorithm.sde import Draw, Stream, philox_uniform
from ..algorithm.selection import CapabilityState, Selection, capability_step, closest_distance, nearest
from ..engine.executor import RolloutExecutor
from ..engine.overlap import Overlap
from ..engine.plans import probe_plan
from ..engine.rollout import Rollout
from ..engine.scoring import Scorer
from ..models.base import Conditioning
from ..rewards import PromptRows
from .evidence import CheapFilter


@dataclasses.dataclass(frozen=True)
class Stage:
    """A part of a race: ``per_slot`` candidates of each slot take steps ``first`` to ``last - 1``; ``left`` of them go on.

    After the first part the uniformly drawn candidate runs beside them.
    """

    per_slot: int
    first: int
    last: int
    left: int


def race_stages(candidates: int, race_steps: Sequence[int]) -> list[Stage]:
    """The halving of a field at each preview; whoever is left after the last one goes on to the image."""
    bounds, field, stages = (0, *race_steps), candidates, []
    for first, last in itertools.pairwise(bounds):
        left = 1 if last == bounds[-1] else -(-field // 2)
        stages.append(Stage(field, first, last, left))
        field = left
    return stages


@dataclasses.dataclass(frozen=True)
class Candidates:
    """The candidates of one draw.

    Attributes:
        conditioning, prompts: of the P*B candidates.
        places: int64 [P, B], the prompts' numbers in the data.
        draw: number of the draw, of the noise.
    """

    conditioning: Conditioning
    prompts: Sequence[str]
    places: Tensor
    draw: int


@dataclasses.dataclass(frozen=True)
class Probed:
    """What a probe found.

    Attributes:
        picks: int64 [P], rows among the candidates [P*B]; -1 where none has a judging score.
        anchors: rollout whose first P rows are the picks', with what forks need; of plans without forks nothing of use.
        judged: [M, P, B], the last scores that candidates were judged by.
        capability: the EMA with this draw's full-length uniform scores.
        state: what the probe remembers after this draw.
        status: of the fold (``capability_step``).
    """

    picks: Tensor
    anchors: Rollout
    judged: Tensor
    capability: CapabilityState
    state: CheapFilter
    status: Tensor


@dataclasses.dataclass(frozen=True)
class _Field:
    """Candidates on the way to their images.

    Attributes:
        rows: int64 [R], among all candidates.
        x: [R, L, C], latents now.
        latents: [R, L, C] at the fork steps behind.
        preview: [R, L, C], the image expected at the last step, where it was asked for.
    """

    rows: Tensor
    x: Tensor
    latents: dict[int, Tensor] = dataclasses.field(default_factory=dict)
    preview: Tensor | None = None

    def only(self, index: Tensor) -> _Field:
        """Those at ``index``, int64 [R']."""
        return _Field(self.rows[index], self.x[index], {k: t[index] for k, t in self.latents.items()})


class CheapProbe:
    """Judges candidates, picks, and finishes the picks; without state of its own.

    Args:
        executor, score: of the trainer.
        overlapped: scores finished rows of a rollout beside it.
        weights: of the rewards, [M].
        judge: ``short``, ``racing`` or ``memory``.
        pooled, strategy, alpha, race_steps, finalists: as the recipe's ``selection`` keys.
        forks: steps that groups fork from; without any nobody needs the pick's own trajectory.
    """

    def __init__(
        self,
        executor: RolloutExecutor,
        score: Scorer,
        overlapped: Callable[[PromptRows], Overlap],
        weights: Tensor,
        *,
        judge: str,
        pooled: bool,
        strategy: str,
        alpha: float,
        race_steps: Sequence[int],
        finalists: int,
        forks: Sequence[int],
    ) -> None:
        self.executor, self.score, self.overlapped, self.weights = executor, score, overlapped, weights
        self.judge = {"short": self._short, "racing": self._race, "memory": self._remember}[judge]
        self.pooled, self.strategy, self.alpha = pooled, strategy, alpha
        self.race_steps, self.finalists, self.forks, self.steps = race_steps, finalists, forks, executor.num_steps

    def __call__(self, candidates: Candidates, capability: CapabilityState, state: CheapFilter) -> Probed:
        """One draw."""
        return self.judge(candidates, self.uniform(candidates, step=1), capability, state)

    def uniform(self, candidates: Candidates, step: int) -> Tensor:
        """Row of a uniformly drawn candidate of each slot, int64 [P]."""
        slots, b = candidates.places.shape
        rows = torch.arange(slots, device=candidates.places.device)
        word = Draw(self.executor.seed, rows, candidates.draw, Stream.SELECT, step)
        return rows * b + (philox_uniform(*word) * b).long()

    def _short(self, candidates: Candidates, uniform: Tensor, capability: CapabilityState, state: CheapFilter) -> Probed:
        """Every candidate by a short ODE of its own."""
        slots = uniform.shape[0]
        field = self._start(torch.arange(len(candidates.prompts), device=uniform.device), candidates.draw)
        scores = self.overlapped(PromptRows(candidates.prompts, field.rows))
        plan = probe_plan(range(len(candidates.prompts)), self.executor.rollout_table.probe)
        self.executor.run(plan, field.x, candidates.conditioning, candidates.draw, "probe", finished=scores)
        judged = scores.result().unflatten(1, (slots, -1))
        with self.executor.phase("select"):
            found = self._folded(state.levels[0], judged, self.strategy)
            state = state.with_level(0, found.state)
            if self.pooled:
                picks = nearest_picks(closest_distance(judged, found.state, self.weights), pooled=True)
            else:
                picks = rows_of(found.picks, judged.shape[2])
        return self._finish(self._sampled_whole(picks, uniform, candidates), picks, judged, candidates, capability, state)

    def _race(self, candidates: Candidates, uniform: Tensor, capability: CapabilityState, state: CheapFilter) -> Probed:
        """Successive halving: who is nearest by a preview goes on, on the same trajectory.

        The first preview is judged against an EMA over all candidates, later ones, which only survivors reach, against one
        over the uniform candidates of the last B draws.
        """
        slots = uniform.shape[0]
        everyone = torch.arange(len(candidates.prompts), device=uniform.device)
        field, at_uniform = self._start(everyone, candidates.draw), uniform
        judged = torch.empty(len(self.weights), len(everyone), dtype=torch.float64, device=uniform.device)
        for number, stage in enumerate(race_stages(candidates.places.shape[1], self.race_steps)):
            text = candidates.conditioning if number == 0 else candidates.conditioning.rows(field.rows)
            field = self._sampled(field, text, candidates.draw, stage.first, stage.last, preview=True)
            assert field.preview is not None
            scores = self.score(field.preview, PromptRows(candidates.prompts, field.rows))
            with self.executor.phase("select"):
                racing = slots * stage.per_slot
                judged = judged.index_copy(1, field.rows[:racing], scores[:, :racing])
                fold = scores
                if number:
                    state = state.with_recent(number - 1, scores[:, racing:], candidates.draw)
                    fold = state.recent[number - 1]
                level = self._folded(state.levels[number], fold.unsqueeze(1)).state
                state = state.with_level(number, level)
                distance = closest_distance(scores[:, :racing], level, self.weights).unflatten(0, (slots, -1))
                left = nearest_rows(distance, stage.left, self.pooled)
                picks = torch.where(distance.flatten()[left].isfinite(), field.rows[left], -1)
                over = stage.last == self.race_steps[-1] and not self.forks  # nobody needs the pick's own trajectory
                field = field.only(at_uniform if over else torch.cat([left, at_uniform]))
                at_uniform = torch.arange(-slots, 0, device=uniform.device) + len(field.rows)
        text = candidates.conditioning.rows(field.rows)
        field = self._sampled(field, text, candidates.draw, self.race_steps[-1], self.steps)
        return self._finish(field, picks, judged.unflatten(1, (slots, -1)), candidates, capability, state)

    def _remember(self, candidates: Candidates, uniform: Tensor, capability: CapabilityState, state: CheapFilter) -> Probed:
        """By the posterior alone, or after a look at one image of each of the few candidates it likes best."""
        slots, places = uniform.shape[0], candidates.places.flatten()
        with self.executor.phase("select"):
            judged, distance = state.judged(candidates.places, capability, self.weights, candidates.draw)
            # While nothing tells candidates apart, one is drawn; later ties go to the first, of a stream that is shuffled.
            lucky = self.uniform(candidates, step=2)
            distance = distance.flatten().index_add(0, lucky, torch.full_like(distance[:, 0], -1e-9)).unflatten(0, (slots, -1))
            picks = nearest_rows(distance, self.finalists, self.pooled)
        field = self._sampled_whole(picks, uniform, candidates)
        if self.finalists > 1:
            scores = self.score(field.x[:-slots], PromptRows(candidates.prompts, picks))
            with self.executor.phase("select"):
                again = (picks.unsqueeze(1) == uniform).any(1)  # the very images that are scored below
                state = state.with_images(places[picks], scores.masked_fill(again, torch.nan), candidates.draw)
                shown = places[picks].unflatten(0, (slots, -1))
                _, distance = state.judged(shown, capability, self.weights, candidates.draw)
                best = nearest_rows(distance, 1, self.pooled)
                picks = picks[best]
                field = field.only(torch.cat([best, torch.arange(-slots, 0, device=uniform.device) + len(field.rows)]))
        return self._finish(field, picks, judged, candidates, capability, state)

    def _start(self, rows: Tensor, draw: int) -> _Field:
        """The noise that the candidates ``rows`` start from, the same under every probe."""
        with self.executor.phase("probe"):
            return _Field(rows, self.executor.initial_noise(rows, draw, Stream.PROBE_INIT))

    def _sampled(
        self, field: _Field, conditioning: Conditioning, draw: int, first: int, last: int, preview: bool = False
    ) -> _Field:
        """The field after the steps ``first`` to ``last - 1`` of the deterministic sampler; ``conditioning`` is of its rows."""
        kept = [k for k in self.forks if first <= k < last]
        keep = sorted({k - first for k in kept} | ({last - 1 - first} if preview else set()))
        plan = probe_plan(range(field.rows.shape[0]), range(first, last), keep)
        out = self.executor.run(plan, field.x, conditioning, draw, "probe")
        latents = field.latents | {k: out.latents[k - first] for k in kept}
        expected = None
        if preview:
            x, v = out.latents[last - 1 - first], out.velocities[last - 1 - first]
            sigma = self.executor.table.sigma[last - 1]
            expected = (x.to(sigma.dtype) - sigma * v.to(sigma.dtype)).to(x.dtype)
        return _Field(field.rows, out.final, latents, expected)

    def _sampled_whole(self, picks: Tensor, uniform: Tensor, candidates: Candidates) -> _Field:
        """The picks, where anything needs their images or what is behind them, and the uniform candidates, to the end."""
        needed = bool(self.forks) or self.finalists > 1
        rows = torch.cat([picks.clamp_min(0), uniform]) if needed else uniform
        text = candidates.conditioning.rows(rows)
        return self._sampled(self._start(rows, candidates.draw), text, candidates.draw, 0, self.steps)

    def _finish(
        self,
        field: _Field,
        picks: Tensor,
        judged: Tensor,
        candidates: Candidates,
        capability: CapabilityState,
        state: CheapFilter,
    ) -> Probed:
        """Score the uniform candidates, the last rows of ``field``, and fold those of the last B draws into the EMA."""
        slots, places, draw = picks.shape[0], candidates.places.flatten(), candidates.draw
        uniform = field.rows[-slots:]
        scores = self.score(field.x[-slots:], PromptRows(candidates.prompts, uniform))
        with self.executor.phase("select"):
            state = state.with_recent(-1, scores, draw).with_images(places[uniform], scores, draw)
            found = self._folded(capability, state.recent[-1].unsqueeze(1))
        anchors = Rollout(field.x, field.latents, {}, None)  # forks of cheap probes take fresh velocities
        return Probed(picks, anchors, judged, found.state, state, found.status)

    def _folded(self, level: CapabilityState, scores: Tensor, strategy: str = "closest") -> Selection:
        """Scores [M, P, B] folded into an EMA, and the picks by it."""
        weights = self.weights if len(self.weights) > 1 else None
        return capability_step(level, scores, self.alpha, strategy, weights, impl=self.executor.impl)


def nearest_rows(distance: Tensor, count: int, pooled: bool) -> Tensor:
    """Rows of the ``count`` candidates per slot with the least ``distance`` [P, B]: int64 [P*count], ordered (slot, rank).

    Args:
        pooled: the P*count least of all instead, dealt to the slots in their order.
    """
    slots, b = distance.shape
    return nearest(distance.flatten(), slots * count) if pooled else rows_of(nearest(distance, count), b).flatten()


def nearest_picks(distance: Tensor, pooled: bool) -> Tensor:
    """``nearest_rows`` of one candidate per slot; -1 where its distance is infinite."""
    rows = nearest_rows(distance, 1, pooled)
    return torch.where(distance.flatten()[rows].isfinite(), rows, -1)


def rows_of(picks: Tensor, candidates: int) -> Tensor:
    """Rows among all candidates of ``picks`` [P, ...], which count within their slot; -1 stays -1."""
    slot = torch.arange(picks.shape[0], device=picks.device).reshape(-1, *[1] * (picks.ndim - 1))
    return torch.where(picks >= 0, slot * candidates + picks, -1)
