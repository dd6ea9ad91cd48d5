"""Every operator's kernel against its reference on the tensors' own device, in seconds: what ``adagrpo doctor`` runs.

Each check launches the kernel (``impl="triton"``) on fixed inputs and returns its largest error with the bound it has to keep.
The tests of the kernels are stricter and cover every shape; this says whether the kernels of one machine are sound.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .philox import Draw
from .step_table import StepTable, sigma_schedule, step_table

UNIT = 2.0**-24  # unit roundoff of float32
SUM = 64 * UNIT  # of a float32 sum over a latent: at most 45 additions on the longest path, and the terms' own roundings
WIDE_SUM = 1e-12  # of float64 sums over a group or an iteration's scores, magnified by a division by their spread
STATISTIC = 1e-6  # of logged shares, which the reference divides in float32
ONE_STEP = 1e-3  # share of e4m3 values that may fall on the other side of a tie: float32 inputs differ by roundings


class Finding(NamedTuple):
    """The error of a check that is largest against its bound, and that bound; 0 for results that are equal bit for bit."""

    error: float
    bound: float

    @property
    def passed(self) -> bool:
        return self.error <= self.bound  # not for NaN


def _operator(name: str) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """The operator and its reference, as the package holds them now."""
    package = importlib.import_module("adagrpo_kernels")
    return getattr(package, name), getattr(package, f"{name}_reference")


def _randn(device: torch.device, *shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def _latent(device: torch.device) -> tuple[int, int]:
    """FLUX.1 at 512x512 on a GPU; elsewhere the smallest latent that several programs share."""
    return (1024, 64) if device.type == "cuda" else (33, 64)


def _table(device: torch.device) -> StepTable:
    """Rows 0-15 deterministic, 16-31 flow, 32-47 cps."""
    kinds = (("ode", 0.0), ("flow", 0.7), ("cps", 0.8))
    return StepTable.concat([step_table(name, sigma_schedule(16, 3.0), eta) for name, eta in kinds]).to(device, torch.float32)


def _gap(found: Tensor, expected: Tensor) -> Tensor:
    """Absolute difference in float64, flat.

    Raises:
        ValueError: another shape or dtype.
    """
    if found.shape != expected.shape or found.dtype is not expected.dtype:
        raise ValueError(f"{found.dtype} {tuple(found.shape)} instead of {expected.dtype} {tuple(expected.shape)}")
    return (found.double() - expected.double()).abs().flatten()


def _worst(error: Tensor, bound: Tensor | float) -> Finding:
    """The element that comes nearest to its bound, or exceeds it most; NaN exceeds every bound."""
    bound = torch.as_tensor(bound, dtype=torch.float64, device=error.device).expand_as(error)
    at = int(torch.where(error == 0, 0.0, error / bound).argmax())
    return Finding(float(error[at]), float(bound[at]))


def _philox_normal(device: torch.device) -> Finding:
    operator, reference = _operator("philox_normal")
    numel = math.prod(_latent(device))
    gaps = []
    for dtype in (torch.float32, torch.bfloat16):
        arguments = (2**40 + 3, torch.arange(3, device=device) * 5, numel, 7, 3, torch.arange(3, device=device), dtype)
        gaps.append(_gap(operator(*arguments, impl="triton"), reference(*arguments)))
    return _worst(torch.cat(gaps), 0.0)


def _step(device: torch.device) -> tuple[Any, Any, StepTable, Tensor]:
    """Kernel's and reference's step of rows of every kind, table and rows."""
    operator, reference = _operator("sde_step")
    index = torch.tensor([0, 16, 18, 31, -1, 15, 33, 47], device=device)
    x, v = (_randn(device, len(index), *_latent(device), seed=s, dtype=torch.bfloat16) for s in (1, 2))
    draw = Draw(2**40 + 9, torch.arange(len(index), device=device) * 3, 12, 3, index.clamp_min(0))
    arguments = (x, v, table := _table(device), index, draw)
    return operator(*arguments, with_clean=True, impl="triton"), reference(*arguments, with_clean=True), table, index


def _sde_step(device: torch.device) -> Finding:
    found, expected, _, _ = _step(device)
    return _worst(torch.cat([_gap(getattr(found, n), getattr(expected, n)) for n in ("next", "mean", "clean")]), 0.0)


def _sde_step_logp(device: torch.device) -> Finding:
    found, expected, table, index = _step(device)
    rows = table.to(dtype=torch.float64).rows(index.clamp_min(0))
    square = (expected.next.double() - expected.mean.double()).square().flatten(1).mean(1)
    silent = (index < 0) | (rows.logp_scale == 0)
    truth = (rows.logp_const - rows.logp_scale * square).masked_fill(silent, 0)
    bound = (SUM * (rows.logp_scale * square + rows.logp_const.abs())).masked_fill(silent, 0)
    return _worst((found.logp.double() - truth).abs(), bound)


def _group(device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Log-probabilities and gradient by the kernel in float32, then by the reference in float64."""
    operator, reference = _operator("group_log_prob")
    latent = _latent(device)
    index = torch.tensor([16, 18, 24], device=device)
    x, v = (_randn(device, 3, *latent, seed=s) for s in (1, 2))
    successors, upstream = _randn(device, 3, 5, *latent, seed=3), _randn(device, 3, 5, seed=4)
    results = []
    for run, dtype, impl in ((operator, torch.float32, {"impl": "triton"}), (reference, torch.float64, {})):
        wide = v.to(dtype).requires_grad_()
        logp = run(x.to(dtype), wide, successors.to(dtype), _table(device).to(dtype=dtype), index, **impl)
        (grad,) = torch.autograd.grad((logp * upstream.to(dtype)).sum(), wide)
        results += [logp.detach(), grad]
    return results[0], results[1], results[2], results[3]


