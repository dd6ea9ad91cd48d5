"""Log-probabilities of a group of successors against loops, and their gradient."""

from __future__ import annotations

import pytest
import torch
from adagrpo_kernels import StepTable, group_log_prob_reference, sde_step_reference, sigma_schedule, step_table
from torch import Tensor

STORAGE = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(scope="module")
def table() -> StepTable:
    """Rows 0-15 flow, 16-21 cps, 22-25 dance, 26-29 ode."""
    return StepTable.concat(
        [
            step_table("flow", sigma_schedule(16, 3.0), 0.7),
            step_table("cps", sigma_schedule(6, 3.0), 0.8),
            step_table("dance", sigma_schedule(4, 3.0), 0.3),
            step_table("ode", sigma_schedule(4, 3.0)),
        ]
    )


def group(rows: int, size: int, shape: tuple[int, int], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    x, v = torch.randn(2, rows, *shape, dtype=torch.float64, generator=generator)
    successors = torch.randn(rows, size, *shape, dtype=torch.float64, generator=generator)
    return x.to(dtype), v.to(dtype), successors.to(dtype)


@pytest.mark.parametrize("dtype", STORAGE)
def test_longhand(table: StepTable, dtype: torch.dtype) -> None:
    index = torch.tensor([2, 17, 0, 23, 27, 21])
    x, v, successors = group(6, 3, (2, 5), dtype)
    logp = group_log_prob_reference(x, v, successors, table, index)
    assert logp.shape == (6, 3)
    assert logp.dtype is (torch.float64 if dtype is torch.float64 else torch.float32)
    for n, k in enumerate(index.tolist()):
        a, b, scale, const = (float(t[k]) for t in (table.a, table.b, table.logp_scale, table.logp_const))
        mean = [a * xi + b * vi for xi, vi in zip(x[n].flatten().tolist(), v[n].flatten().tolist(), strict=True)]
        for g in range(3):
            after = successors[n, g].flatten().tolist()
            square = sum((y - m) ** 2 for y, m in zip(after, mean, strict=True)) / 10
            expected = const - scale * square
            assert float(logp[n, g]) == pytest.approx(expected, rel=1e-12 if dtype is torch.float64 else 3e-6, abs=1e-6)


@pytest.mark.parametrize("dtype", STORAGE)
def test_replay_of_own_samples_has_ratio_one(table: StepTable, dtype: torch.dtype) -> None:
    """Each row's single successor, and twelve forks of one latent: ratio exactly 1 on the samples as stored."""
    index = torch.tensor([0, 2, 4, 6, 18, 24, 26])
    x, v, _ = group(7, 1, (32, 16), dtype)
    compute = torch.float64 if dtype is torch.float64 else torch.float32
    noise = torch.randn(7, 12, 32, 16, dtype=compute, generator=torch.Generator().manual_seed(6))
    single = sde_step_reference(x, v, table, index, noise[:, 0])
    replayed = group_log_prob_reference(x, v, single.next.unsqueeze(1), table, index)
    assert torch.equal(replayed.squeeze(1), single.logp)
    repeat = torch.arange(7).repeat_interleave(12)
    forks = sde_step_reference(x[repeat], v[repeat], table, index[repeat], noise.flatten(0, 1))
    replayed = group_log_prob_reference(x, v, forks.next.unflatten(0, (7, 12)), table, index)
    assert torch.equal(torch.exp(replayed - forks.logp.unflatten(0, (7, 12))), torch.ones(7, 12, dtype=compute))


def test_gradcheck(table: StepTable) -> None:
    index = torch.tensor([2, 17, 23, 27])
    x, v, successors = group(4, 3, (2, 2), torch.float64)
    v.requires_grad_()
    assert torch.autograd.gradcheck(lambda v: group_log_prob_reference(x, v, successors, table, index), (v,))


def test_gradient_reaches_a_narrow_velocity(table: StepTable) -> None:
    """bfloat16 velocities take part in the graph and get their gradient in their own dtype."""
    x, v, successors = group(2, 3, (4, 4), torch.bfloat16)
    v.requires_grad_()
    index = torch.tensor([2, 26])
    group_log_prob_reference(x, v, successors, table, index).sum().backward()
    assert v.grad is not None
    assert v.grad.dtype is torch.bfloat16
    a, b, scale = (float(t[2]) for t in (table.a, table.b, table.logp_scale))
    mean = a * x[0].double() + b * v[0].detach().double()
    expected = 2 * b * scale / 16 * (successors[0].double() - mean).sum(0)
    assert v.grad[0].double().flatten().tolist() == pytest.approx(expected.flatten().tolist(), rel=2**-8, abs=1e-6)
    assert v.grad[1].abs().max() == 0
