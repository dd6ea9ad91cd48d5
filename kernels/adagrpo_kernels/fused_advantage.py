"""Cross-level advantage fusion (AdaGRPO section 3): inside the group, plus against the policy's own reward level.

- local:  ``(R - mean_G) / (std_G + 1e-8)``, std with ddof 1
- global: ``z = (R - mean) / (std + 1e-8)`` against the capability EMA, then calibrated
- fused:  ``local + weight * global``, both clamped to ±clip before

Calibrations of the global part: ``mass`` (the paper's: positive z divided by their sum, negative z by theirs; centred z
when one side is empty), ``zscore`` (z), ``zscore_centred`` (z - mean(z)), ``none`` (R - mean, in units of the reward).

What a deviation is divided by is the recipe's (``Scale``): hosts differ in the deviation's ddof and epsilon, and in whose
rewards it is taken over.

A group whose valid rewards are all equal carries no signal and gets exactly 0 everywhere: max - min is compared with
``1e-6 * max(1, |mean|)``, since rounding of the mean would otherwise become an advantage of ±clip. So does a group with
fewer than two valid (finite, unmasked) rewards, and every invalid reward.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ._dispatch import run

STD_MODES = ("group", "global", "floored", "none")
CALIBRATIONS = ("mass", "zscore", "zscore_centred", "none")
EPS = 1e-8
EQUAL_TOLERANCE = 1e-6
MIN_MASS = 1e-6
STATISTICS = (
    "mean_abs", "false_positive", "false_negative", "turned", "equal_groups", "failed", "reward_mean", "group_std",
)  # fmt: skip


class Scale(NamedTuple):
    """What the local advantage divides the deviation from the group's mean by, and what is clamped.

    Attributes:
        std: ``group``: ``std_G + eps``; ``global``: ``std_all + eps``, over all valid rewards of the reward model (Flow-GRPO's
            ``global_std``); ``floored``: ``std_G + floor*std_EMA + eps``; ``none``: 1.
        ddof: of std_G and std_all, 0 or 1.
        eps: see ``std``; Flow-GRPO 1e-4 with ddof 0, DanceGRPO, MixGRPO, G2RPO and AdaGRPO 1e-8 with ddof 1.
        floor: share of the EMA's std that stands below every group's own.
        clip_sum: clamp the weighted sum over parts and reward models, as DanceGRPO, MixGRPO and G2RPO do, instead of each part.
    """

    std: str = "group"
    ddof: int = 1
    eps: float = EPS
    floor: float = 0.5
    clip_sum: bool = False


PAPER_SCALE = Scale()


class MultiRewardAdvantage(NamedTuple):
    """Result of ``multi_reward_advantage``.

    Attributes:
        advantage: [..., G] in the dtype of the rewards.
        statistics: [M, 8], the columns ``STATISTICS`` of each reward; meaning: ``advantage_statistics_reference``
            and ``reward_statistics_reference``.
    """

    advantage: Tensor
    statistics: Tensor


def valid_rewards(rewards: Tensor, mask: Tensor | None = None) -> Tensor:
    """bool [..., G]: finite and not masked out."""
    valid = rewards.isfinite()
    return valid if mask is None else valid & mask


def has_signal(rewards: Tensor, valid: Tensor) -> Tensor:
    """bool [..., 1]: at least two valid rewards, and they differ by more than rounding."""
    high = rewards.masked_fill(~valid, -torch.inf).amax(-1, keepdim=True)
    low = rewards.masked_fill(~valid, torch.inf).amin(-1, keepdim=True)
    level = _mean(rewards, valid).abs().clamp_min(1.0)
    return (valid.sum(-1, keepdim=True) >= 2) & (high - low > EQUAL_TOLERANCE * level)


def local_advantage_reference(
    rewards: Tensor, clip: float, mask: Tensor | None = None, scale: Scale = PAPER_SCALE, level_std: Tensor | float = 0.0
) -> Tensor:
    """Advantage inside the group.

    Args:
        rewards: [..., G], floating; non-finite entries are failed samples. With scale.std = ``global`` [M, ..., G].
        clip: clamp to ±clip, above 0.
        mask: optional bool [..., G], False for samples to ignore.
        scale: what deviations are divided by.
        level_std: std of the EMA, for scale.std = ``floored``; broadcasts against ``rewards``.

    Returns:
        [..., G] in the dtype of ``rewards``.
    """
    _check_known("std", scale.std, STD_MODES)
    valid = valid_rewards(rewards, mask)
    deviation = (rewards - _mean(rewards, valid)).masked_fill(~valid, 0)
    if scale.std != "none":
        std = overall_std(rewards, valid, scale.ddof) if scale.std == "global" else _std(rewards, valid, scale.ddof)
        floor = scale.floor * level_std if scale.std == "floored" else 0
        deviation = deviation / (std + floor + scale.eps)
    advantage = deviation.clamp(-clip, clip)
    return advantage.masked_fill(~(valid & has_signal(rewards, valid)), 0)


def overall_std(rewards: Tensor, valid: Tensor, ddof: int) -> Tensor:
    """Standard deviation of all valid rewards [M, ..., G] of each model: [M, 1, ..., 1]."""
    per_reward = [-1] + [1] * (rewards.ndim - 1)
    return _std(rewards.flatten(1), valid.flatten(1), ddof).reshape(per_reward)


def global_advantage_reference(
    rewards: Tensor,
    mean: Tensor | float,
    std: Tensor | float,
    clip: float,
    calibration: str = "mass",
    mask: Tensor | None = None,
) -> Tensor:
    """Advantage against the capability EMA; see the module docstring for the calibrations.

    Args:
        rewards: [..., G], floating.
        mean, std: of the EMA, in units of the reward; numbers or tensors that broadcast against ``rewards``.
        clip: clamp to ±clip.
        calibration: one of ``CALIBRATIONS``.
        mask: optional bool [..., G].

    Returns:
        [..., G] in the dtype of ``rewards``.
    """
    _check_known("calibration", calibration, CALIBRATIONS)
    valid = valid_rewards(rewards, mask)
    mean, std = (t.to(rewards.dtype) if isinstance(t, Tensor) else t for t in (mean, std))
    difference = (rewards - mean).masked_fill(~valid, 0)
    z = difference if calibration == "none" else difference / (std + EPS)
    if calibration in ("mass", "zscore_centred"):
        centred = z - _mean(z, valid)
        z = centred if calibration == "zscore_centred" else _mass_calibrated(z, centred)
    advantage = z.clamp(-clip, clip)
    return advantage.masked_fill(~(valid & has_signal(rewards, valid)), 0)


def fused_advantage(
    rewards: Tensor,
    mean: Tensor | float,
    std: Tensor | float,
    clip: float = 5.0,
    weight: float = 1.0,
    calibration: str = "mass",
    mask: Tensor | None = None,
    impl: str | None = None,
) -> Tensor:
    """``fused_advantage_reference`` by the chosen implementation.

    Args:
        impl: see ``adagrpo_kernels._dispatch``. The kernel takes one mean and one std for all rewards.
    """
    _check_known("calibration", calibration, CALIBRATIONS)
    levels = [t for t in (mean, std) if isinstance(t, Tensor)]
    problem = _kernel_problem(rewards) or (None if all(t.numel() == 1 for t in levels) else "it takes one mean and one std")

    def kernel() -> Tensor:
        from ._triton import fused_advantage

        level, spread, one = _vector(mean, rewards), _vector(std, rewards), rewards.unsqueeze(0)
        return fused_advantage.fused_advantage(
            one, level, spread, None, None, clip, weight, calibration, mask, PAPER_SCALE, False
        )[0]

    reference = lambda: fused_advantage_reference(rewards, mean, std, clip, weight, calibration, mask)  # noqa: E731
    return run("fused_advantage", impl, [rewards, *levels, mask], kernel, reference, problem)


def multi_reward_advantage(
    rewards: Tensor,
    mean: Tensor,
    std: Tensor,
    count: Tensor,
    reward_weights: Tensor,
    clip: float = 5.0,
    weight: float = 1.0,
    calibration: str = "mass",
    mask: Tensor | None = None,
    impl: str | None = None,
    scale: Scale = PAPER_SCALE,
) -> MultiRewardAdvantage:
    """``multi_reward_advantage_reference`` by the chosen implementation; the kernel is one launch.

    Args:
        impl: see ``adagrpo_kernels._dispatch``. The kernel takes float32 and float64 rewards, computes in their dtype, and
            adds in another order than the reference.
    """
    _check_known("calibration", calibration, CALIBRATIONS)
    tensors = [rewards, mean, std, count, reward_weights, mask]
    arguments = (rewards, mean, std, count, reward_weights, clip, weight, calibration, mask, scale)

    def kernel() -> MultiRewardAdvantage:
        from ._triton import fused_advantage

        return MultiRewardAdvantage(*fused_advantage.fused_advantage(*arguments, True))

    reference = lambda: multi_reward_advantage_reference(*arguments)  # noqa: E731
    return run("fused_advantage", impl, tensors, kernel, reference, _kernel_problem(rewards))


def multi_reward_advantage_reference(
    rewards: Tensor,
    mean: Tensor,
    std: Tensor,
    count: Tensor,
    reward_weights: Tensor,
    clip: float = 5.0,
    weight: float = 1.0,
    calibration: str = "mass",
    mask: Tensor | None = None,
    scale: Scale = PAPER_SCALE,
) -> MultiRewardAdvantage:
    """Each reward normalised inside its group and against its own EMA, then summed with ``reward_weights``.

    Args:
        rewards: [M, ..., G], e.g. [M rewards, P slots, S steps, G].
        mean, std, count: [M], capability EMA of each reward; count 0 means that it is empty.
        reward_weights: [M].
        clip, weight, calibration: as in ``fused_advantage``. With weight 0 the EMA's mean is not used, and its std is by
            scale.std = ``floored`` only.
        mask: optional bool [..., G], False for samples to ignore in the advantages.
        scale: of the local part.

    Returns:
        ``MultiRewardAdvantage``; the advantage is 0 where a sample is masked or any of its rewards is not finite.
    """
    valid = rewards.isfinite().all(0)
    valid = (valid if mask is None else valid & mask).expand_as(rewards)
    per_reward = [-1] + [1] * (rewards.ndim - 1)
    level, spread = (t.to(rewards.dtype).reshape(per_reward) for t in (mean, std))
    limit = math.inf if scale.clip_sum else clip
    parts = local_advantage_reference(rewards, limit, valid, scale, spread)
    if weight != 0:
        parts = parts + weight * global_advantage_reference(rewards, level, spread, limit, calibration, valid)
    advantage = (reward_weights.to(parts.dtype).reshape(per_reward) * parts).sum(0)
    if scale.clip_sum:
        advantage = advantage.clamp(-clip, clip)
    found = [
        advantage_statistics_reference(r, advantage, m, c) | reward_statistics_reference(r)
        for r, m, c in zip(rewards, mean, count, strict=True)
    ]
    columns = [torch.stack([each[name].to(rewards.dtype) for name in STATISTICS]) for each in found]
    return MultiRewardAdvantage(advantage, torch.stack(columns))


def advantage_statistics_reference(rewards: Tensor, advantage: Tensor, mean: Tensor, count: Tensor) -> dict[str, Tensor]:
    """What fusion did to one reward's groups, as 0-dim tensors.

    Shares of the valid samples: ``false_positive``, better than the group but below the policy's level, ``false_negative``,
    the reverse (AdaGRPO section 3; 0 while the EMA is empty), ``turned``, whose sign the fusion changed. Share of all
    samples: ``failed``. Share of the groups: ``equal_groups``. ``mean_abs`` is the mean magnitude of the advantages.

    Args:
        rewards, advantage: [..., G].
        mean, count: 0-dim, capability EMA of this reward.
    """
    valid = valid_rewards(rewards)
    local = local_advantage_reference(rewards, torch.inf)
    level = mean.to(rewards.dtype)
    share = lambda condition: (condition & valid).sum() / valid.sum().clamp_min(1)  # noqa: E731
    known = count > 0
    return {
        "mean_abs": advantage.abs().mean(),
        "false_positive": share((local > 0) & (rewards < level) & known),
        "false_negative": share((local < 0) & (rewards > level) & known),
        "turned": share(local.sign() != advantage.sign()),
        "equal_groups": (~has_signal(rewards, valid)).to(rewards.dtype).mean(),
        "failed": (~valid).to(rewards.dtype).mean(),
    }


def reward_statistics_reference(rewards: Tensor) -> dict[str, Tensor]:
    """``reward_mean`` of rewards [..., G] but NaN, and ``group_std`` (ddof 1), the mean over groups where it is finite."""
    return {"reward_mean": rewards.nanmean(), "group_std": rewards.std(-1).nanmean()}


def fused_advantage_reference(
    rewards: Tensor,
    mean: Tensor | float,
    std: Tensor | float,
    clip: float = 5.0,
    weight: float = 1.0,
    calibration: str = "mass",
    mask: Tensor | None = None,
) -> Tensor:
    """``local + weight * global`` on rewards [..., G]; arguments as in the two parts."""
    local = local_advantage_reference(rewards, clip, mask)
    return local + weight * global_advantage_reference(rewards, mean, std, clip, calibration, mask)


def _check_known(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(f"unknown {name} {value!r}: one of {', '.join(known)}")


def _kernel_problem(rewards: Tensor) -> str | None:
    return None if rewards.dtype in (torch.float32, torch.float64) else f"it does not take {rewards.dtype} rewards"


def _vector(value: Tensor | float, like: Tensor) -> Tensor:
    if isinstance(value, Tensor):
        return value.reshape(1)
    return torch.full((1,), value, dtype=torch.float64, device=like.device)


def _mean(values: Tensor, valid: Tensor) -> Tensor:
    total = values.masked_fill(~valid, 0).sum(-1, keepdim=True)
    return total / valid.sum(-1, keepdim=True).clamp_min(1)


def _std(values: Tensor, valid: Tensor, ddof: int) -> Tensor:
    deviation = (values - _mean(values, valid)).masked_fill(~valid, 0)
    count = valid.sum(-1, keepdim=True)
    return (deviation.square().sum(-1, keepdim=True) / (count - ddof).clamp_min(1)).sqrt()


def _mass_calibrated(z: Tensor, centred: Tensor) -> Tensor:
    positive = z.clamp_min(0).sum(-1, keepdim=True)
    negative = (-z).clamp_min(0).sum(-1, keepdim=True)
    one_sided = (positive < MIN_MASS) | (negative < MIN_MASS)
    balanced = torch.where(z > 0, z / positive.clamp_min(MIN_MASS), z / negative.clamp_min(MIN_MASS))
    return torch.where(one_sided, centred, balanced)