def _group_log_prob(device: torch.device) -> Finding:
    logp, _, truth, _ = _group(device)
    return _worst((logp.double() - truth).abs().flatten(), SUM * float(truth.abs().max()))


def _group_log_prob_gradient(device: torch.device) -> Finding:
    _, grad, _, truth = _group(device)
    return _worst((grad.double() - truth).abs().flatten(), SUM * float(truth.abs().max()))


def _fused_advantage(device: torch.device) -> Finding:
    operator, reference = _operator("multi_reward_advantage")
    rewards = _randn(device, 2, 4, 4, 12, seed=5).double()
    rewards[:, 0, 1] = 0.5  # a group without signal
    rewards[1, 2, 2, 3] = torch.nan  # a failed sample
    level = [torch.tensor(values, device=device, dtype=torch.float64) for values in ((0.1, -0.2), (0.9, 1.3))]
    rest = (torch.tensor([3, 3], device=device), torch.tensor([1.0, 0.5], device=device))
    gaps, bounds = [], []
    for calibration in ("mass", "zscore", "zscore_centred", "none"):
        arguments = (rewards, *level, *rest, 5.0, 1.0, calibration)
        found, expected = operator(*arguments, impl="triton"), reference(*arguments)
        gaps += [_gap(found.advantage, expected.advantage), _gap(found.statistics, expected.statistics)]
        bounds += [torch.full_like(gaps[-2], 100 * WIDE_SUM), torch.full_like(gaps[-1], STATISTIC)]
    return _worst(torch.cat(gaps), torch.cat(bounds))


def _capability_step(device: torch.device) -> Finding:
    operator, reference = _operator("capability_step")
    scores = _randn(device, 2, 4, 10, seed=6).double()
    scores[0, 1, 2], scores[:, 3] = torch.nan, torch.nan  # a failed probe, a slot without any
    state = [torch.tensor(values, device=device, dtype=torch.float64) for values in ((0.1, -0.2), (0.9, 1.3))]
    count, weights = torch.tensor([3, 0], device=device), torch.tensor([1.0, 0.5], device=device)
    gaps = []
    for strategy in ("closest", "easiest", "hardest", "medium", "random"):
        draw = Draw(11, torch.arange(4, device=device), 2, 7)
        arguments = (scores, *state, count, 0.8, strategy, weights, draw)
        pairs = zip(operator(*arguments, impl="triton"), reference(*arguments), strict=True)
        gaps += [_gap(found.nan_to_num(-9), expected.nan_to_num(-9)) for found, expected in pairs]
    return _worst(torch.cat(gaps), WIDE_SUM)


