"""The replay kernel and its backward against float64 truth, within derived bounds."""

from __future__ import annotations

import pytest
import torch
from adagrpo_kernels import group_log_prob, group_log_prob_reference
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from triton_cases import STEPS, TABLE, UNIT, logp_bound, randn

SHAPES = [(1, 1), (7, 9), (5, 13), (64, 64)]
INDEX = [s for s in STEPS if s >= 0]


def inputs(latents: int, group: int, shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x, v = (randn(latents, *shape, seed=s, dtype=dtype) for s in (1, 2))
    successors = randn(latents, group, *shape, seed=3, dtype=dtype)
    return x, v, successors, torch.tensor([INDEX[n % len(INDEX)] for n in range(latents)], dtype=torch.int64)


def run(device: str, x: Tensor, v: Tensor, successors: Tensor, index: Tensor, upstream: Tensor) -> tuple[Tensor, Tensor]:
    v = v.to(device).detach().requires_grad_()
    logp = group_log_prob(x.to(device), v, successors.to(device), TABLE.to(device), index.to(device), "triton")
    (logp * upstream.to(device)).sum().backward()
    assert v.grad is not None
    return logp.detach().cpu(), v.grad.cpu()


def check(device: str, x: Tensor, v: Tensor, successors: Tensor, index: Tensor) -> None:
    """Log-probabilities and gradient; every error below is a rounding of float32, counted in the comments."""
    latents, group = successors.shape[:2]
    upstream = randn(latents, group, seed=5)
    logp, grad = run(device, x, v, successors, index, upstream)
    rows = TABLE.to(dtype=torch.float64).rows(index)
    a, b, scale, const = (t.reshape(-1, 1) for t in (rows.a, rows.b, rows.logp_scale, rows.logp_const))
    flat = lambda t: t.double().flatten(t.ndim - 2)  # noqa: E731
    numel = flat(x).shape[-1]
    gap = flat(successors) - (a * flat(x) + b * flat(v)).unsqueeze(1)
    # Two products and one sum make the mean, one difference the gap.
    slip = 1.01 * UNIT * (2 * ((a * flat(x)).abs() + (b * flat(v)).abs()).unsqueeze(1) + gap.abs())
    square = gap.square().mean(2)
    truth = const - scale * square
    bound = scale * (2 * gap.abs() * slip + slip.square()).mean(2) + logp_bound(scale, const, square, numel)
    assert ((logp.double() - truth).abs() <= bound).all()
    factor = 2 * b * scale / numel
    weight = upstream.double().unsqueeze(2)
    truth_grad = factor * (weight * gap).sum(1)
    # Each term carries its gap's slip, a product and at most G sums; the factor four roundings.
    bound = factor.abs() * (weight.abs() * (slip + (group + 5) * 1.01 * UNIT * gap.abs())).sum(1)
    if v.dtype is not torch.float32:  # autograd returns the gradient in the dtype of v
        bound = bound + truth_grad.abs() * (2.0**-8 if v.dtype is torch.bfloat16 else 2.0**-11) + 2.0**-24
    assert grad.dtype is v.dtype and ((flat(grad) - truth_grad).abs() <= bound).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("group", [1, 2, 12])
def test_against_truth(device: str, group: int, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    check(device, *inputs(3 if shape[0] < 64 else 1, group, shape, dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("group", [1, 3])
def test_split_rows(device: str, group: int, dtype: torch.dtype) -> None:
    x, v, successors, _ = inputs(1, group, (65537, 1), dtype)
    check(device, x, v, successors, torch.tensor([18]))


@pytest.mark.proof
@pytest.mark.parametrize("group", [24, 63, 64])
def test_large_groups(device: str, group: int) -> None:
    check(device, *inputs(2, group, (65, 63), torch.float32))


@settings(max_examples=8, deadline=None, derandomize=True)
@given(st.integers(1, 5), st.integers(1, 6), st.integers(1, 20), st.integers(1, 150))
def test_any_shape(latents: int, group: int, length: int, channels: int) -> None:
    check("cpu", *inputs(latents, group, (length, channels), torch.float32))


def test_no_latents(device: str) -> None:
    x, v, successors, index = inputs(0, 4, (7, 9), torch.float32)
    logp, grad = run(device, x, v, successors, index, torch.zeros(0, 4))
    assert logp.shape == (0, 4) and grad.shape == (0, 7, 9)


def test_non_contiguous_inputs(device: str) -> None:
    x, v, successors, index = inputs(3, 4, (9, 7), torch.float32)
    upstream = randn(4, 3, seed=5).t()
    wanted = run(device, *(t.transpose(-1, -2).contiguous() for t in (x, v, successors)), index, upstream)
    found = run(device, *(t.transpose(-1, -2) for t in (x, v, successors)), index, upstream)
    assert torch.equal(found[0], wanted[0]) and torch.equal(found[1], wanted[1])


def test_a_latent_does_not_depend_on_its_batch(device: str) -> None:
    """Bitwise: what makes the ratio 1 when the update's micro-batches differ from the fork's call."""
    x, v, successors, index = (t.to(device) for t in inputs(6, 4, (7, 9), torch.bfloat16))
    table = TABLE.to(device)
    whole = group_log_prob(x, v, successors, table, index, "triton")
    for rows in ([2], [5, 2, 0]):
        assert torch.equal(group_log_prob(x[rows], v[rows], successors[rows], table, index[rows], "triton"), whole[rows])


def test_failed_samples_are_left_out(device: str) -> None:
    """As in the reference: a NaN successor neither poisons the gradient nor counts."""
    x, v, successors, index = inputs(2, 3, (7, 9), torch.float32)
    successors[0, 1], successors[1, 0, 3, 3] = float("nan"), float("inf")
    upstream = randn(2, 3, seed=5)
    logp, grad = run(device, x, v, successors, index, upstream)
    leaf = v.clone().requires_grad_()
    expected = group_log_prob_reference(x, leaf, successors, TABLE, index)
    (expected * upstream).sum().backward()
    torch.testing.assert_close(logp, expected.detach(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(grad, leaf.grad, rtol=1e-5, atol=1e-6)


def test_reference_passes_gradcheck() -> None:
    table = TABLE.to(dtype=torch.float64)
    x, v, successors, index = inputs(2, 3, (2, 3), torch.float64)
    function = lambda v: group_log_prob_reference(x, v, successors, table, index)  # noqa: E731
    assert torch.autograd.gradcheck(function, (v.requires_grad_(),))


def test_gradient_flows_into_the_velocity_only() -> None:
    x, v, successors, index = inputs(1, 2, (2, 3), torch.float32)
    with pytest.raises(RuntimeError, match="into v only"):
        group_log_prob(x.requires_grad_(), v, successors, TABLE, index, "triton")
