"""Philox noise on the device: the operations of ``adagrpo_kernels.philox`` in the same order, bit for bit."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._dispatch import launch
from ..philox import COS_COEFFICIENTS, LN2_HIGH, LN2_LOW, LOG_COEFFICIENTS, SIN_COEFFICIENTS, SQRT_HALF_BITS, Draw
from .common import WARPS, round_to, tile

L0, L1, L2, L3, L4, L5, L6, L7, L8 = (tl.constexpr(c) for c in LOG_COEFFICIENTS)
S0, S1, S2 = (tl.constexpr(c) for c in SIN_COEFFICIENTS)
C0, C1, C2 = (tl.constexpr(c) for c in COS_COEFFICIENTS)
LN2_HI, LN2_LO, SQRT_HALF = tl.constexpr(LN2_HIGH), tl.constexpr(LN2_LOW), tl.constexpr(SQRT_HALF_BITS)


@triton.jit
def log_unit(u):
    """Natural logarithm of float32 ``u`` in (0, 1]."""
    bits = u.to(tl.int32, bitcast=True)
    exponent = (bits - SQRT_HALF) >> 23
    f = (bits - (exponent << 23)).to(tl.float32, bitcast=True) - 1.0
    e = exponent.to(tl.float32)
    p = ((((((((f * L8 + L7) * f + L6) * f + L5) * f + L4) * f + L3) * f + L2) * f + L1) * f) + L0
    return (e * LN2_LO + f * f * p) + f + e * LN2_HI


@triton.jit
def box_muller(radius_word, angle_word):
    """Two normal values from two uint32 words."""
    u = (radius_word >> 8).to(tl.int32).to(tl.float32) * 5.9604644775390625e-08 + 2.98023223876953125e-08
    radius = tl.sqrt_rn(-2.0 * log_unit(u))
    turn = (angle_word >> 8).to(tl.int32)
    quadrant = turn >> 22
    t = ((turn & 0x3FFFFF).to(tl.float32) + -2097151.5) * 3.745070282923929e-07
    y = t * t
    sin = t + t * y * ((y * S2 + S1) * y + S0)
    cos = 1.0 - 0.5 * y + y * y * ((y * C2 + C1) * y + C0)
    scaled = radius * 0.7071067811865476
    first = scaled * (cos - sin)
    second = scaled * (cos + sin)
    swap = (quadrant & 1) == 1
    c = tl.where(swap, second, first)
    s = tl.where(swap, first, second)
    return tl.where((quadrant == 1) | (quadrant == 2), -c, c), tl.where(quadrant >= 2, -s, s)


@triton.jit
def normal_tile(seed, row, iteration, tag, first, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Normal float32 [ROWS, BLOCK]: elements ``first`` (a multiple of 4) and following of each row.

    ``row`` and ``tag`` are int64 [ROWS], the others scalars; ``tag`` is stream << 16 | step.
    """
    quads: tl.constexpr = BLOCK // 4
    c0 = (first // 4 + tl.arange(0, quads)).to(tl.int32)[None, :] + tl.zeros([ROWS, 1], tl.int32)
    zero = tl.zeros([ROWS, quads], tl.int32)
    c1 = zero + row.to(tl.int32)[:, None]
    c2 = zero + iteration.to(tl.int32)
    c3 = zero + tag.to(tl.int32)[:, None]
    w0, w1, w2, w3 = tl.philox(seed, c0, c1, c2, c3)
    n0, n1 = box_muller(w0, w1)
    n2, n3 = box_muller(w2, w3)
    return tl.reshape(tl.join(tl.join(n0, n2), tl.join(n1, n3)), [ROWS, BLOCK])


@triton.jit
def philox_normal_kernel(
    out_ptr, seed_ptr, row_ptr, iteration_ptr, step_ptr, rows, numel, step_stride, noise_stream,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    first = tl.program_id(1) * BLOCK
    inside = r < rows
    tag = (noise_stream << 16) | tl.load(step_ptr + r * step_stride, mask=inside, other=0)
    row = tl.load(row_ptr + r, mask=inside, other=0)
    noise = normal_tile(tl.load(seed_ptr), row, tl.load(iteration_ptr), tag, first, ROWS, BLOCK)
    d = first + tl.arange(0, BLOCK)
    noise = round_to(noise, out_ptr.dtype.element_ty)
    at = r.to(tl.int64)[:, None] * numel + d[None, :]
    tl.store(out_ptr + at, noise.to(out_ptr.dtype.element_ty), mask=inside[:, None] & (d < numel)[None, :])


NO_DRAW = {"seed_ptr": None, "row_ptr": None, "iteration_ptr": None, "step_ptr": None, "step_stride": 0, "noise_stream": 0}


def draw_arguments(draw: Draw) -> dict[str, object]:
    """Kernel arguments of a draw whose numbers are on the device."""
    assert isinstance(draw.step, Tensor)
    one = draw.step.numel() == 1
    return {
        "seed_ptr": draw.seed, "row_ptr": draw.rows.contiguous(), "iteration_ptr": draw.iteration, "step_ptr": draw.step,
        "step_stride": 0 if one else draw.step.stride(0), "noise_stream": int(draw.stream),
    }  # fmt: skip


def philox_normal(draw: Draw, numel: int, dtype: torch.dtype) -> Tensor:
    """Launch for a draw whose numbers are on the device: [R, numel]."""
    count = draw.rows.shape[0]
    out = torch.empty(count, numel, dtype=dtype, device=draw.rows.device)
    tile_rows, block, splits = tile(numel)
    arguments = draw_arguments(draw) | {"out_ptr": out, "rows": count, "numel": numel, "ROWS": tile_rows, "BLOCK": block}
    launch("philox", philox_normal_kernel, (triton.cdiv(count, tile_rows), splits if numel else 0), arguments, WARPS)
    return out
