"""Cross-level advantage fusion (AdaGRPO section 3): inside the group, plus against the policy's own reward level.

- local:  ``(R - mean_G) / (std_G + 1e-8)``, std with ddof 1
- global: ``z = (R - mean) / (std + 1e-8)`` against the capability EMA, then calibrated
- fused:  ``local + weight * global``, both clamped to ±clip before

Calibrations of the global part: ``mass`` (the paper's: positive z divided by their sum, negative z by theirs; centred z
when one side is empty), ``zscore`` (z), ``zscore_centred`` (z - mean(z)), ``none`` (R - mean, in units of the reward).

A group whose valid rewards are all equal carries no signal and gets exactly 0 everywhere: max - min is compared with
``1e-6 * max(1, |mean|)``, since rounding of the mean would otherwise become an advantage of ±clip. So does a group with
fewer than two valid (finite, unmasked) rewards, and every invalid reward.
"""

from __future__ import annotations

import torch
from torch import Tensor

CALIBRATIONS = ("mass", "zscore", "zscore_centred", "none")
EPS = 1e-8
EQUAL_TOLERANCE = 1e-6
MIN_MASS = 1e-6


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


def local_advantage_reference(rewards: Tensor, clip: float, mask: Tensor | None = None) -> Tensor:
    """Advantage inside the group.

    Args:
        rewards: [..., G], floating; non-finite entries are failed samples.
        clip: clamp to ±clip, above 0.
        mask: optional bool [..., G], False for samples to ignore.

    Returns:
        [..., G] in the dtype of ``rewards``.
    """
    valid = valid_rewards(rewards, mask)
    count = valid.sum(-1, keepdim=True)
    deviation = (rewards - _mean(rewards, valid)).masked_fill(~valid, 0)
    std = (deviation.square().sum(-1, keepdim=True) / (count - 1).clamp_min(1)).sqrt()
    advantage = (deviation / (std + EPS)).clamp(-clip, clip)
    return advantage.masked_fill(~(valid & has_signal(rewards, valid)), 0)


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
    if calibration not in CALIBRATIONS:
        raise ValueError(f"unknown calibration {calibration!r}: one of {', '.join(CALIBRATIONS)}")
    valid = valid_rewards(rewards, mask)
    mean, std = (t.to(rewards.dtype) if isinstance(t, Tensor) else t for t in (mean, std))
    difference = (rewards - mean).masked_fill(~valid, 0)
    z = difference if calibration == "none" else difference / (std + EPS)
    if calibration in ("mass", "zscore_centred"):
        centred = z - _mean(z, valid)
        z = centred if calibration == "zscore_centred" else _mass_calibrated(z, centred)
    advantage = z.clamp(-clip, clip)
    return advantage.masked_fill(~(valid & has_signal(rewards, valid)), 0)


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


def _mean(values: Tensor, valid: Tensor) -> Tensor:
    total = values.masked_fill(~valid, 0).sum(-1, keepdim=True)
    return total / valid.sum(-1, keepdim=True).clamp_min(1)


def _mass_calibrated(z: Tensor, centred: Tensor) -> Tensor:
    positive = z.clamp_min(0).sum(-1, keepdim=True)
    negative = (-z).clamp_min(0).sum(-1, keepdim=True)
    one_sided = (positive < MIN_MASS) | (negative < MIN_MASS)
    balanced = torch.where(z > 0, z / positive.clamp_min(MIN_MASS), z / negative.clamp_min(MIN_MASS))
    return torch.where(one_sided, centred, balanced)
