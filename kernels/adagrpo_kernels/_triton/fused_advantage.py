"""Kernel of ``adagrpo_kernels.fused_advantage``: advantages and statistics of all groups and rewards in one program.

One program is enough for the thousands of rewards an iteration has, makes every sum deterministic, and needs no counter.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._dispatch import launch
from ..fused_advantage import EPS, EQUAL_TOLERANCE, MIN_MASS, STATISTICS, Scale, overall_std
from .common import MIN_BLOCK, finite

TILE = 256
WARPS = 4
TINY, TOLERANCE, MASS = tl.constexpr(EPS), tl.constexpr(EQUAL_TOLERANCE), tl.constexpr(MIN_MASS)
COLUMNS = tl.constexpr(len(STATISTICS))


@triton.jit
def valid_mean(values, valid, count):
    """Mean over the valid members, [groups, 1]."""
    return tl.sum(tl.where(valid, values, 0.0), 1)[:, None] / tl.maximum(count, 1.0)


@triton.jit
def group_facts(rewards, valid):
    """Mean, number of valid members (float), and signal of each group, [groups, 1]."""
    count = tl.sum(valid.to(rewards.dtype), 1)[:, None]
    mean = valid_mean(rewards, valid, count)
    high = tl.max(tl.where(valid, rewards, float("-inf")), 1)[:, None]
    low = tl.min(tl.where(valid, rewards, float("inf")), 1)[:, None]
    signal = (count >= 2) & (high - low > tl.maximum(tl.abs(mean), 1.0) * TOLERANCE)
    return mean, count, signal


@triton.jit
def spread(rewards, valid, mean, count, DDOF: tl.constexpr):
    """Standard deviation of the valid members, [groups, 1]."""
    deviation = tl.where(valid, rewards - mean, 0.0)
    return tl.sqrt(tl.sum(deviation * deviation, 1)[:, None] / tl.maximum(count - DDOF, 1.0))


@triton.jit
def local_part(
    rewards, valid, mean, count, std_ptr, overall_ptr,
    STD: tl.constexpr, DDOF: tl.constexpr, STD_EPS: tl.constexpr, FLOOR: tl.constexpr,
):  # fmt: skip
    """Unclamped deviation from the group's mean over what ``Scale`` divides it by; 0 for invalid members."""
    part = tl.where(valid, rewards - mean, 0.0)
    eps = tl.full([1, 1], STD_EPS, rewards.dtype)
    if STD == "global":
        part = part / (tl.load(overall_ptr).to(rewards.dtype) + eps)
    if STD == "group":
        part = part / (spread(rewards, valid, mean, count, DDOF) + eps)
    if STD == "floored":
        floor = tl.load(std_ptr).to(rewards.dtype) * tl.full([1, 1], FLOOR, rewards.dtype)
        part = part / (spread(rewards, valid, mean, count, DDOF) + floor + eps)
    return part


@triton.jit
def global_part(rewards, valid, count, level, std, CALIBRATION: tl.constexpr):
    """Unclamped advantage against the EMA."""
    z = tl.where(valid, rewards - level, 0.0)
    if CALIBRATION != "none":
        z = z / (std + TINY)
    if CALIBRATION == "zscore_centred":
        z = z - valid_mean(z, valid, count)
    if CALIBRATION == "mass":
        positive = tl.sum(tl.maximum(z, 0.0), 1)[:, None]
        negative = tl.sum(tl.maximum(-z, 0.0), 1)[:, None]
        one_sided = (positive < MASS) | (negative < MASS)
        balanced = tl.where(z > 0, z / tl.maximum(positive, MASS), z / tl.maximum(negative, MASS))
        z = tl.where(one_sided, z - valid_mean(z, valid, count), balanced)
    return z


@triton.jit
def clamp(values, CLIP: tl.constexpr):
    limit = tl.full([1, 1], CLIP, values.dtype)
    return tl.minimum(tl.maximum(values, -limit), limit)


@triton.jit
def sign(values):
    return (values > 0).to(tl.int32) - (values < 0).to(tl.int32)


