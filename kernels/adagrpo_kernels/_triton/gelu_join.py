"""Kernel of ``adagrpo_kernels.gelu_join``: one program per token, which reads both parts once and writes them as one row."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .._dispatch import launch
from ..quantize import Quantized
from .rows import INTERPRETED, as_matrix, blocks, row_count, store_row


@triton.jit
def gelu_join_kernel(
    mlp_ptr, first_ptr, out_ptr, scale_ptr, length, numel, mlp_batch_stride, mlp_row_stride, first_batch_stride,
    first_row_stride, FIRST: tl.constexpr, BLOCK: tl.constexpr, ROUND_E4M3: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    batch, token = row // length, row % length
    column = tl.arange(0, BLOCK)
    inside = column < numel
    mlp_at = batch * mlp_batch_stride + token * mlp_row_stride + column - FIRST
    x = tl.load(mlp_ptr + mlp_at, mask=inside & (column >= FIRST), other=0).to(tl.float32)
    u = 0.7978845608028654 * (x + 0.044715 * x * x * x)
    y = x * tl.sigmoid(2.0 * u)
    if FIRST > 0:
        first_at = batch * first_batch_stride + token * first_row_stride + column
        first = tl.load(first_ptr + first_at, mask=column < FIRST, other=0).to(tl.float32)
        y = tl.where(column < FIRST, first, y)
    store_row(y, out_ptr, scale_ptr, row, numel, column, inside, ROUND_E4M3)


def gelu_join(mlp: Tensor, first: Tensor | None, out: Tensor | Quantized) -> None:
    """Launch into ``out``; arguments as in ``adagrpo_kernels.gelu_join``."""
    matrix, length, mlp_batch, mlp_row = as_matrix(mlp)
    other, _, first_batch, first_row = (None, 1, 0, 0) if first is None else as_matrix(first)
    values, scales = out if isinstance(out, Quantized) else (out, None)
    block, warps = blocks(values.shape[-1])
    arguments = {
        "mlp_ptr": matrix, "first_ptr": other, "out_ptr": values, "scale_ptr": scales, "length": length,
        "numel": values.shape[-1], "mlp_batch_stride": mlp_batch, "mlp_row_stride": mlp_row,
        "first_batch_stride": first_batch, "first_row_stride": first_row,
        "FIRST": 0 if first is None else first.shape[-1], "BLOCK": block, "ROUND_E4M3": INTERPRETED,
    }  # fmt: skip
    launch("gelu_join", gelu_join_kernel, (row_count(values),), arguments, warps)
