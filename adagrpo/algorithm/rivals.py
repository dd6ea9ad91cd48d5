"""What rivals of the curriculum filter know of each prompt, from groups that were trained on anyway.

All of them were made for answers that are right or wrong. Here an image succeeds by a share in [0, 1], from its reward, and a
prompt was visited with one of three outcomes: all failed (its groups lack spread, and succeed by less than a half), all solved
(they lack spread otherwise), or mixed. Every record is immutable, of all N prompts, and moves once a draw.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, TypeVar

import torch
from torch import Tensor

from .advantages import groups_with_signal

FAILED, MIXED, SOLVED = 0, 1, 2
"""Outcomes of a visit."""
GRESO_FIRST, GRESO_STEP, GRESO_LEAST, GRESO_MOST, GRESO_EXPLORES = 0.5, 0.01, 0.05, 0.95, 0.01
"""Of its two chances to keep a prompt: at the beginning, by how much they move, their bounds; and the least keeping of all."""
GRESO_TARGETS = (1 / 6, 1 / 12)
"""Shares of a draw's prompts that may have failed and be solved: a quarter, of which two thirds are for hard ones."""
CELLS = 1024
"""Of the grid on which a Beta distribution is inverted."""

R = TypeVar("R", bound="Record")


def success(rewards: Tensor, low: float, high: float) -> Tensor:
    """Success of images in [0, 1], float64: 0 at ``low``, 1 at ``high``, in between linearly; 1 from ``low`` on where both are
    equal, to a millionth. NaN where a reward is not finite."""
    rewards = rewards.double().masked_fill(~rewards.isfinite(), math.nan)
    if low < high:
        return ((rewards - low) / (high - low)).clamp(0, 1)
    reached = rewards >= low - 1e-6 * max(1.0, abs(low))
    return reached.double().masked_fill(rewards.isnan(), math.nan)


@dataclasses.dataclass(frozen=True)
class Visits:
    """What the groups of a draw said of N prompts.

    Attributes:
        images: float64 [N], how many there are with a reward; 0 for prompts that were not visited.
        success: float64 [N], their mean success.
        outcome: int64 [N], ``FAILED``, ``MIXED`` or ``SOLVED``.
    """

    images: Tensor
    success: Tensor
    outcome: Tensor

    @classmethod
    def of(cls, prompts: Tensor, succeeded: Tensor, count: int) -> Visits:
        """From the success [P, groups, G] of the images of ``prompts`` (int64 [P], repeats allowed), of ``count`` in all."""
        known = succeeded.isfinite()
        spread = groups_with_signal(succeeded.flatten(0, 1).unsqueeze(0)).unflatten(0, succeeded.shape[:2]).any(1)
        sums = succeeded.new_zeros(3, count, dtype=torch.float64)
        per_slot = (known.sum((1, 2)), succeeded.masked_fill(~known, 0).sum((1, 2)), spread)
        images, total, mixed = sums.index_add(1, prompts, torch.stack([t.double() for t in per_slot]))
        mean = total / images.clamp_min(1)
        outcome = torch.where(mixed > 0, MIXED, torch.where(mean < 0.5, FAILED, SOLVED))
        return cls(images, mean, outcome)

    @property
    def visited(self) -> Tensor:
        """bool [N]."""
        return self.images > 0