@triton.jit
def fused_advantage_kernel(
    reward_ptr, mask_ptr, mean_ptr, std_ptr, overall_ptr, count_ptr, weight_ptr, advantage_ptr, statistics_ptr,
    number, groups, size, reward_stride,
    CLIP: tl.constexpr, CLIP_SUM: tl.constexpr, WEIGHT: tl.constexpr, CALIBRATION: tl.constexpr,
    STD: tl.constexpr, DDOF: tl.constexpr, STD_EPS: tl.constexpr, FLOOR: tl.constexpr,
    GROUPS: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    dtype: tl.constexpr = reward_ptr.dtype.element_ty
    member = tl.arange(0, SIZE)[None, :]
    for first in range(0, groups, GROUPS):
        group = first + tl.arange(0, GROUPS)[:, None]
        inside = (group < groups) & (member < size)
        at = group * size + member
        valid = inside
        if mask_ptr is not None:
            valid = valid & (tl.load(mask_ptr + at, mask=inside, other=0) != 0)
        for m in range(number):
            valid = valid & finite(tl.load(reward_ptr + m * reward_stride + at, mask=inside, other=0))
        advantage = tl.zeros([GROUPS, SIZE], dtype)
        for m in range(number):
            rewards = tl.load(reward_ptr + m * reward_stride + at, mask=inside, other=0)
            mean, count, signal = group_facts(rewards, valid)
            part = local_part(
                rewards, valid, mean, count, std_ptr + m, overall_ptr + m, STD, DDOF, STD_EPS, FLOOR,
            )  # fmt: skip
            if not CLIP_SUM:
                part = clamp(part, CLIP)
            if WEIGHT != 0.0:
                level = tl.load(mean_ptr + m).to(dtype)
                above = global_part(rewards, valid, count, level, tl.load(std_ptr + m).to(dtype), CALIBRATION)
                if not CLIP_SUM:
                    above = clamp(above, CLIP)
                part += above * WEIGHT
            part = tl.where(valid & signal, part, 0.0)
            if weight_ptr is not None:
                part = tl.load(weight_ptr + m).to(dtype) * part
            advantage += part
        if CLIP_SUM:
            advantage = clamp(advantage, CLIP)
        tl.store(advantage_ptr + at, advantage, mask=inside)
    if statistics_ptr is not None:
        tl.debug_barrier()
        for m in range(number):
            reward_statistics(
                reward_ptr + m * reward_stride, mean_ptr + m, count_ptr + m, advantage_ptr,
                statistics_ptr + m * COLUMNS, groups, size, GROUPS, SIZE,
            )  # fmt: skip


@triton.jit
def reward_statistics(
    reward_ptr, mean_ptr, count_ptr, advantage_ptr, statistics_ptr, groups, size,
    GROUPS: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """The row of statistics of one reward; sums over tiles in order."""
    dtype: tl.constexpr = reward_ptr.dtype.element_ty
    level = tl.load(mean_ptr).to(dtype)
    known = tl.load(count_ptr) > 0
    member = tl.arange(0, SIZE)[None, :]
    zero = tl.zeros([GROUPS], dtype)
    size_abs, fp, fn, turned, equal, valid_sum, total, there, spreads, spread_number = (
        zero, zero, zero, zero, zero, zero, zero, zero, zero, zero,
    )  # fmt: skip
    for first in range(0, groups, GROUPS):
        group = first + tl.arange(0, GROUPS)[:, None]
        inside = (group < groups) & (member < size)
        at = group * size + member
        rewards = tl.load(reward_ptr + at, mask=inside, other=0)
        advantage = tl.load(advantage_ptr + at, mask=inside, other=0)
        valid = inside & finite(rewards)
        mean, count, signal = group_facts(rewards, valid)
        local = tl.where(valid & signal, rewards - mean, 0.0)  # only its sign is read
        size_abs += tl.sum(tl.abs(advantage), 1)
        fp += tl.sum(((local > 0) & (rewards < level) & known).to(dtype), 1)
        fn += tl.sum(((local < 0) & (rewards > level) & known).to(dtype), 1)
        turned += tl.sum((valid & (sign(local) != sign(advantage))).to(dtype), 1)
        real = (first + tl.arange(0, GROUPS)) < groups
        equal += tl.where(real & (tl.sum(signal.to(tl.int32), 1) == 0), 1.0, 0.0).to(dtype)
        valid_sum += tl.sum(valid.to(dtype), 1)
        number = inside & (rewards == rewards)
        total += tl.sum(tl.where(number, rewards, 0.0), 1)
        there += tl.sum(number.to(dtype), 1)
        whole = real & (tl.sum(valid.to(tl.int32), 1) == size) & (size > 1)
        spreads += tl.where(whole, tl.sum(spread(rewards, valid, mean, count, 1), 1), 0.0)
        spread_number += whole.to(dtype)
    samples = groups * size
    valid_count = tl.sum(valid_sum)
    shares = tl.maximum(valid_count, 1.0)
    tl.store(statistics_ptr + 0, tl.sum(size_abs) / samples)
    tl.store(statistics_ptr + 1, tl.sum(fp) / shares)
    tl.store(statistics_ptr + 2, tl.sum(fn) / shares)
    tl.store(statistics_ptr + 3, tl.sum(turned) / shares)
    tl.store(statistics_ptr + 4, tl.sum(equal) / groups)
    tl.store(statistics_ptr + 5, (samples - valid_count) / samples)
    tl.store(statistics_ptr + 6, tl.sum(total) / tl.sum(there))
    tl.store(statistics_ptr + 7, tl.sum(spreads) / tl.sum(spread_number))


def fused_advantage(
    rewards: Tensor,
    mean: Tensor,
    std: Tensor,
    count: Tensor | None,
    reward_weights: Tensor | None,
    clip: float,
    weight: float,
    calibration: str,
    mask: Tensor | None,
    scale: Scale,
    with_statistics: bool,
) -> tuple[Tensor, Tensor]:
    """Launch on rewards [M, ..., G]: advantage [..., G] and statistics [M, 8] (empty unless asked for)."""
    number, size = rewards.shape[0], rewards.shape[-1]
    flat = rewards.reshape(number, -1)
    flat = flat if flat.stride(1) == 1 or flat.shape[1] <= 1 else flat.contiguous()
    advantage = torch.empty(rewards.shape[1:], dtype=rewards.dtype, device=rewards.device)
    statistics = torch.empty(number, len(STATISTICS), dtype=rewards.dtype, device=rewards.device)
    block = max(MIN_BLOCK, triton.next_power_of_2(size))
    groups = flat.shape[1] // max(size, 1)
    overall = std  # read for scale.std = global only
    if scale.std == "global":
        valid = rewards.isfinite().all(0)
        valid = valid if mask is None else valid & mask
        overall = overall_std(rewards, valid.expand_as(rewards), scale.ddof).flatten()
    arguments: dict[str, Any] = {
        "reward_ptr": flat, "mask_ptr": None if mask is None else mask.expand(rewards.shape[1:]).contiguous(),
        "mean_ptr": mean.contiguous(), "std_ptr": std.contiguous(), "overall_ptr": overall.contiguous(),
        "count_ptr": count, "weight_ptr": reward_weights,
        "advantage_ptr": advantage, "statistics_ptr": statistics if with_statistics else None, "number": number,
        "groups": groups, "size": size, "reward_stride": flat.stride(0), "CLIP": float(clip),
        "CLIP_SUM": scale.clip_sum, "WEIGHT": float(weight), "CALIBRATION": calibration, "STD": scale.std, "DDOF": scale.ddof,
        "STD_EPS": float(scale.eps), "FLOOR": float(scale.floor), "GROUPS": max(1, TILE // block), "SIZE": block,
    }  # fmt: skip
    launch("fused_advantage", fused_advantage_kernel, (1 if groups * size else 0,), arguments, WARPS)
    return advantage, statistics if with_statistics else statistics[:0]
