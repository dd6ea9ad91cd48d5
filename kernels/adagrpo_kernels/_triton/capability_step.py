"""Kernel of ``adagrpo_kernels.capability_step``: EMA, selection, distances and status in one program."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._dispatch import launch
from ..capability_step import MIN_VAR, NO_CANDIDATE, NO_UPDATE
from ..philox import Draw
from .common import MIN_BLOCK, finite
from .philox import NO_DRAW, draw_arguments

TILE = 1024
WARPS = 4
FLOOR, NONE_LEFT, NOT_MOVED = tl.constexpr(MIN_VAR), tl.constexpr(NO_CANDIDATE), tl.constexpr(NO_UPDATE)


@triton.jit
def fold(score_ptr, mean_ptr, var_ptr, count_ptr, new_mean_ptr, new_var_ptr, new_count_ptr, total,
         ALPHA: tl.constexpr, TILE: tl.constexpr):  # fmt: skip
    """Fold one reward's scores [total] into its EMA; returns whether it moved (0 or 1)."""
    dtype: tl.constexpr = mean_ptr.dtype.element_ty
    sums = tl.zeros([TILE], dtype)
    numbers = tl.zeros([TILE], dtype)
    for first in range(0, total, TILE):
        at = first + tl.arange(0, TILE)
        score = tl.load(score_ptr + at, mask=at < total, other=float("inf")).to(dtype)
        sums += tl.where(finite(score), score, 0.0)
        numbers += finite(score).to(dtype)
    number = tl.sum(numbers)
    batch_mean = tl.sum(sums) / tl.maximum(number, 1.0)
    squares = tl.zeros([TILE], dtype)
    for first in range(0, total, TILE):
        at = first + tl.arange(0, TILE)
        score = tl.load(score_ptr + at, mask=at < total, other=float("inf")).to(dtype)
        gap = tl.where(finite(score), score - batch_mean, 0.0)
        squares += gap * gap
    batch_var = tl.sum(squares) / tl.maximum(number, 1.0)
    mean, var, count = tl.load(mean_ptr), tl.load(var_ptr), tl.load(count_ptr)
    moved = number > 0
    memory = tl.where(count > 0, tl.full([], ALPHA, dtype), tl.full([], 0.0, dtype))
    tl.store(new_mean_ptr, tl.where(moved, memory * mean + (1 - memory) * batch_mean, mean))
    tl.store(new_var_ptr, tl.where(moved, memory * var + (1 - memory) * batch_var, var))
    tl.store(new_count_ptr, count + moved.to(tl.int64))
    return moved.to(tl.int32)


@triton.jit
def levels(score_ptr, mean_ptr, var_ptr, weight_ptr, at, mask, number, stride):
    """Level and distance of candidates ``at``: the score itself, or the weighted sums over rewards of z and |z|."""
    dtype: tl.constexpr = mean_ptr.dtype.element_ty
    if weight_ptr is None:
        level = tl.load(score_ptr + at, mask=mask, other=float("inf")).to(dtype)
        distance = tl.abs(level - tl.load(mean_ptr))
    else:
        level = (at * 0).to(dtype)
        distance = level
        for m in range(number):
            score = tl.load(score_ptr + m * stride + at, mask=mask, other=float("inf")).to(dtype)
            z = (score - tl.load(mean_ptr + m)) * (1.0 / tl.sqrt(tl.maximum(tl.load(var_ptr + m), FLOOR)))
            weight = tl.load(weight_ptr + m).to(dtype)
            level += weight * z
            distance += weight * tl.abs(z)
    return level, distance


