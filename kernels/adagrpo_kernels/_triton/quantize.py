"""Kernel of ``adagrpo_kernels.quantize``: one program per row, which it reads once."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .._dispatch import launch
from ..quantize import Quantized
from .rows import INTERPRETED, as_matrix, blocks, row_count, store_row


@triton.jit
def quantize_rowwise_kernel(
    x_ptr, out_ptr, scale_ptr, length, numel, x_batch_stride, x_row_stride, BLOCK: tl.constexpr, ROUND_E4M3: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < numel
    x_at = (row // length) * x_batch_stride + (row % length) * x_row_stride + column
    x = tl.load(x_ptr + x_at, mask=inside, other=0).to(tl.float32)
    store_row(x, out_ptr, scale_ptr, row, numel, column, inside, ROUND_E4M3)


def quantize_rowwise(x: Tensor, out: Quantized) -> Quantized:
    """Launch; arguments as in ``adagrpo_kernels.quantize_rowwise``."""
    matrix, length, batch_stride, row_stride = as_matrix(x)
    block, warps = blocks(x.shape[-1])
    arguments = {
        "x_ptr": matrix, "out_ptr": out.values, "scale_ptr": out.scale, "length": length, "numel": x.shape[-1],
        "x_batch_stride": batch_stride, "x_row_stride": row_stride, "BLOCK": block, "ROUND_E4M3": INTERPRETED,
    }  # fmt: skip
    launch("quantize_rowwise", quantize_rowwise_kernel, (row_count(x),), arguments, warps)
    return out