def _quantized(found: Any, expected: Any) -> Finding:
    """Scales to rounding; values on the same e4m3 number but for ties, and never more than one number off."""
    scale = _worst(_gap(found.scale, expected.scale) / expected.scale.double().flatten(), SUM)
    if not scale.passed:
        return scale
    if found.values.dtype is not expected.values.dtype or found.values.shape != expected.values.shape:
        raise ValueError(f"values are {found.values.dtype} {tuple(found.values.shape)}")
    off = (_e4m3_rank(found.values) - _e4m3_rank(expected.values)).abs().double()
    return Finding(float(off.mean() if off.amax() <= 1 else off.amax()), ONE_STEP)


def _e4m3_rank(values: Tensor) -> Tensor:
    """Place of each value among all e4m3 numbers, 0 for both zeros; NaN is far from all others."""
    bits = values.contiguous().view(torch.uint8).to(torch.int32)
    magnitude = bits & 0x7F
    magnitude = torch.where(magnitude == 0x7F, 1 << 20, magnitude)
    return torch.where(bits >= 0x80, -magnitude, magnitude)


def _rounded(found: Tensor, expected: Tensor) -> Finding:
    """bfloat16 results of float32 computations that differ by roundings: one number of bfloat16 apart."""
    return _worst(_gap(found, expected), 2.0**-7 * expected.double().abs().flatten() + SUM)


def _quantize_rowwise(device: torch.device) -> Finding:
    operator, reference = _operator("quantize_rowwise")
    x = _rows(device, 3)
    x[0, 0] = 0
    return _quantized(operator(x, impl="triton"), reference(x))


def _layer_norm_modulate(device: torch.device, quantized: bool) -> Finding:
    operator, reference = _operator("layer_norm_modulate")
    x = _rows(device, 3)
    shift, scale = (_randn(device, x.shape[0], x.shape[2], seed=s, dtype=x.dtype) for s in (4, 5))
    found = operator(x, shift, scale, 1e-6, quantized=quantized, impl="triton")
    return (_quantized if quantized else _rounded)(found, reference(x, shift, scale, 1e-6, quantized=quantized))


def _gelu_join(device: torch.device, quantized: bool) -> Finding:
    operator, reference = _operator("gelu_join")
    mlp, first = _rows(device, 6), _rows(device, 7)
    found = operator(mlp, first, quantized=quantized, impl="triton")
    return (_quantized if quantized else _rounded)(found, reference(mlp, first, quantized=quantized))


def _rows(device: torch.device, seed: int) -> Tensor:
    """Activations [B, L, D] of FLUX.1's width on a GPU."""
    shape = (2, 256, 3072) if device.type == "cuda" else (2, 3, 48)
    return 3 * _randn(device, *shape, seed=seed, dtype=torch.bfloat16)


CHECKS: dict[str, Callable[[torch.device], Finding]] = {
    "philox_normal": _philox_normal,
    "sde_step": _sde_step,
    "sde_step, log-probability": _sde_step_logp,
    "group_log_prob": _group_log_prob,
    "group_log_prob, gradient": _group_log_prob_gradient,
    "fused_advantage": _fused_advantage,
    "capability_step": _capability_step,
    "quantize_rowwise": _quantize_rowwise,
    "layer_norm_modulate": lambda device: _layer_norm_modulate(device, False),
    "layer_norm_modulate, e4m3": lambda device: _layer_norm_modulate(device, True),
    "gelu_join": lambda device: _gelu_join(device, False),
    "gelu_join, e4m3": lambda device: _gelu_join(device, True),
}
