"""Cross-level advantage fusion and its diagnostics (formulas: ``adagrpo_kernels.fused_advantage``)."""

from __future__ import annotations

import torch
from adagrpo_kernels import CALIBRATIONS
from adagrpo_kernels import fused_advantage_reference as fused_advantage
from adagrpo_kernels import global_advantage_reference as global_advantage
from adagrpo_kernels import local_advantage_reference as local_advantage
from adagrpo_kernels.fused_advantage import has_signal, valid_rewards
from torch import Tensor

from .selection import CapabilityState

__all__ = [
    "CALIBRATIONS",
    "advantage_statistics",
    "fused_advantage",
    "global_advantage",
    "groups_with_signal",
    "local_advantage",
    "multi_reward_advantage",
]


def multi_reward_advantage(
    rewards: Tensor,
    state: CapabilityState,
    reward_weights: Tensor,
    clip: float,
    weight: float,
    calibration: str,
) -> Tensor:
    """Each reward normalised inside its group and against its own EMA, then summed with ``reward_weights``.

    Args:
        rewards: [M, groups, G].
        state: capability of shape [M].
        reward_weights: [M].
        clip, weight, calibration: as in ``fused_advantage``. With weight 0 the EMA is not used.

    Returns:
        [groups, G]; 0 where any reward of a sample is not finite.
    """
    mask = rewards.isfinite().all(0).expand_as(rewards)
    if weight == 0:
        parts = local_advantage(rewards, clip, mask)
    else:
        mean, std = (t.to(rewards.dtype).reshape(-1, 1, 1) for t in (state.mean, state.std))
        parts = fused_advantage(rewards, mean, std, clip, weight, calibration, mask)
    return (reward_weights.to(parts.dtype).reshape(-1, 1, 1) * parts).sum(0)


def groups_with_signal(rewards: Tensor) -> Tensor:
    """bool [groups] for rewards [M, groups, G]: some reward differs inside the group."""
    return has_signal(rewards, valid_rewards(rewards)).squeeze(-1).any(0)


def advantage_statistics(rewards: Tensor, advantage: Tensor, state: CapabilityState) -> dict[str, Tensor]:
    """What fusion did to one reward's groups, as 0-dim tensors.

    Shares of the valid samples: ``false_positive``, better than the group but below the policy's level, ``false_negative``,
    the reverse (AdaGRPO section 3), ``turned``, whose sign the fusion changed. Share of all samples: ``failed``. Share of
    the groups: ``equal_groups``. ``mean_abs`` is the mean magnitude of the advantages.

    Args:
        rewards, advantage: [groups, G].
        state: capability of shape [].
    """
    valid = valid_rewards(rewards)
    local = local_advantage(rewards, torch.inf)
    level = state.mean.to(rewards.dtype)
    share = lambda condition: (condition & valid).sum() / valid.sum().clamp_min(1)  # noqa: E731
    known = state.count > 0
    return {
        "mean_abs": advantage.abs().mean(),
        "false_positive": share((local > 0) & (rewards < level) & known),
        "false_negative": share((local < 0) & (rewards > level) & known),
        "turned": share(local.sign() != advantage.sign()),
        "equal_groups": (~has_signal(rewards, valid)).to(rewards.dtype).mean(),
        "failed": (~valid).to(rewards.dtype).mean(),
    }
