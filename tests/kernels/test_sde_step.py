"""One sampler step against a longhand float64 computation, row by row, and its behaviour under torch.compile."""

from __future__ import annotations

import math
import shutil
import struct

import pytest
import torch
from adagrpo_kernels import (
    StepTable,
    affine_mean,
    group_log_prob_reference,
    round_to_storage,
    sde_step_reference,
    sigma_schedule,
    step_table,
)
from torch import Tensor

Floats = list[float]
# (scheme, steps, eta) of the concatenated table, and the rows under test as (grid, k).
GRIDS = (("flow", 16, 0.7), ("cps", 6, 0.8), ("dance", 10, 0.3), ("ode", 4, 0.0))
ROWS = ((0, 2), (1, 1), (3, 1), (0, 0), (2, 9), (0, 6), (1, 5), (2, 0))
STORAGE = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
LATENT = (6, 4)


def shifted_sigma(k: int, steps: int) -> float:
    return 3 * (1 - k / steps) / (1 + 2 * (1 - k / steps))


def table_and_index() -> tuple[StepTable, Tensor]:
    table = StepTable.concat([step_table(scheme, sigma_schedule(steps, 3.0), eta) for scheme, steps, eta in GRIDS])
    offsets = [sum(steps for _, steps, _ in GRIDS[:g]) for g in range(len(GRIDS))]
    return table, torch.tensor([offsets[g] + k for g, k in ROWS])