@dataclasses.dataclass(frozen=True)
class Record:
    """What one rival knows; fields that are tensors are its state."""

    prompts: int

    def after(self: R, visits: Visits) -> R:
        """After one draw more."""
        raise NotImplementedError

    def state_dict(self) -> dict[str, Any]:
        """Its tensors by name."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {name: value for name, value in values.items() if isinstance(value, Tensor)}

    def loaded(self: R, state: dict[str, Any]) -> R:
        """Inverse of ``state_dict``."""
        return dataclasses.replace(self, **{name: state[name].to(own.device) for name, own in self.state_dict().items()})


@dataclasses.dataclass(frozen=True)
class BetaRecord(Record):
    """A Beta distribution of each prompt's chance of success, from Beta(1, 1), which it falls back to.

    BOTS (arXiv 2510.26374) without its implicit evidence, which needs other models' success (rho = 0): each draw
    ``alpha = keep*alpha + (1 - keep)*1 + successes``, and beta likewise with failures.

    Attributes:
        keep: what a draw leaves of the evidence, in (0, 1].
        successes, failures: float64 [N], alpha - 1 and beta - 1.
    """

    keep: float
    successes: Tensor
    failures: Tensor

    @classmethod
    def empty(cls, prompts: int, half_life: float, device: torch.device | str = "cpu") -> BetaRecord:
        """Nothing known; ``half_life`` in draws."""
        none = torch.zeros(prompts, dtype=torch.float64, device=device)
        return cls(prompts, 0.5 ** (1 / half_life), none, none)

    def after(self, visits: Visits) -> BetaRecord:
        """After one draw more."""
        gained = visits.success * visits.images
        successes, failures = self.keep * self.successes + gained, self.keep * self.failures + visits.images - gained
        return dataclasses.replace(self, successes=successes, failures=failures)

    def mean(self, prompts: Tensor) -> Tensor:
        """Expected success of ``prompts``, int64 of any shape."""
        alpha, beta = 1 + self.successes[prompts], 1 + self.failures[prompts]
        return alpha / (alpha + beta)

    def sample(self, prompts: Tensor, uniform: Tensor) -> Tensor:
        """A draw of the success of each of ``prompts``, at the quantile ``uniform`` of its shape, in [0, 1)."""
        return beta_quantile(1 + self.successes[prompts], 1 + self.failures[prompts], uniform)


def beta_quantile(alpha: Tensor, beta: Tensor, share: Tensor) -> Tensor:
    """Quantiles of Beta distributions with alpha and beta of at least one, float64: right to 4e-5 where their sum is below
    1,000, to 3e-4 below 50,000.

    The density is summed over ``CELLS`` of the angle whose squared sine is the value: there its width hardly depends on where
    it is. Always as much work, and no loop that waits for the device.
    """
    width = math.pi / 2 / CELLS
    angle = (torch.arange(CELLS, dtype=torch.float64, device=alpha.device) + 0.5) * width
    a, b = alpha.double().unsqueeze(-1), beta.double().unsqueeze(-1)
    density = (2 * a - 1) * angle.sin().log() + (2 * b - 1) * angle.cos().log()
    reached = (density - density.amax(-1, keepdim=True)).exp().cumsum(-1)
    wanted = share.double().unsqueeze(-1) * reached[..., -1:]
    cell = torch.searchsorted(reached, wanted).clamp_max(CELLS - 1)
    below = torch.where(cell > 0, reached.gather(-1, (cell - 1).clamp_min(0)), 0.0)
    inside = (wanted - below) / (reached.gather(-1, cell) - below).clamp_min(1e-300)
    return ((cell + inside.clamp(0, 1)) * width).sin().square().squeeze(-1)


@dataclasses.dataclass(frozen=True)
class SkipRecord(Record):
    """How often in a row each prompt was visited in vain, and what follows (GRESO, arXiv 2506.02177, and its released code).

    A prompt whose last z visits all failed is kept with chance p_hard^z, one whose last z were all solved with p_easy^z, and
    never with less than a hundredth. From the second pass over the data on each draw moves both p: down by .01 where at least
    the target share of its prompts came out so, else up.

    Attributes:
        first: draws of the first pass.
        run: int64 [N], z. solved: bool [N], which it counts.
        chance: float64 [2], p_hard and p_easy. draws: int64 0-dim, draws so far.
    """

    first: int
    run: Tensor
    solved: Tensor
    chance: Tensor
    draws: Tensor

    @classmethod
    def empty(cls, prompts: int, per_draw: int, device: torch.device | str = "cpu") -> SkipRecord:
        """Nothing known; ``per_draw`` candidates are taken of the data in a draw."""
        run = torch.zeros(prompts, dtype=torch.int64, device=device)
        chance = torch.full((2,), GRESO_FIRST, dtype=torch.float64, device=device)
        return cls(prompts, -(-prompts // per_draw), run, run > 0, chance, run.new_zeros(()))

    def after(self, visits: Visits) -> SkipRecord:
        """After one draw more."""
        solved, vain = visits.outcome == SOLVED, visits.outcome != MIXED
        run = torch.where(vain, torch.where(solved == self.solved, self.run, 0) + 1, 0)
        total = visits.visited.sum().clamp_min(1)
        came = zip((visits.outcome == FAILED, solved), GRESO_TARGETS, strict=True)
        often = torch.stack([(kind & visits.visited).sum() / total >= target for kind, target in came])
        moved = (self.chance + torch.where(often, -GRESO_STEP, GRESO_STEP)).clamp(GRESO_LEAST, GRESO_MOST)
        return dataclasses.replace(
            self,
            run=torch.where(visits.visited, run, self.run),
            solved=torch.where(visits.visited, solved, self.solved),
            chance=torch.where(self.draws >= self.first, moved, self.chance),
            draws=self.draws + 1,
        )

    def keeping(self, prompts: Tensor) -> Tensor:
        """With which chance ``prompts``, int64 of any shape, are not skipped."""
        return (self.chance[self.solved[prompts].long()] ** self.run[prompts]).clamp_min(GRESO_EXPLORES)


@dataclasses.dataclass(frozen=True)
class ChainRecord(Record):
    """A Markov chain of each prompt's outcomes, whose transitions are learnt as it is visited (DPS, its released code).

    Attributes:
        keep: what a draw leaves of the counts beyond their prior, in (0, 1].
        counts: float64 [N, 3, 3], of transitions to (row) and from (column) each outcome; a Dirichlet distribution's, prior 1.
        now, next: float64 [N, 3], chances of the outcomes at the last draw and at the one to come.
    """

    keep: float
    counts: Tensor
    now: Tensor
    next: Tensor

    @classmethod
    def empty(cls, prompts: int, half_life: float, device: torch.device | str = "cpu") -> ChainRecord:
        """Nothing known; ``half_life`` in draws."""
        counts = torch.ones(prompts, 3, 3, dtype=torch.float64, device=device)
        even = torch.full_like(counts[..., 0], 1 / 3)
        return cls(prompts, 0.5 ** (1 / half_life), counts, even, even)

    def after(self, visits: Visits) -> ChainRecord:
        """After one draw more: transitions into an outcome that was seen count, in all by one; the chances of all others move
        on by the chain alone."""
        seen = torch.nn.functional.one_hot(visits.outcome, 3).double()
        jump = seen.unsqueeze(2) * self.now.unsqueeze(1) * _transitions(self.counts)
        jump = jump / jump.sum((1, 2), keepdim=True)
        gained = jump.masked_fill(~visits.visited[:, None, None], 0)
        counts = self.keep * self.counts + (1 - self.keep) + gained
        now = torch.where(visits.visited.unsqueeze(1), seen, self.next)
        ahead = (_transitions(counts) * now.unsqueeze(1)).sum(2)
        return dataclasses.replace(self, counts=counts, now=now, next=ahead / ahead.sum(1, keepdim=True))

    def mixed(self, prompts: Tensor) -> Tensor:
        """With which chance ``prompts``, int64 of any shape, come out mixed next."""
        return self.next[prompts, MIXED]


def _transitions(counts: Tensor) -> Tensor:
    """Expected chances to go to each outcome (row) from each (column)."""
    return counts / counts.sum(1, keepdim=True)


def first_kept(keeping: Tensor, uniform: Tensor) -> Tensor:
    """The first of each row's candidates that is kept with its chance ``keeping`` [P, B], else the last: int64 [P]."""
    last = keeping.shape[1] - 1
    index = torch.arange(last + 1, device=keeping.device)
    return torch.where(uniform < keeping, index, last).amin(1)


def drawn_by(score: Tensor, uniform: Tensor) -> Tensor:
    """One of each row's candidates, drawn by ``uniform`` [P] in proportion to exp(``score`` [P, B]): int64 [P]."""
    reached = score.softmax(1).cumsum(1)
    return (reached[:, :-1] <= uniform.unsqueeze(1)).sum(1)
