"""One step of any sampler for rows that may each stand at another step: affine mean, noise, rounding, log-probability.

::

    v    = u + g*(c - u)                     with guidance: c conditional, u unconditional velocity
    mean = a*x + b*v (+ h*previous)          h: history of a multistep solver, on the previous clean prediction
    next = round(mean + w*eps)               to the storage dtype
    logp = logp_const - logp_scale * mean_D((next - mean)**2)
    clean = x - sigma*v

The log-probability is of ``next`` AFTER rounding to its storage dtype; everything else is float32 (float64 for float64
latents). That is what keeps the on-policy ratio at 1. Rows may be deterministic (w = 0), stochastic, or finished (table row
-1: the latent is returned unchanged), all in one call.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ._dispatch import run
from .philox import Draw, philox_normal_reference
from .rounding import STORAGE_DTYPES, round_to_storage
from .step_table import StepTable


class Guidance(NamedTuple):
    """Classifier-free guidance (Ho & Salimans 2022): ``v = unconditional + scale*(v - unconditional)``.

    Attributes:
        unconditional: velocities like ``v``.
        scale: float tensor, 0-dim or [R].
    """

    unconditional: Tensor
    scale: Tensor


class History(NamedTuple):
    """History term of a multistep solver: ``mean += weight[index] * clean``.

    Attributes:
        clean: [R, L, C], the clean prediction of each row's previous step.
        weight: [T], one more column of the step table; 0 where the solver looks at one step.
    """

    clean: Tensor
    weight: Tensor


class SdeStep(NamedTuple):
    """Result of one step.

    Attributes:
        next: [R, L, C] in the dtype of the latent.
        mean: [R, L, C] in the compute dtype.
        logp: [R] in the compute dtype; 0 for deterministic and finished rows.
        clean: [R, L, C] in the compute dtype, the preview ``x - sigma*v``; None unless asked for.
    """

    next: Tensor
    mean: Tensor
    logp: Tensor
    clean: Tensor | None = None


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


def sde_step(
    x: Tensor,
    v: Tensor,
    table: StepTable,
    index: Tensor,
    noise: Tensor | Draw | None = None,
    *,
    source: Tensor | None = None,
    guidance: Guidance | None = None,
    history: History | None = None,
    with_mean: bool = True,
    with_clean: bool = False,
    impl: str | None = None,
) -> SdeStep:
    """``sde_step_reference`` by the chosen implementation; ``next`` is the same bit for bit.

    Args:
        with_mean: False saves writing the mean: ``mean`` is then an empty tensor. The reference ignores it.
        impl: see ``adagrpo_kernels._dispatch``. The kernel takes float32, bfloat16 and float16 latents.
    """
    given = noise.rows if isinstance(noise, Draw) else noise
    extra = [*(guidance or ()), *(history or ())]
    problem = None if x.dtype in STORAGE_DTYPES[1:] else f"it does not store {x.dtype}"

    def kernel() -> SdeStep:
        from ._triton import sde_step

        return SdeStep(*sde_step.sde_step(x, v, table, index, noise, source, guidance, history, with_mean, with_clean))

    def reference() -> SdeStep:
        return sde_step_reference(
            x, v, table, index, noise, source=source, guidance=guidance, history=history, with_clean=with_clean
        )

    return run("sde_step", impl, [x, v, index, given, source, *extra], kernel, reference, problem)


def sde_step_reference(
    x: Tensor,
    v: Tensor,
    table: StepTable,
    index: Tensor,
    noise: Tensor | Draw | None = None,
    *,
    source: Tensor | None = None,
    guidance: Guidance | None = None,
    history: History | None = None,
    with_clean: bool = False,
) -> SdeStep:
    """Advance every row by its own table row (formula: module docstring and ``adagrpo_kernels.step_table``).

    Args:
        x: latents [R, L, C]; float64, float32, bfloat16 or float16 storage. With ``source`` [N, L, C].
        v: velocities like ``x``, any float dtype.
        table: step table on the device of ``x``.
        index: int64 [R], the table row of each latent; -1 for finished rows.
        noise: standard normal [R, L, C] in the compute dtype; or the ``Draw`` to make it from; or None when every row is
            deterministic (which is not checked: the table lives on the device).
        source: int64 [R], the row of ``x`` and ``v`` each result starts from: forks of one latent.
        guidance: classifier-free guidance; ``v`` is then the conditional velocity.
        history: second-order term.
        with_clean: also return the clean preview.

    Returns:
        ``SdeStep(next, mean, logp, clean)``.
    """
    dtype = compute_dtype(x)
    finished = (index < 0).reshape(-1, *[1] * (x.ndim - 1))
    index = index.clamp_min(0)
    rows = table.rows(index)
    if guidance is not None:
        u = guidance.unconditional.to(dtype)
        v = u + _guidance_scale(guidance.scale, x, source) * (v.to(dtype) - u)
    if source is not None:
        x, v = x.index_select(0, source), v.index_select(0, source)
    mean = affine_mean(x, v, table, index)
    if history is not None:
        mean = mean + per_row(history.weight.index_select(0, index), x) * history.clean.to(dtype)
    mean = torch.where(finished, x.to(dtype), mean)
    if isinstance(noise, Draw):
        seed, noise_rows, iteration, stream, step = noise
        noise = philox_normal_reference(seed, noise_rows, math.prod(x.shape[1:]), iteration, stream, step)
        noise = noise.reshape(x.shape).to(dtype)
    sample = mean if noise is None else torch.where(finished, mean, mean + per_row(rows.w, x) * noise)
    rounded = round_to_storage(sample, x.dtype)
    square = (rounded - mean).square().flatten(1).mean(1)
    logp = rows.logp_const.to(mean.dtype) - rows.logp_scale.to(mean.dtype) * square
    logp = logp.masked_fill(finished.flatten() | (rows.logp_scale <= 0), 0)
    clean = None
    if with_clean:
        clean = torch.where(finished, mean, x.to(dtype) - per_row(rows.sigma, x) * v.to(dtype))
    return SdeStep(rounded.to(x.dtype), mean, logp, clean)


def _guidance_scale(scale: Tensor, x: Tensor, source: Tensor | None) -> Tensor:
    if scale.ndim and source is not None and scale.shape[0] != x.shape[0]:
        raise ValueError(f"guidance.scale has {scale.shape[0]} rows; with `source` it belongs to the {x.shape[0]} rows of x")
    return per_row(scale.reshape(-1), x)
