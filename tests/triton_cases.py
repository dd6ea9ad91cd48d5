"""Inputs shared by the tests of the kernels, and the error bounds they are held to."""

from __future__ import annotations

import torch
from adagrpo_kernels import Draw, Guidance, History, StepTable, sigma_schedule, step_table
from torch import Tensor

UNIT = 2.0**-24  # unit roundoff of float32
SIGMAS = sigma_schedule(16, 3.0)
# Rows 0-15 deterministic, 16-31 flow, 32-47 cps. Row 16 stands at s = 1, rows 15, 31 and 47 are the last step.
TABLE = StepTable.concat([step_table(s, SIGMAS, e) for s, e in (("ode", 0.0), ("flow", 0.7), ("cps", 0.8))]).to(
    dtype=torch.float32
)
STEPS = (0, 16, 18, 31, -1, 15, 33, 47, 24)


def randn(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def step_inputs(rows: int, shape: tuple[int, ...], dtype: torch.dtype, noise: str, extras: bool, device: str) -> tuple:
    """Positional and keyword arguments of ``sde_step`` on ``device``: every kind of row."""
    index = torch.tensor([STEPS[r % len(STEPS)] for r in range(rows)], dtype=torch.int64)
    x, v, u = (randn(rows, *shape, seed=seed, dtype=dtype).to(device) for seed in (1, 2, 3))
    given = randn(rows, *shape, seed=4).to(device)
    draw = Draw(2**40 + 9, torch.arange(rows, device=device) * 3 + 1, 12, 3, index.clamp_min(0).to(device))
    keywords = {}
    if extras:
        scale = torch.linspace(0.5, 4.0, max(rows, 1))[:rows].to(device)
        weight = torch.linspace(-0.2, 0.3, len(TABLE)).to(device)
        keywords = {"guidance": Guidance(u, scale), "history": History(given * 0.5, weight), "with_clean": True}
    return (x, v, TABLE.to(device), index.to(device), {"none": None, "given": given, "drawn": draw}[noise]), keywords


def sum_depth(numel: int) -> int:
    """Additions on the longest path of the kernel's sum: a tree over 2048 elements, then one per block in order."""
    return 12 + -(-numel // 2048)


def logp_bound(scale: Tensor, const: Tensor, square: Tensor, numel: int) -> Tensor:
    """Bound on the error of ``const - scale*mean(gap**2)`` for exact float32 gaps' inputs, float64.

    A gap carries one rounding, its square two and one more, the sum ``sum_depth`` of them, the mean one, the last product
    and difference one each: all relative to quantities of one sign.
    """
    value = scale * square
    return UNIT * (1.01 * (5 + sum_depth(numel)) * value + 2 * (value + const.abs()))
