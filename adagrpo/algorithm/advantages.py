"""Cross-level advantage fusion and its diagnostics (formulas: ``adagrpo_kernels.fused_advantage``)."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from adagrpo_kernels import CALIBRATIONS, PAPER_SCALE, STATISTICS, Scale, advantage_statistics_reference
from adagrpo_kernels import fused_advantage as fused_kernel
from adagrpo_kernels import global_advantage_reference as global_advantage
from adagrpo_kernels import local_advantage_reference as local_advantage
from adagrpo_kernels import multi_reward_advantage as multi_reward_kernel
from adagrpo_kernels import reward_statistics_reference as reward_statistics
from adagrpo_kernels.fused_advantage import has_signal, valid_rewards
from torch import Tensor

from .foreign import real_tensor
from .selection import CapabilityState

__all__ = [
    "CALIBRATIONS",
    "PAPER_SCALE",
    "RewardAdvantage",
    "Scale",
    "advantage_statistics",
    "fused_advantage",
    "global_advantage",
    "groups_with_signal",
    "local_advantage",
    "reward_advantage",
    "reward_statistics",
]


def fused_advantage(
    rewards: Any,
    mean: Any = None,
    std: Any = None,
    clip: float = 5.0,
    weight: float = 1.0,
    calibration: str = "mass",
    mask: Any = None,
    impl: str | None = None,
    *,
    group_size: int | None = None,
) -> Tensor:
    """Cross-level advantage of one group of samples of one prompt: how good each is inside its group, plus how good it is
    against the level of the policy's own rewards (AdaGRPO, arXiv 2606.06828, section 3).

    With ``m, s`` the mean and standard deviation (ddof 1) of the group's G rewards R::

        local  = clamp((R - m) / (s + 1e-8), -clip, clip)
        z      = (R - mean) / (std + 1e-8)                          # against CapabilityCurriculum's EMA
        global = clamp(z+ / sum(z+) - z- / sum(z-), -clip, clip)    # "mass"; z - mean(z) where all lie on one side
        advantage = local + weight * global

    A failed sample (NaN, inf, masked) has advantage 0 and counts in no mean; so has a group whose rewards are all equal.

    Args:
        rewards: [G], tensor, numpy array or list; integers and truth values too. Several groups at once: [..., G], members of
            a group in the last dimension, and ``group_size=G``, because [G, steps] or [G, reward models] looks the same.
        mean, std: of the EMA, in units of the reward: numbers, or tensors that broadcast against ``rewards``. None or NaN, as
            ``CapabilityCurriculum`` has before its first ``select``: there is no level yet, the advantage is the local one.
        clip: above 0.
        weight: of the global part; 0 leaves plain group-relative advantages.
        calibration: of the global part: ``mass`` (the paper's), ``zscore`` (z), ``zscore_centred`` (z - mean(z)), ``none``
            (R - mean).
        mask: bool, shaped as ``rewards``: False for samples to ignore.
        impl: ``auto``, ``triton`` or ``reference``; None for the environment's.
        group_size: G, where ``rewards`` holds several groups.

    Returns:
        Tensor shaped as ``rewards``, on their device, without gradient; float64 for float64 rewards, else float32.

    Raises:
        TypeError: rewards, mean, std or mask are not such numbers.
        ValueError: a shape or a number that cannot be meant; the message names the one it wants.
    """
    found = real_tensor(rewards, "rewards")
    _check_layout(found, group_size)
    if not (clip > 0 and math.isfinite(weight)):
        raise ValueError(f"clip = {clip} must be above 0 and weight = {weight} finite")
    valid = None if mask is None else _mask(mask, found)
    level, spread = _level(mean, "mean", found), _level(std, "std", found)
    if level is None or spread is None:
        return fused_kernel(found, 0.0, 1.0, clip, 0.0, calibration, valid, impl)
    fused = fused_kernel(found, level, spread, clip, weight, calibration, valid, impl)
    if not isinstance(level, Tensor) and not isinstance(spread, Tensor):
        return fused
    local = fused_kernel(found, 0.0, 1.0, clip, 0.0, calibration, valid, impl)
    known = [t.isfinite() if isinstance(t, Tensor) else torch.ones((), dtype=torch.bool) for t in (level, spread)]
    return torch.where(known[0].to(found.device) & known[1].to(found.device), fused, local)


def _check_layout(rewards: Tensor, group_size: int | None) -> None:
    shape = list(rewards.shape)
    if rewards.ndim == 0 or rewards.numel() == 0:
        raise ValueError(f"rewards {shape}: wants the rewards of one group, [G]")
    if group_size is None and rewards.ndim > 1:
        raise ValueError(
            f"rewards {shape}: wants the rewards of one group, [G]. Several groups: [..., G], members of a group in the last "
            f"dimension, with group_size={shape[-1]}. One row per sample and one column per step ([G, T]): pass one column "
            "and expand the result. Several reward models: fuse each by itself and add"
        )
    if group_size is not None and shape[-1] != group_size:
        raise ValueError(
            f"rewards {shape}: the last dimension must be the {group_size} members of a group; transpose or reshape"
        )
    if shape[-1] < 2:
        raise ValueError(f"rewards {shape}: a group of one has nothing to compare; the last dimension is the group, [..., G]")


def _mask(mask: Any, rewards: Tensor) -> Tensor:
    found = mask.detach() if isinstance(mask, Tensor) else torch.tensor(mask)
    if found.dtype is not torch.bool:
        raise TypeError(f"mask must be bool, True for samples that count; it is {found.dtype}")
    if found.shape != rewards.shape:
        raise ValueError(f"mask {list(found.shape)}: must be shaped as rewards, {list(rewards.shape)}")
    return found.to(rewards.device)


def _level(value: Any, name: str, rewards: Tensor) -> Tensor | float | None:
    """Mean or std of the EMA: a number, a tensor on the rewards' device, or None where there is none yet."""
    if value is None:
        return None
    if not isinstance(value, Tensor):
        found = real_tensor(value, name, torch.float64)
        if found.numel() == 1:
            number = float(found)
            if math.isinf(number) or (name == "std" and number < 0):
                raise ValueError(
                    f"{name} = {number}: must be finite{' and not negative' if name == 'std' else ''}, NaN or None"
                )
            return None if math.isnan(number) else number
        value = found
    found = real_tensor(value, name).to(rewards.device)
    try:
        fits = torch.broadcast_shapes(found.shape, rewards.shape) == rewards.shape
    except RuntimeError:
        fits = False
    if not fits:
        raise ValueError(f"{name} {list(found.shape)}: must be a number or broadcast against rewards, {list(rewards.shape)}")
    return found


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
    scale: Scale = PAPER_SCALE,
) -> RewardAdvantage:
    """Each reward normalised inside its group and against its own EMA, then summed with ``reward_weights``.

    Args:
        rewards: [M, groups, G].
        state: capability of shape [M].
        reward_weights: [M].
        clip, weight, calibration: as in ``fused_advantage``. With weight 0 only scale.std = ``floored`` reads the EMA.
        impl: ``auto``, ``triton`` or ``reference``; None for the environment's.
        scale: of the local part.

    Returns:
        ``RewardAdvantage``; the advantage is 0 where any reward of a sample is not finite.
    """
    found = multi_reward_kernel(
        rewards, state.mean, state.std, state.count, reward_weights, clip, weight, calibration, impl=impl, scale=scale
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
