"""Kernels that take one row of a matrix product's input per program: quantise, normalise and modulate, activate and join."""

from __future__ import annotations

import os

import triton
import triton.language as tl
from torch import Tensor

from .common import MIN_BLOCK, finite, round_to

# The interpreter's cast to e4m3 is wrong at ties, carries and overflow; the values are then rounded by integers before it.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@triton.jit
def round_e4m3(x):
    """The e4m3 number nearest to each float32 of magnitude at most 448, ties to even; returns float32."""
    bits = x.to(tl.int32, bitcast=True)
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) & -0x100000).to(tl.float32, bitcast=True)
    # Below 2**-6 the grid is uniform, 2**-9: float32's own grid in [2**14, 2**15).
    tiny = (tl.abs(x) + 16384.0) - 16384.0
    tiny = (tiny.to(tl.int32, bitcast=True) | (bits & -0x80000000)).to(tl.float32, bitcast=True)
    return tl.where(x != x, x, tl.where(tl.abs(x) < 0.015625, tiny, normal))


@triton.jit
def store_row(y, out_ptr, scale_ptr, row, numel, column, inside, ROUND_E4M3: tl.constexpr):
    """Store a float32 row: quantised with its scale, or rounded to the storage dtype where ``scale_ptr`` is None."""
    at = row * numel + column
    if scale_ptr is None:
        tl.store(out_ptr + at, round_to(y, out_ptr.dtype.element_ty).to(out_ptr.dtype.element_ty), mask=inside)
    else:
        amax = tl.maximum(tl.max(tl.where(inside, tl.abs(y), 0.0)), 1e-12)
        bad = tl.max(tl.where(inside & (finite(y) == 0), 1, 0))
        amax = tl.where(bad > 0, float("nan"), amax)
        scaled = y * tl.div_rn(448.0, amax)
        if ROUND_E4M3:
            scaled = round_e4m3(scaled)
        tl.store(out_ptr + at, scaled.to(tl.float8e4nv), mask=inside)
        tl.store(scale_ptr + row, tl.div_rn(amax, 448.0))


def blocks(columns: int) -> tuple[int, int]:
    """(columns per program, warps): at most 32 values per thread."""
    block = max(MIN_BLOCK, triton.next_power_of_2(columns))
    return block, max(1, min(16, block // 512))


def as_matrix(x: Tensor) -> tuple[Tensor, int, int, int]:
    """``x`` [..., K] as (tensor, rows per batch, batch stride, row stride); a copy only for layouts that need more strides."""
    if x.stride(-1) != 1 and x.shape[-1] > 1:
        x = x.contiguous()
    if x.ndim > 3:
        x = x.flatten(0, -3)
    if x.ndim < 3:
        rows = x.shape[0] if x.ndim == 2 else 1
        return x, max(rows, 1), 0, x.stride(0) if x.ndim == 2 else 0
    return x, max(x.shape[1], 1), x.stride(0), x.stride(1)


def row_count(x: Tensor) -> int:
    """Rows of ``x`` [..., K]; 0 without columns."""
    return x.shape[:-1].numel() if x.shape[-1] else 0


def contiguous_rows(t: Tensor) -> Tensor:
    """``t`` [B, D] with adjacent channels."""
    return t if t.stride(-1) == 1 or t.shape[-1] <= 1 else t.contiguous()
