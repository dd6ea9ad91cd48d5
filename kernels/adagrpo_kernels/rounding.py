"""Rounding to a storage dtype that no compiler can optimise away.

``x.to(bfloat16).to(float32)`` is removed by ``torch.compile`` inside a fused kernel, and then the log-probability belongs
to a latent that was never stored. Integer arithmetic on the float32 bits is the same in eager, compiled and interpreted
code.
"""

from __future__ import annotations

import torch
from torch import Tensor

STORAGE_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def round_to_storage(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Round ``x`` to the nearest value of ``dtype``, ties to even, and return it in the dtype of ``x``.

    Args:
        x: float32 or float64 tensor of any shape. float64 is only accepted with float64 storage.
        dtype: float64, float32, bfloat16 or float16.

    Returns:
        A tensor like ``x`` whose every value is exactly representable in ``dtype``: the later cast is exact. NaN stays
        NaN, values beyond the range become infinite.

    Raises:
        TypeError: for any other dtype, or a storage dtype wider than ``x``.
    """
    if dtype not in STORAGE_DTYPES or (dtype is torch.float64 and x.dtype is not torch.float64):
        raise TypeError(f"cannot store {x.dtype} values as {dtype}")
    if dtype is x.dtype:
        return x
    if x.dtype is not torch.float32:
        raise TypeError(f"{x.dtype} latents need {x.dtype} storage, not {dtype}")
    bits = x.view(torch.int32)
    if dtype is torch.bfloat16:
        rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000).view(torch.float32)
    else:
        rounded = _round_fp16(x, bits)
    return torch.where(x.isnan(), x, rounded)


def _round_fp16(x: Tensor, bits: Tensor) -> Tensor:
    normal = ((bits + 0xFFF + ((bits >> 13) & 1)) & -0x2000).view(torch.float32)
    normal = torch.where(normal.abs() > 65504.0, torch.copysign(torch.full_like(x, torch.inf), x), normal)
    # Below 2**-14 the grid of float16 is uniform, 2**-24: exactly float32's own grid in [0.5, 1).
    tiny = torch.copysign((x.abs() + 0.5) - 0.5, x)
    return torch.where(x.abs() < 2.0**-14, tiny, normal)
