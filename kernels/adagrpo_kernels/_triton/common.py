"""Device functions and launch geometry shared by the kernels."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 2048
WARPS = 8
MIN_BLOCK = 16


@triton.jit
def round_to(x, dtype: tl.constexpr):
    """``adagrpo_kernels.rounding.round_to_storage`` of a float32 block; returns float32."""
    if dtype == tl.float32:
        rounded = x
    elif dtype == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000).to(tl.float32, bitcast=True)
    else:
        tl.static_assert(dtype == tl.float16, "storage is float32, bfloat16 or float16")
        bits = x.to(tl.int32, bitcast=True)
        sign = bits & -0x80000000
        rounded = ((bits + 0xFFF + ((bits >> 13) & 1)) & -0x2000).to(tl.float32, bitcast=True)
        infinite = (sign | 0x7F800000).to(tl.float32, bitcast=True)
        rounded = tl.where(tl.abs(rounded) > 65504.0, infinite, rounded)
        tiny = (tl.abs(x) + 0.5) - 0.5
        tiny = (tiny.to(tl.int32, bitcast=True) | sign).to(tl.float32, bitcast=True)
        rounded = tl.where(tl.abs(x) < 6.103515625e-05, tiny, rounded)
    return tl.where(x != x, x, rounded)


@triton.jit
def finite(values):
    """Neither NaN nor infinite."""
    return tl.abs(values) < float("inf")


def tile(numel: int) -> tuple[int, int, int]:
    """(rows per program, elements per program and row, programs per row) for rows of ``numel`` elements.

    A function of ``numel`` alone, so that a row's sums never depend on how many rows share the call.
    """
    block = min(BLOCK, max(MIN_BLOCK, triton.next_power_of_2(numel)))
    return (BLOCK // block, block, 1) if numel <= block else (1, block, triton.cdiv(numel, block))


def as_rows(x: Tensor) -> Tensor:
    """``x`` [R, ...] as [R, D] with adjacent elements; a copy only where the rows are not contiguous."""
    flat = x.reshape(x.shape[0], x.shape[1:].numel())
    return flat if flat.stride(1) == 1 or flat.shape[1] <= 1 else flat.contiguous()


def arrival_counter(rows: int, splits: int, like: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """Partial sums float32 [rows, splits] and a zeroed arrival counter int32 [rows]; None for unsplit rows."""
    if splits == 1:
        return None, None
    partial = torch.empty(rows, splits, dtype=torch.float32, device=like.device)
    return partial, torch.zeros(rows, dtype=torch.int32, device=like.device)
