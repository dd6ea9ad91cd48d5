"""From distances to picks: within each slot, or of all slots together (the pool)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from ..algorithm.selection import CapabilityState, Selection, closest_distance, nearest

Nearest = Callable[[Tensor, int], Tensor]
Pick = Callable[[Tensor, Selection, Tensor], Tensor]
Strategy = Callable[[Tensor, CapabilityState], Tensor]


def nearest_in_slots(distance: Tensor, count: int) -> Tensor:
    """Rows of the ``count`` candidates of each slot with the least ``distance`` [P, B]: int64 [P*count], (slot, rank)."""
    return rows_of(nearest(distance, count), distance.shape[1]).flatten()


def nearest_of_all(distance: Tensor, count: int) -> Tensor:
    """Rows of the P*count candidates with the least ``distance`` [P, B] of all, dealt to the slots in their order."""
    return nearest(distance.flatten(), distance.shape[0] * count)


def nearest_picks(distance: Tensor, rule: Nearest) -> Tensor:
    """One candidate per slot by ``rule``, int64 [P]; -1 where its distance is infinite."""
    rows = rule(distance, 1)
    return torch.where(distance.flatten()[rows].isfinite(), rows, -1)


def rows_of(picks: Tensor, candidates: int) -> Tensor:
    """Rows among all candidates of ``picks`` [P, ...], which count within their slot; -1 stays -1."""
    slot = torch.arange(picks.shape[0], device=picks.device).reshape(-1, *[1] * (picks.ndim - 1))
    return torch.where(picks >= 0, slot * candidates + picks, -1)


def picked_in_slots(scores: Tensor, fold: Selection, weights: Tensor) -> Tensor:
    """The picks that the fold made by its strategy: rows [P]."""
    return rows_of(fold.picks, scores.shape[2])


def picked_of_all(scores: Tensor, fold: Selection, weights: Tensor) -> Tensor:
    """The candidates of all slots whose scores [M, P, B] are closest to the level: rows [P]."""
    return nearest_picks(closest_distance(scores, fold.state, weights), nearest_of_all)


@dataclasses.dataclass(frozen=True)
class PickedBy:
    """Picks of a user's strategy, ``(scores [M, P, B], level) -> index [P]``."""

    strategy: Strategy

    def __call__(self, scores: Tensor, fold: Selection, weights: Tensor) -> Tensor:
        """Rows [P]."""
        return rows_of(self.strategy(scores, fold.state), scores.shape[2])
