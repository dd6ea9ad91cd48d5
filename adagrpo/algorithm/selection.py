"""The online curriculum filter: capability EMA and prompt selection (``adagrpo_kernels.capability_step``)."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, NamedTuple, overload

import torch
from adagrpo_kernels import Draw, capability_update_reference, select_reference
from adagrpo_kernels import capability_step as capability_kernel
from adagrpo_kernels.capability_step import STRATEGIES
from torch import Tensor

from .foreign import real_tensor

__all__ = [
    "STRATEGIES",
    "CapabilityCurriculum",
    "CapabilityState",
    "Selection",
    "capability_step",
    "closest_distance",
    "nearest",
    "select_prompt",
    "update_capability",
]


def _zero() -> Tensor:
    return torch.zeros((), dtype=torch.float64)


@dataclasses.dataclass(frozen=True)
class CapabilityState:
    """EMA of the policy's rewards.

    Attributes:
        mean, var: float64, 0-dim, or [M] for M rewards, or [P, M] for P slots with a level each.
        count: int64, iterations folded in so far; 0 means empty.
    """

    mean: Tensor = dataclasses.field(default_factory=_zero)
    var: Tensor = dataclasses.field(default_factory=_zero)
    count: Tensor = dataclasses.field(default_factory=lambda: torch.zeros((), dtype=torch.int64))

    @classmethod
    def for_rewards(cls, number: int, device: torch.device | str = "cpu", slots: int = 0) -> CapabilityState:
        """An empty state of shape [number], or [slots, number]."""
        zero = torch.zeros(*[slots] * bool(slots), number, dtype=torch.float64, device=device)
        return cls(zero, zero.clone(), zero.long())

    @property
    def std(self) -> Tensor:
        """``sqrt(max(var, 1e-8))``."""
        return self.var.clamp_min(1e-8).sqrt()

    def __getitem__(self, index: int) -> CapabilityState:
        """The state of one reward, 0-dim, or of one slot, [M]."""
        return CapabilityState(self.mean[index], self.var[index], self.count[index])

    @classmethod
    def of_slots(cls, levels: Sequence[CapabilityState]) -> CapabilityState:
        """States [M] of P slots as one, [P, M]."""
        return cls(*(torch.stack([getattr(level, name) for level in levels]) for name in ("mean", "var", "count")))

    @property
    def slots(self) -> int:
        """P; 0 where all slots share one level."""
        return len(self.mean) if self.mean.ndim == 2 else 0

    def to(self, device: torch.device | str) -> CapabilityState:
        """The same state on another device."""
        return CapabilityState(self.mean.to(device), self.var.to(device), self.count.to(device))

    def or_else(self, other: CapabilityState) -> CapabilityState:
        """Where this one is empty, ``other``; decided on the device."""
        own = self.count > 0
        pairs = ((self.mean, other.mean), (self.var, other.var), (self.count, other.count))
        return CapabilityState(*(torch.where(own, mine, theirs) for mine, theirs in pairs))

    def state_dict(self) -> dict[str, Tensor]:
        """Tensors ``mean, var, count``."""
        return {"mean": self.mean, "var": self.var, "count": self.count}

    @classmethod
    def from_state_dict(cls, state: dict[str, Tensor]) -> CapabilityState:
        """Inverse of ``state_dict``."""
        return cls(state["mean"].clone(), state["var"].clone(), state["count"].clone())


def update_capability(state: CapabilityState, scores: Tensor, alpha: float) -> CapabilityState:
    """Fold scores ([...], or [M, ...] for M rewards) into the EMA; ``alpha`` in [0, 1) is its memory."""
    if not 0 <= alpha < 1:
        raise ValueError(f"alpha = {alpha} must lie in [0, 1)")
    return CapabilityState(*capability_update_reference(state.mean, state.var, state.count, scores, alpha))


class Selection(NamedTuple):
    """The new state; per slot the pick (int64 [P], -1 for none) and its distance; the status word (0-dim, 0 is well)."""

    state: CapabilityState
    picks: Tensor
    distance: Tensor
    status: Tensor


def capability_step(
    state: CapabilityState,
    scores: Tensor,
    alpha: float,
    strategy: str = "closest",
    reward_weights: Tensor | None = None,
    draw: Draw | None = None,
    impl: str | None = None,
) -> Selection:
    """Fold scores [M, P, B] into the EMA, then pick one candidate per slot (``adagrpo_kernels.capability_step``).

    Args:
        reward_weights: [M]; None for a single reward.
        draw: noise of strategy ``random``, one row per slot.
        impl: ``auto``, ``triton`` or ``reference``; None for the environment's.
    """
    if not 0 <= alpha < 1:
        raise ValueError(f"alpha = {alpha} must lie in [0, 1)")
    found = capability_kernel(scores, state.mean, state.var, state.count, alpha, strategy, reward_weights, draw, impl)
    return Selection(CapabilityState(*found[:3]), *found[3:])


def closest_distance(scores: Tensor, state: CapabilityState, weights: Tensor) -> Tensor:
    """How far candidates are from the EMA by the rule ``closest``, ``sum_m weight_m*|score - mean|/std``: [...].

    Args:
        scores: [M, ...]. weights: [M].

    Returns:
        Infinite where a score is not finite.
    """
    column = lambda t: t.double().reshape(-1, *[1] * (scores.ndim - 1))  # noqa: E731
    found = (column(weights) * (scores.double() - column(state.mean)).abs() / column(state.std)).sum(0)
    return torch.where(found.isfinite(), found, torch.inf)


def nearest(distance: Tensor, count: int) -> Tensor:
    """The ``count`` least of ``distance`` [..., N], nearest first and the first index on ties: int64 [..., count]."""
    return distance.sort(dim=-1, stable=True).indices[..., :count]


def select_prompt(
    scores: Tensor,
    state: CapabilityState,
    strategy: str = "closest",
    reward_weights: Tensor | None = None,
    uniform: Tensor | None = None,
) -> Tensor:
    """Index of the candidate to train on: int64 [...] for scores [..., B] (or [M, ..., B] with ``reward_weights`` [M]).

    First index on ties; -1 where no score is finite. ``random`` takes its draws from ``uniform`` [...] in [0, 1), or from
    torch's generator when none are given. Strategies: ``adagrpo_kernels.capability_step.select_reference``.
    """
    if strategy == "random" and uniform is None:
        slots = scores.shape[:-1] if reward_weights is None else scores.shape[1:-1]
        uniform = torch.rand(slots, device=scores.device)
    return select_reference(scores, state.mean, state.std, strategy, reward_weights, uniform)


class CapabilityCurriculum:
    """The curriculum for somebody else's trainer: score B candidate prompts, train on the one it picks.

    Its ``mean`` and ``std`` are the level that ``fused_advantage`` measures against (AdaGRPO, section 3).

    Args:
        alpha: memory of the EMA, in [0, 1).
        strategy: one of ``STRATEGIES``.
    """

    def __init__(self, alpha: float = 0.8, strategy: str = "closest") -> None:
        if not 0 <= alpha < 1:
            raise ValueError(f"alpha = {alpha} must lie in [0, 1)")
        if strategy not in STRATEGIES:
            raise ValueError(f"unknown selection strategy {strategy!r}: one of {', '.join(STRATEGIES)}")
        self.alpha, self.strategy = alpha, strategy
        self.state = CapabilityState()

    @overload
    def select(self, scores: Sequence[Sequence[float]]) -> list[int]: ...
    @overload
    def select(self, scores: Sequence[float]) -> int: ...
    @overload
    def select(self, scores: Any) -> Any: ...
    def select(self, scores: Any) -> int | list[int]:
        """Fold the scores of all candidates into the EMA, once, then say which candidate to train on.

        Args:
            scores: [B], the candidates of one slot, or [P, B] for P slots that one iteration trains: tensor, numpy array or
                list. Candidates whose score is not finite are left out.

        Returns:
            The index of the candidate, for [P, B] a list of P indices.

        Raises:
            TypeError: not real numbers.
            ValueError: another shape, or a slot without a finite score; the state is then unchanged.
        """
        values = real_tensor(scores, "scores", torch.float64).cpu()
        if values.ndim not in (1, 2) or values.numel() == 0:
            raise ValueError(f"scores {list(values.shape)}: wants [B], or [P, B] for P slots of B candidates")
        empty = ~values.isfinite().any(-1)
        if bool(empty.any()):
            where = f" of slots {empty.nonzero().flatten().tolist()}" if values.ndim == 2 else ""
            raise ValueError(f"scores{where}: no finite value; nothing can be picked")
        self.state = update_capability(self.state, values, self.alpha)
        picks: int | list[int] = select_prompt(values, self.state, self.strategy).tolist()
        return picks

    @property
    def mean(self) -> float:
        """Mean of the EMA, for ``fused_advantage``; NaN before the first call of ``select``."""
        return float(self.state.mean) if int(self.state.count) else math.nan

    @property
    def std(self) -> float:
        """Standard deviation of the EMA, for ``fused_advantage``; NaN before the first call of ``select``."""
        return float(self.state.std) if int(self.state.count) else math.nan

    def state_dict(self) -> dict[str, Tensor]:
        """The EMA's tensors, for a checkpoint."""
        return self.state.state_dict()

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Inverse of ``state_dict``."""
        self.state = CapabilityState.from_state_dict(state)
