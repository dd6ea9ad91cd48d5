"""FP8 quantisation of matrix-product inputs: e4m3 values and one float32 scale per row, or one per tensor.

``scale = amax / 448``, ``values = e4m3(x * (448 / amax))``, rounded to nearest even, with ``amax`` the largest magnitude of
the row and at least ``TINY``. 448 is the largest e4m3 number, so nothing saturates. A row that holds a value that is not
finite gets the scale NaN: its products are NaN, never a wrong number.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ._dispatch import run
from .rounding import STORAGE_DTYPES

E4M3_MAX = 448.0
TINY = 1e-12
MAX_COLUMNS = 16384


class Quantized(NamedTuple):
    """A tensor in FP8.

    Attributes:
        values: float8_e4m3fn [..., K].
        scale: float32 [..., 1]; 0-dim for one scale per tensor.
    """

    values: Tensor
    scale: Tensor


def quantize_rowwise(x: Tensor, impl: str | None = None, out: Quantized | None = None) -> Quantized:
    """``quantize_rowwise_reference`` by the chosen implementation.

    Args:
        x: [..., K], adjacent in K; other strides are free.
        impl: see ``adagrpo_kernels._dispatch``. The kernel takes float32, bfloat16 and float16, K up to 16384, and reads
            ``x`` once.
        out: contiguous tensors to write into.
    """

    def kernel() -> Quantized:
        from ._triton import quantize

        return quantize.quantize_rowwise(x, out or empty_quantized(x, x.shape[-1]))

    def reference() -> Quantized:
        found = quantize_rowwise_reference(x)
        if out is None:
            return found
        out.values.copy_(found.values)
        out.scale.copy_(found.scale)
        return out

    return run("quantize_rowwise", impl, [x], kernel, reference, kernel_problem(x, x.shape[-1]))


def quantize_rowwise_reference(x: Tensor) -> Quantized:
    """Quantise each row of ``x`` [..., K] by its own scale (formula: module docstring); float64 computes in float32."""
    x = x.float()
    amax = x.abs().amax(-1, keepdim=True).clamp_min(TINY)
    return _scaled(x, torch.where(x.isfinite().all(-1, keepdim=True), amax, torch.nan))


def quantize_tensorwise(x: Tensor) -> Quantized:
    """Quantise ``x`` by one scale, in plain PyTorch: two passes."""
    x = x.float()
    return _scaled(x, x.abs().amax().clamp_min(TINY))


def _scaled(x: Tensor, amax: Tensor) -> Quantized:
    limit = torch.full_like(amax, E4M3_MAX)  # a tensor: torch multiplies by the reciprocal of a number, which rounds twice
    return Quantized((x * (limit / amax)).to(torch.float8_e4m3fn), amax / limit)


def kernel_problem(x: Tensor, columns: int) -> str | None:
    """Why a row kernel cannot write ``columns`` from ``x``; None when it can."""
    if x.dtype not in STORAGE_DTYPES[1:]:
        return f"it does not take {x.dtype}"
    if columns > MAX_COLUMNS:
        return f"rows of {columns}; it holds at most {MAX_COLUMNS}"
    return None


def empty_quantized(x: Tensor, columns: int) -> Quantized:
    """Room for the rows of ``x`` [..., K] quantised to ``columns``."""
    rows = x.shape[:-1]
    return Quantized(
        torch.empty(*rows, columns, dtype=torch.float8_e4m3fn, device=x.device),
        torch.empty(*rows, 1, dtype=torch.float32, device=x.device),
    )
