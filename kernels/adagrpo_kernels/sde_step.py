"""One step of any sampler for rows that may each stand at another step: affine mean, noise, rounding, log-probability.

The log-probability is of ``next`` AFTER rounding to its storage dtype; everything else is float32 (float64 for float64
latents). That is what keeps the on-policy ratio at 1.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .rounding import round_to_storage
from .step_table import StepTable


class SdeStep(NamedTuple):
    """Result of one step.

    Attributes:
        next: [R, L, C] in the dtype of the latent.
        mean: [R, L, C] in the compute dtype.
        logp: [R] in the compute dtype; 0 for deterministic rows.
    """

    next: Tensor
    mean: Tensor
    logp: Tensor


def compute_dtype(x: Tensor) -> torch.dtype:
    """float64 for float64 latents, float32 for all others."""
    return torch.float64 if x.dtype is torch.float64 else torch.float32


def per_row(coefficient: Tensor, like: Tensor) -> Tensor:
    """A vector [R] shaped and typed to scale the rows of ``like`` [R, ...]."""
    return coefficient.to(compute_dtype(like)).reshape(-1, *[1] * (like.ndim - 1))


def affine_mean(x: Tensor, v: Tensor, table: StepTable, index: Tensor) -> Tensor:
    """``a*x + b*v`` for latents and velocities [R, L, C] at table rows ``index`` [R], in the compute dtype."""
    rows, dtype = table.rows(index), compute_dtype(x)
    return per_row(rows.a, x) * x.to(dtype) + per_row(rows.b, x) * v.to(dtype)


def sde_step_reference(x: Tensor, v: Tensor, table: StepTable, index: Tensor, noise: Tensor | None = None) -> SdeStep:
    """Advance every row by its own table row (formula: ``adagrpo_kernels.step_table``).

    Args:
        x: latents [R, L, C]; float64, float32, bfloat16 or float16 storage.
        v: velocities [R, L, C], any float dtype.
        table: step table on the device of ``x``.
        index: int64 [R], the table row of each latent.
        noise: standard normal [R, L, C] in the compute dtype, or None when every row is deterministic (which is not
            checked: the table lives on the device).

    Returns:
        ``SdeStep(next, mean, logp)``.
    """
    rows = table.rows(index)
    mean = affine_mean(x, v, table, index)
    sample = mean if noise is None else mean + per_row(rows.w, x) * noise
    rounded = round_to_storage(sample, x.dtype)
    square = (rounded - mean).square().flatten(1).mean(1)
    logp = rows.logp_const.to(mean.dtype) - rows.logp_scale.to(mean.dtype) * square
    logp = torch.where(rows.logp_scale > 0, logp, torch.zeros_like(logp))
    return SdeStep(rounded.to(x.dtype), mean, logp)