def latents(dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Latent and velocity in the storage dtype, noise in the compute dtype."""
    generator = torch.Generator().manual_seed(seed)
    x, v, noise = torch.randn(3, len(ROWS), *LATENT, dtype=torch.float64, generator=generator)
    return x.to(dtype), v.to(dtype), noise.to(dtype if dtype is torch.float64 else torch.float32)


def stored(value: float, dtype: torch.dtype) -> float:
    """Round half to even to the storage dtype, without torch."""
    if dtype is torch.bfloat16:
        fraction, exponent = math.frexp(value)
        return math.ldexp(round(fraction * 256), exponent - 8)
    code = {torch.float64: "d", torch.float32: "f", torch.float16: "e"}[dtype]
    return struct.unpack(code, struct.pack(code, value))[0]


def longhand(row: tuple[int, int], x: Floats, v: Floats, eps: Floats) -> tuple[Floats, Floats, float]:
    """Mean, unrounded sample and noise strength of one row, in the form in which the samplers were published."""
    scheme, steps, eta = GRIDS[row[0]]
    s, s_next = shifted_sigma(row[1], steps), shifted_sigma(row[1] + 1, steps)
    dt = s_next - s
    if scheme == "ode":
        mean, w = [xi + vi * dt for xi, vi in zip(x, v, strict=True)], 0.0
    elif scheme == "cps":
        keep, w = s_next * math.cos(eta * math.pi / 2), s_next * math.sin(eta * math.pi / 2)
        mean = [(1 - s_next) * (xi - s * vi) + keep * (xi + (1 - s) * vi) for xi, vi in zip(x, v, strict=True)]
    else:
        g = eta if scheme == "dance" else eta * math.sqrt(s / (1 - (shifted_sigma(1, steps) if s == 1 else s)))
        mean = [xi + (vi + g * g / (2 * s) * (xi + (1 - s) * vi)) * dt for xi, vi in zip(x, v, strict=True)]
        w = g * math.sqrt(-dt)
    return mean, [m + w * e for m, e in zip(mean, eps, strict=True)], w


def gaussian(scheme: str, w: float, sample: Floats, mean: Floats) -> float:
    """Log-probability per element: of N(mean, w**2), or CPS's unnormalised square."""
    square = sum((n - m) ** 2 for n, m in zip(sample, mean, strict=True)) / len(mean)
    if scheme == "cps":
        return -square if w > 0 else 0.0
    return -square / (2 * w * w) - math.log(w * math.sqrt(2 * math.pi)) if w > 0 else 0.0


@pytest.mark.parametrize("dtype", STORAGE)
def test_longhand(dtype: torch.dtype) -> None:
    table, index = table_and_index()
    x, v, noise = latents(dtype)
    step = sde_step_reference(x, v, table, index, noise)
    compute = torch.float64 if dtype is torch.float64 else torch.float32
    assert (step.next.dtype, step.mean.dtype, step.logp.dtype) == (dtype, compute, compute)
    assert step.next.shape == x.shape
    assert step.logp.shape == (len(ROWS),)
    close = 1e-12 if dtype is torch.float64 else 2e-6
    for r, row in enumerate(ROWS):
        mean, sample, w = longhand(row, *(t[r].flatten().tolist() for t in (x, v, noise)))
        assert step.mean[r].flatten().tolist() == pytest.approx(mean, abs=close)
        expected = [stored(value, dtype) for value in sample]
        after = step.next[r].flatten().tolist()
        # Nearest in storage, up to the error of computing it: a near tie may fall to either side.
        for value, nearest, actual in zip(sample, expected, after, strict=True):
            assert abs(actual - value) <= abs(nearest - value) + close
        logp = gaussian(GRIDS[row[0]][0], w, after, mean)
        assert float(step.logp[r]) == pytest.approx(logp, abs=10 * close), row


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_log_prob_is_of_the_stored_latent(dtype: torch.dtype) -> None:
    """Rounding moves the log-probability by far more than the error of computing it, so the order is observable."""
    table, index = table_and_index()
    x, v, noise = latents(dtype)
    logp = sde_step_reference(x, v, table, index, noise).logp
    moved = []
    for r, row in enumerate(ROWS):
        mean, sample, w = longhand(row, *(t[r].flatten().tolist() for t in (x, v, noise)))
        scheme = GRIDS[row[0]][0]
        rounded = gaussian(scheme, w, [stored(value, dtype) for value in sample], mean)
        moved.append(abs(gaussian(scheme, w, sample, mean) - rounded))
        assert float(logp[r]) == pytest.approx(rounded, abs=1e-5)
    assert max(moved) > 1e-4


@pytest.mark.parametrize("dtype", STORAGE)
def test_deterministic_rows(dtype: torch.dtype) -> None:
    """ODE rows and the last CPS row: log-probability exactly 0, noise without effect and not needed."""
    table, index = table_and_index()
    rows = [r for r, row in enumerate(ROWS) if row in ((3, 1), (1, 5))]
    x, v, noise = (t[rows] for t in latents(dtype))
    with_noise = sde_step_reference(x, v, table, index[rows], noise)
    without = sde_step_reference(x, v, table, index[rows])
    assert with_noise.logp.tolist() == [0.0, 0.0]
    assert torch.equal(with_noise.next, without.next)
    assert torch.equal(without.logp, with_noise.logp)


def test_velocity_may_have_another_dtype() -> None:
    table, index = table_and_index()
    x, v, noise = latents(torch.float32)
    step = sde_step_reference(x, v.bfloat16(), table, index, noise)
    assert torch.equal(step.mean, affine_mean(x, v.bfloat16().float(), table, index))
    for r, row in enumerate(ROWS):
        mean, _, _ = longhand(row, x[r].flatten().tolist(), v[r].bfloat16().flatten().tolist(), [0.0] * 24)
        assert step.mean[r].flatten().tolist() == pytest.approx(mean, abs=2e-6)


def test_float32_table_equals_float64_table() -> None:
    """A table moved to float32 gives the same float32 step; only the log-probability may differ in the last digits."""
    table, index = table_and_index()
    x, v, noise = latents(torch.float32)
    wide = sde_step_reference(x, v, table, index, noise)
    narrow = sde_step_reference(x, v, table.to(dtype=torch.float32), index, noise)
    assert torch.equal(wide.next, narrow.next)
    assert torch.equal(wide.logp, narrow.logp)


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_compiled_step_keeps_the_rounding() -> None:
    """Inside one compiled function the rounding survives, and the eager replay of what was stored has ratio 1."""
    table, index = table_and_index()
    generator = torch.Generator().manual_seed(3)
    x, v, noise = torch.randn(3, len(ROWS), 32, 16, generator=generator)
    x, v = x.bfloat16(), v.bfloat16()
    wide = torch.randn(4096, generator=generator) * torch.exp(6 * torch.randn(4096, generator=generator))

    def compute(x: Tensor, v: Tensor, noise: Tensor, wide: Tensor) -> tuple[Tensor, ...]:
        step = sde_step_reference(x, v, table, index, noise)
        scaled = wide * 1.7
        halves = [round_to_storage(scaled, dtype) for dtype in (torch.bfloat16, torch.float16)]
        replayed = group_log_prob_reference(x, v, step.next.unsqueeze(1), table, index).squeeze(1)
        return step.next, step.logp, replayed, scaled, *halves

    torch.compiler.reset()
    successor, logp, compiled_replay, scaled, *halves = torch.compile(compute, fullgraph=True)(x, v, noise, wide)
    assert torch.equal(scaled, wide * 1.7)
    for half, dtype in zip(halves, (torch.bfloat16, torch.float16), strict=True):
        assert half.dtype is torch.float32
        assert torch.equal(half.view(torch.int32), scaled.to(dtype).float().view(torch.int32))
    replayed = group_log_prob_reference(x, v, successor.unsqueeze(1), table, index).squeeze(1)
    for compiled in (logp, compiled_replay):
        assert float((torch.exp(replayed - compiled) - 1).abs().max()) < 1e-6
    eager = sde_step_reference(x, v, table, index, noise)
    assert torch.equal(successor, eager.next)
    # What makes the ratio demanding: before rounding the log-probability would have been another one.
    unrounded = sde_step_reference(x.float(), v, table, index, noise)
    assert float((torch.exp(unrounded.logp - logp) - 1).abs().max()) > 1e-5