@triton.jit(do_not_specialize=["number"])  # the kernel of one reward would use stack
def capability_step_kernel(
    score_ptr, mean_ptr, var_ptr, count_ptr, weight_ptr, seed_ptr, row_ptr, iteration_ptr, step_ptr,
    new_mean_ptr, new_var_ptr, new_count_ptr, pick_ptr, distance_ptr, status_ptr,
    number, slots, candidates, score_stride, step_stride, noise_stream,
    ALPHA: tl.constexpr, STRATEGY: tl.constexpr, CANDIDATES: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    dtype: tl.constexpr = mean_ptr.dtype.element_ty
    moved = 0
    for m in range(number):
        moved += fold(
            score_ptr + m * score_stride, mean_ptr + m, var_ptr + m, count_ptr + m, new_mean_ptr + m, new_var_ptr + m,
            new_count_ptr + m, slots * candidates, ALPHA, TILE,
        )  # fmt: skip
    tl.debug_barrier()
    missing = 0
    position = tl.arange(0, CANDIDATES)
    inside = position < candidates
    for slot in range(slots):
        at = slot * candidates + position
        level, distance = levels(score_ptr, new_mean_ptr, new_var_ptr, weight_ptr, at, inside, number, score_stride)
        valid = inside & finite(level)
        found = tl.sum(valid.to(tl.int32))
        if STRATEGY == "closest":
            key = distance
        elif STRATEGY == "easiest":
            key = -level
        elif STRATEGY == "hardest":
            key = level
        elif STRATEGY == "random":
            tag = (noise_stream << 16) | tl.load(step_ptr + slot * step_stride)
            zero = tl.zeros([1], tl.int32)
            row, iteration = tl.load(row_ptr + slot).to(tl.int32), tl.load(iteration_ptr).to(tl.int32)
            word, _, _, _ = tl.philox(tl.load(seed_ptr), zero, zero + row, zero + iteration, zero + tag.to(tl.int32))
            uniform = (word >> 8).to(tl.int32).to(tl.float32) * 5.9604644775390625e-08
            rank = tl.minimum((uniform * found).to(tl.int32), tl.maximum(found - 1, 0))
            key = tl.where(tl.cumsum(valid.to(tl.int32), 0) - 1 == rank, 0.0, 1.0).to(dtype)
        else:
            # Rank of each candidate among the valid ones, the first of equals first: the middle one's level is the median.
            rank = tl.zeros([CANDIDATES], tl.int32)
            for other in range(candidates):
                there, _ = levels(
                    score_ptr, new_mean_ptr, new_var_ptr, weight_ptr, slot * candidates + other + position * 0,
                    inside, number, score_stride,
                )  # fmt: skip
                before = (there < level) | ((there == level) & (other < position))
                rank += (finite(there) & before).to(tl.int32)
            middle = valid & (rank == (found - 1) // 2)
            median = tl.sum(tl.where(middle, level, 0.0))
            key = tl.where(level == median, 0.0, 1.0).to(dtype)
        key = tl.where(valid, key, float("inf"))
        best = tl.min(tl.where(valid & (key == tl.min(key)), position, CANDIDATES))
        gone = found == 0
        nan = tl.full([], float("nan"), dtype)
        chosen = tl.sum(tl.where((position == best) & valid, distance, 0.0))
        tl.store(pick_ptr + slot, tl.where(gone, -1, best).to(tl.int64))
        tl.store(distance_ptr + slot, tl.where(gone, nan, chosen))
        missing += gone.to(tl.int32)
    status = tl.where(missing > 0, NONE_LEFT, 0) + tl.where(moved < number, NOT_MOVED, 0)
    tl.store(status_ptr, status.to(tl.int64))


def capability_step(
    scores: Tensor,
    mean: Tensor,
    var: Tensor,
    count: Tensor,
    alpha: float,
    strategy: str,
    reward_weights: Tensor | None,
    draw: Draw | None,
) -> tuple[Tensor, ...]:
    """Launch; arguments and results as in ``adagrpo_kernels.capability_step``."""
    number, slots, candidates = scores.shape
    new = lambda like, *shape: torch.empty(shape, dtype=like.dtype, device=like.device)  # noqa: E731
    results = (*(new(t, number) for t in (mean, var, count)), new(count, slots), new(mean, slots), new(count))
    names = ("new_mean_ptr", "new_var_ptr", "new_count_ptr", "pick_ptr", "distance_ptr", "status_ptr")
    scores = scores.contiguous()
    arguments: dict[str, Any] = {
        "score_ptr": scores, "mean_ptr": mean.contiguous(), "var_ptr": var.contiguous(), "count_ptr": count.contiguous(),
        "weight_ptr": reward_weights, "number": number, "slots": slots, "candidates": candidates,
        "score_stride": slots * candidates, "ALPHA": float(alpha), "STRATEGY": strategy,
        "CANDIDATES": max(MIN_BLOCK, triton.next_power_of_2(candidates)),
        "TILE": min(TILE, max(MIN_BLOCK, triton.next_power_of_2(slots * candidates))),
        **dict(zip(names, results, strict=True)),
        **(NO_DRAW if draw is None or strategy != "random" else draw_arguments(draw.on_device())),
    }  # fmt: skip
    launch("capability_step", capability_step_kernel, (1,), arguments, WARPS)
    return results
