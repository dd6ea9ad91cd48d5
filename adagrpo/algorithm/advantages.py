"""Cross-level advantage fusion and its diagnostics (formulas: ``adagrpo_kernels.fused_advantage``)."""

from __future__ import annotations

from typing import NamedTuple

from adagrpo_kernels import CALIBRATIONS, STATISTICS, advantage_statistics_reference
from adagrpo_kernels import fused_advantage as fused_advantage
from adagrpo_kernels import global_advantage_reference as global_advantage
from adagrpo_kernels import local_advantage_reference as local_advantage
from adagrpo_kernels import multi_reward_advantage as multi_reward_kernel
from adagrpo_kernels import reward_statistics_reference as reward_statistics
from adagrpo_kernels.fused_advantage import has_signal, valid_rewards
from torch import Tensor

from .selection import CapabilityState

__all__ = [
    "CALIBRATIONS",
    "RewardAdvantage",
    "advantage_statistics",
    "fused_advantage",
    "global_advantage",
    "groups_with_signal",
    "local_advantage",
    "reward_advantage",
    "reward_statistics",
]


class RewardAdvantage(NamedTuple):
    """Advantages [groups, G], and for each reward what ``advantage_statistics`` and ``reward_statistics`` say."""

    advantage: Tensor
    statistics: list[dict[str, Tensor]]


def reward_advantage(
    rewards: Tensor,
    state: CapabilityState,
    reward_weights: Tensor,
    clip: float,
    weight: float,
    calibration: str,
    impl: str | None = None,
) -> RewardAdvantage:
    """Each reward normalised inside its group and against its own EMA, then summed with ``reward_weights``.

    Args:
        rewards: [M, groups, G].
        state: capability of shape [M].
        reward_weights: [M].
        clip, weight, calibration: as in ``fused_advantage``. With weight 0 the EMA is not used.
        impl: ``auto``, ``triton`` or ``reference``; None for the environment's.

    Returns:
        ``RewardAdvantage``; the advantage is 0 where any reward of a sample is not finite.
    """
    found = multi_reward_kernel(
        rewards, state.mean, state.std, state.count, reward_weights, clip, weight, calibration, impl=impl
    )
    return RewardAdvantage(found.advantage, [dict(zip(STATISTICS, row.unbind(), strict=True)) for row in found.statistics])


def groups_with_signal(rewards: Tensor) -> Tensor:
    """bool [groups] for rewards [M, groups, G]: some reward differs inside the group."""
    return has_signal(rewards, valid_rewards(rewards)).squeeze(-1).any(0)


def advantage_statistics(rewards: Tensor, advantage: Tensor, state: CapabilityState) -> dict[str, Tensor]:
    """What fusion did to one reward's groups, as 0-dim tensors: ``adagrpo_kernels.advantage_statistics_reference``.

    Args:
        rewards, advantage: [groups, G].
        state: capability of shape [].
    """
    return advantage_statistics_reference(rewards, advantage, state.mean, state.count)
