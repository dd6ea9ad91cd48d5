"""Kernel of ``adagrpo_kernels.layer_norm_modulate``: one program per token, which it reads once."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .._dispatch import launch
from ..quantize import Quantized
from .rows import INTERPRETED, as_matrix, blocks, contiguous_rows, row_count, store_row


@triton.jit
def layer_norm_modulate_kernel(
    x_ptr, shift_ptr, mod_scale_ptr, out_ptr, scale_ptr, length, numel, x_batch_stride, x_row_stride, shift_stride,
    mod_scale_stride, EPS: tl.constexpr, BLOCK: tl.constexpr, ROUND_E4M3: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    batch = row // length
    column = tl.arange(0, BLOCK)
    inside = column < numel
    x_at = batch * x_batch_stride + (row % length) * x_row_stride + column
    x = tl.load(x_ptr + x_at, mask=inside, other=0).to(tl.float32)
    shift = tl.load(shift_ptr + batch * shift_stride + column, mask=inside, other=0).to(tl.float32)
    scale = tl.load(mod_scale_ptr + batch * mod_scale_stride + column, mask=inside, other=0).to(tl.float32)
    centred = tl.where(inside, x - tl.sum(x) / numel, 0.0)
    deviation = tl.sqrt_rn(tl.sum(centred * centred) / numel + EPS)
    y = tl.div_rn(centred, deviation) * (1.0 + scale) + shift
    store_row(y, out_ptr, scale_ptr, row, numel, column, inside, ROUND_E4M3)


def layer_norm_modulate(x: Tensor, shift: Tensor, scale: Tensor, eps: float, out: Tensor | Quantized) -> None:
    """Launch into ``out``; arguments as in ``adagrpo_kernels.layer_norm_modulate``."""
    matrix, length, batch_stride, row_stride = as_matrix(x)
    shift, scale = contiguous_rows(shift), contiguous_rows(scale)
    block, warps = blocks(x.shape[-1])
    values, scales = out if isinstance(out, Quantized) else (out, None)
    arguments = {
        "x_ptr": matrix, "shift_ptr": shift, "mod_scale_ptr": scale, "out_ptr": values, "scale_ptr": scales,
        "length": length, "numel": x.shape[-1], "x_batch_stride": batch_stride, "x_row_stride": row_stride,
        "shift_stride": shift.stride(0), "mod_scale_stride": scale.stride(0), "EPS": eps, "BLOCK": block,
        "ROUND_E4M3": INTERPRETED,
    }  # fmt: skip
    launch("layer_norm_modulate", layer_norm_modulate_kernel, (row_count(x),), arguments, warps)
