"""The table of a recipe's steps: deterministic rows, stochastic rows, and the longer steps of shortened tails."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from .sde import StepTable, step_table


@dataclasses.dataclass(frozen=True)
class RolloutTable:
    """Every step a rollout can take.

    Attributes:
        steps: rows 0 … T-1 deterministic, T … 2T-1 stochastic, then those of the tails and of short probes.
        position: int64 [rows], the noise level's place in ``sigmas``.
        num_steps: T.
        sigmas: noise levels at which velocities are evaluated: the grid's T, then those of tails off it and of short probes.
        history: [rows], weight of the preview of the step before (``sde_step``'s second-order term); None without tails.
        tails: for each last stochastic step with tails of its own, the table rows of each from the step after it to the image.
        probe: table rows of a short probe.
    """

    steps: StepTable
    position: Tensor
    num_steps: int
    sigmas: Tensor
    history: Tensor | None = None
    tails: dict[int, tuple[tuple[int, ...], ...]] = dataclasses.field(default_factory=dict)
    probe: tuple[int, ...] = ()

    def to(self, device: torch.device, dtype: torch.dtype) -> RolloutTable:
        """The same table on another device, its coefficients in another dtype."""
        history = None if self.history is None else self.history.to(device, dtype)
        return dataclasses.replace(
            self,
            steps=self.steps.to(device, dtype),
            position=self.position.to(device),
            sigmas=self.sigmas.to(device, dtype),
            history=history,
        )

    def take(self, other: RolloutTable) -> None:
        """Take over the values of a table of the same rows, in place: captured steps read these very tensors."""
        for mine, theirs in zip(self._values(), other._values(), strict=True):
            mine.copy_(theirs)

    def _values(self) -> list[Tensor]:
        steps = [getattr(self.steps, field.name) for field in dataclasses.fields(self.steps)]
        return [*steps, self.sigmas, *([] if self.history is None else [self.history])]


@dataclasses.dataclass(frozen=True)
class Granularity:
    """A tail that skips steps of the grid from the second after its fork on (G2RPO).

    Attributes:
        step: how many places of the grid each of its steps takes.
        released: where it does not meet the end of the grid, its last place is left out, not followed by the end: the released
            code stops there and takes the clean prediction of the step before it for the image.
    """

    step: int
    released: bool = False

    def points(self, k: int, num_steps: int) -> list[int]:
        """Its places on the grid, from k + 1 to T."""
        points = [k + 1, *range(k + 2, num_steps + 1, self.step)]
        if points[-1] == num_steps:
            return points
        return [*(points[:-1] if self.released else points), num_steps]


def rollout_table(
    sigmas: Tensor,
    scheme: str,
    eta: float,
    forks: Sequence[int] = (),
    tail_steps: int = 0,
    tail_solver: str = "dpmpp2m",
    probe_sigmas: Tensor | None = None,
    tail_past: bool = False,
    granularities: Sequence[Granularity] = (),
    tail_share: float = 0.0,
) -> RolloutTable:
    """The table of a recipe.

    Args:
        sigmas: float64 [T + 1], falling.
        scheme, eta: of the stochastic rows.
        forks: last stochastic steps k, of a fork or a trajectory, whose tails are shortened.
        tail_steps: evaluations after them, at most; 0 keeps every step of the grid.
        tail_solver: ``dpmpp2m`` (DPM-Solver++ 2M, Lu et al. 2022) or ``euler``.
        probe_sigmas: float64 [m + 1], falling: the grid of short probes.
        tail_past: tails go on from the clean prediction of step k itself, which trajectories have at hand.
        granularities: of several Euler tails of each fork, instead of a shortened one.
        tail_share: of the steps that are left, instead of ``tail_steps``; see ``_even``.

    Returns:
        A float64 table on the CPU.
    """
    num_steps = len(sigmas) - 1
    parts = [step_table("ode", sigmas), step_table(scheme, sigmas, eta)]
    positions = [torch.arange(num_steps).repeat(2)]
    weights, rows = [torch.zeros(2 * num_steps, dtype=torch.float64)], 2 * num_steps
    tails: dict[int, tuple[tuple[int, ...], ...]] = {}
    levels = sigmas[:-1].double()
    order = 2 if tail_solver == "dpmpp2m" and not granularities else 1
    for k in forks if tail_steps or tail_share or granularities else ():
        for places in _tails_of(k, num_steps, tail_steps, tail_share, granularities):
            points = levels_at(sigmas, places)
            steps, weight = multistep_table(points, order, sigmas[k : k + 1] if tail_past else None)
            tails[k] = (*tails.get(k, ()), tuple(range(rows, rows + len(steps))))
            parts.append(steps)
            weights.append(weight)
            rows += len(steps)
            place = torch.tensor(places[:-1], dtype=torch.float64)
            off = place != place.floor()
            positions.append(torch.where(off, len(levels) - 1 + off.cumsum(0), place).long())
            levels = torch.cat([levels, points[:-1][off]])
    probe: tuple[int, ...] = ()
    if probe_sigmas is not None:
        short = step_table("ode", probe_sigmas)
        probe = tuple(range(rows, rows + len(short)))
        parts.append(short)
        positions.append(torch.arange(len(levels), len(levels) + len(short)))
        weights.append(torch.zeros_like(short.a))
        levels = torch.cat([levels, short.sigma])
    history = torch.cat(weights) if tails else None
    return RolloutTable(StepTable.concat(parts), torch.cat(positions), num_steps, levels, history, tails, probe)


def _tails_of(
    k: int, num_steps: int, most: int, share: float, granularities: Sequence[Granularity]
) -> Sequence[Sequence[float]]:
    """Places of each tail after step k, as ``rollout_table`` is told of them."""
    if granularities:
        return [g.points(k, num_steps) for g in granularities]
    return [_even(k, num_steps, share) if share else _shortened(k, num_steps, most)]


def _shortened(k: int, num_steps: int, most: int) -> list[int]:
    """Places on the grid of a tail of at most ``most`` steps, as even as they come."""
    left = num_steps - k - 1
    count = min(left, most)
    return [k + 1 + round(i * left / count) for i in range(count + 1)]


def _even(k: int, num_steps: int, share: float) -> list[float]:
    """Places of a tail of as many levels as the whole part of ``share`` times T - k, and one step at least, at even distances
    in unshifted time (MixGRPO-Flash, whose code ends in the noise where that leaves no step)."""
    left = num_steps - k - 1
    count = max(1, int((num_steps - k) * share) - 1)
    return [k + 1 + left * i / count for i in range(count)] + [num_steps]


def levels_at(sigmas: Tensor, places: Sequence[float]) -> Tensor:
    """Noise levels, float64, at places of a grid [T + 1] that falls to 0; a place between its own is the level that the grid's
    time shift makes of the time there. Where the shift varies over the grid, its logarithm is interpolated."""
    num_steps, s = len(sigmas) - 1, sigmas.double()
    place = torch.tensor(places, dtype=torch.float64)
    low = place.floor().clamp(1, num_steps - 1).long()
    high = (low + 1).clamp(max=num_steps - 1)
    inner = torch.arange(1, num_steps, dtype=torch.float64)
    shift = torch.logit(s[1:-1]) - torch.logit(1 - inner / num_steps)
    between = torch.lerp(shift[low - 1], shift[high - 1], (place - low).clamp(0, 1))
    shifted = torch.sigmoid(torch.logit(1 - place / num_steps) + between)
    return torch.where(place == place.floor(), s[place.long()], shifted)


def multistep_table(sigmas: Tensor, order: int, past: Tensor | None = None) -> tuple[StepTable, Tensor]:
    """Rows of DPM-Solver++ in the data prediction ``D = x - sigma*v`` on a falling grid [m + 1], and their history weights.

    With ``lambda = log((1 - sigma)/sigma)``, ``h_i = lambda_{i+1} - lambda_i``: the first-order step is Euler's; the second
    order adds ``c*(D_i - D_{i-1})``, ``c = (1 - sigma_{i+1} - (1 - sigma_i)*sigma_{i+1}/sigma_i) * h_i/(2*h_{i-1})`` (Lu et
    al. 2022, algorithm 2). The first step has no past unless one is given, the noise level [1] of the step before it (MixGRPO's
    tails), and the last one, to noise 0, stays first order.
    """
    if past is not None:
        steps, weight = multistep_table(torch.cat([past.double(), sigmas.double()]), order)
        index = torch.arange(1, len(steps))
        return steps.rows(index), weight[1:]
    table = step_table("ode", sigmas)
    weight = torch.zeros_like(table.a)
    if order == 1 or len(sigmas) < 3:
        return table, weight
    s = sigmas.double()
    level = torch.log((1 - s[:-1]) / s[:-1])
    h = level[1:] - level[:-1]
    now, after = s[1:-2], s[2:-1]
    c = (1 - after - (1 - now) * after / now) * h[1:] / (2 * h[:-1])
    inner = slice(1, len(table) - 1)
    a, b = table.a.clone(), table.b.clone()
    a[inner] += c
    b[inner] -= c * now
    weight[inner] = -c
    return dataclasses.replace(table, a=a, b=b), weight
