"""Kernel of ``adagrpo_kernels.sde_step``: one pass over latents and velocities, whatever each row's step."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._dispatch import launch
from ..philox import Draw
from ..step_table import StepTable
from .common import WARPS, arrival_counter, as_rows, round_to, tile
from .philox import NO_DRAW, draw_arguments, normal_tile


@triton.jit
def column(ptr, k, inside):
    """float32 [ROWS, 1]: a column of the step table at rows ``k``."""
    return tl.load(ptr + k, mask=inside, other=0).to(tl.float32)[:, None]


@triton.jit
def ordered_sum(partial_ptr, row, splits):
    """Sum of one row's partial sums in index order."""
    total = 0.0
    for s in range(splits):
        total += tl.load(partial_ptr + row * splits + s, cache_modifier=".cg")
    return total


@triton.jit
def sde_step_kernel(
    x_ptr, v_ptr, unconditional_ptr, guidance_ptr, noise_ptr, previous_ptr, history_ptr, index_ptr, source_ptr,
    a_ptr, b_ptr, w_ptr, scale_ptr, const_ptr, sigma_ptr, seed_ptr, row_ptr, iteration_ptr, step_ptr,
    next_ptr, mean_ptr, clean_ptr, logp_ptr, partial_ptr, arrived_ptr,
    rows, numel, splits, x_stride, v_stride, unconditional_stride, guidance_stride, noise_stride, previous_stride,
    step_stride, noise_stream, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    first = tl.program_id(1) * BLOCK
    d = first + tl.arange(0, BLOCK)
    inside = r < rows
    mask = inside[:, None] & (d < numel)[None, :]
    wide = r.to(tl.int64)
    index = tl.load(index_ptr + r, mask=inside, other=-1)
    k = tl.maximum(index, 0)
    if source_ptr is not None:  # noqa: SIM108
        from_row = tl.load(source_ptr + r, mask=inside, other=0)
    else:
        from_row = wide
    x = tl.load(x_ptr + from_row[:, None] * x_stride + d[None, :], mask=mask, other=0).to(tl.float32)
    v = tl.load(v_ptr + from_row[:, None] * v_stride + d[None, :], mask=mask, other=0).to(tl.float32)
    if unconditional_ptr is not None:
        u_at = unconditional_ptr + from_row[:, None] * unconditional_stride + d[None, :]
        u = tl.load(u_at, mask=mask, other=0).to(tl.float32)
        v = u + column(guidance_ptr, from_row * guidance_stride, inside) * (v - u)
    mean = column(a_ptr, k, inside) * x + column(b_ptr, k, inside) * v
    if previous_ptr is not None:
        previous_at = previous_ptr + wide[:, None] * previous_stride + d[None, :]
        mean = mean + column(history_ptr, k, inside) * tl.load(previous_at, mask=mask, other=0).to(tl.float32)
    finished = (index < 0)[:, None]
    mean = tl.where(finished, x, mean)
    sample = mean
    if noise_ptr is not None:
        noise = tl.load(noise_ptr + wide[:, None] * noise_stride + d[None, :], mask=mask, other=0).to(tl.float32)
        sample = tl.where(finished, mean, mean + column(w_ptr, k, inside) * noise)
    if seed_ptr is not None:
        tag = (noise_stream << 16) | tl.load(step_ptr + r * step_stride, mask=inside, other=0)
        row = tl.load(row_ptr + r, mask=inside, other=0)
        noise = normal_tile(tl.load(seed_ptr), row, tl.load(iteration_ptr), tag, first, ROWS, BLOCK)
        sample = tl.where(finished, mean, mean + column(w_ptr, k, inside) * noise)
    rounded = round_to(sample, next_ptr.dtype.element_ty)
    out = wide[:, None] * numel + d[None, :]
    tl.store(next_ptr + out, rounded.to(next_ptr.dtype.element_ty), mask=mask)
    if mean_ptr is not None:
        tl.store(mean_ptr + out, mean, mask=mask)
    if clean_ptr is not None:
        clean = tl.where(finished, mean, x - column(sigma_ptr, k, inside) * v)
        tl.store(clean_ptr + out, clean, mask=mask)
    square = tl.where(mask, (rounded - mean) * (rounded - mean), 0.0)
    if partial_ptr is None:
        scale = column(scale_ptr, k, inside)
        logp = column(const_ptr, k, inside) - scale * (tl.sum(square, 1) / numel)[:, None]
        tl.store(logp_ptr + r[:, None], tl.where(finished | (scale <= 0), 0.0, logp), mask=inside[:, None])
    else:
        # Split rows have one row per program. The last program to arrive adds the sums in index order.
        one = tl.program_id(0)
        tl.store(partial_ptr + one * splits + tl.program_id(1), tl.sum(square))
        tl.debug_barrier()
        if tl.atomic_add(arrived_ptr + one, 1, sem="acq_rel") == splits - 1:
            at = tl.load(index_ptr + one)
            step = tl.maximum(at, 0)
            mean_square = ordered_sum(partial_ptr, one, splits) / numel
            scale = tl.load(scale_ptr + step).to(tl.float32)
            logp = tl.load(const_ptr + step).to(tl.float32) - scale * mean_square
            tl.store(logp_ptr + one, tl.where((at < 0) | (scale <= 0), 0.0, logp))


def row_argument(name: str, x: Tensor | None) -> dict[str, object]:
    """Pointer and row stride of an optional [R, ...] tensor."""
    flat = None if x is None else as_rows(x)
    return {f"{name}_ptr": flat, f"{name}_stride": 0 if flat is None else flat.stride(0)}


def sde_step(
    x: Tensor,
    v: Tensor,
    table: StepTable,
    index: Tensor,
    noise: Tensor | Draw | None,
    source: Tensor | None,
    guidance: Sequence[Tensor] | None,
    history: Sequence[Tensor] | None,
    with_mean: bool,
    with_clean: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Launch; arguments and results as in ``adagrpo_kernels.sde_step``, ``mean`` empty unless asked for."""
    rows, shape, wide = index.shape[0], (index.shape[0], *x.shape[1:]), torch.float32
    new = lambda dtype: torch.empty(shape, dtype=dtype, device=x.device)  # noqa: E731
    following, mean, clean = new(x.dtype), new(wide) if with_mean else None, new(wide) if with_clean else None
    logp = torch.empty(rows, dtype=wide, device=x.device)
    numel = following[:1].numel() if rows else x.shape[1:].numel()
    tile_rows, block, splits = tile(numel)
    partial, arrived = arrival_counter(rows, splits, x)
    unconditional, scale = guidance or (None, None)
    previous, weight = history or (None, None)
    draw = draw_arguments(noise.on_device()) if isinstance(noise, Draw) else NO_DRAW
    arguments = {
        **row_argument("x", x), **row_argument("v", v), **row_argument("unconditional", unconditional),
        **row_argument("noise", None if isinstance(noise, Draw) else noise), **row_argument("previous", previous),
        "guidance_ptr": scale, "guidance_stride": scale.stride(0) if scale is not None and scale.numel() > 1 else 0,
        "history_ptr": weight, "index_ptr": index.contiguous(), "source_ptr": source,
        "a_ptr": table.a, "b_ptr": table.b, "w_ptr": table.w, "scale_ptr": table.logp_scale,
        "const_ptr": table.logp_const, "sigma_ptr": table.sigma, **draw,
        "next_ptr": following, "mean_ptr": mean, "clean_ptr": clean, "logp_ptr": logp,
        "partial_ptr": partial, "arrived_ptr": arrived,
        "rows": rows, "numel": numel, "splits": splits, "ROWS": tile_rows, "BLOCK": block,
    }  # fmt: skip
    launch("sde_step", sde_step_kernel, (triton.cdiv(rows, tile_rows), splits), arguments, WARPS)
    return following, new(wide)[:0] if mean is None else mean, logp, clean
