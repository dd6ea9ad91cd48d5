"""The step kernel against the reference: `next`, mean and preview bit for bit, log-probabilities within a derived bound."""

from __future__ import annotations

import shutil

import pytest
import torch
from adagrpo_kernels import SdeStep, philox_normal, sde_step, sde_step_reference
from hypothesis import given, settings
from hypothesis import strategies as st
from triton_cases import TABLE, logp_bound, randn, step_inputs

SHAPES = [(1, 1), (7, 9), (5, 13), (64, 64)]
STORAGE = [torch.float32, torch.bfloat16, torch.float16]


def assert_same(found: SdeStep, expected: SdeStep, index: torch.Tensor) -> None:
    """Bitwise where the specification is elementwise; sums within the bound of float64 truth."""
    found = SdeStep(*(None if t is None else t.cpu() for t in found))
    for name in ("next", "mean", "clean"):
        a, b = getattr(found, name), getattr(expected, name)
        assert (a is None) == (b is None)
        if a is not None:
            assert a.dtype is b.dtype and a.shape == b.shape, name
            assert torch.equal(a, b) or torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0)), name
    if not len(index):
        return
    numel = expected.mean[0].numel()
    square = (expected.next.double() - expected.mean.double()).square().flatten(1).mean(1)
    row = index.clamp_min(0)
    scale, const = TABLE.logp_scale[row].double(), TABLE.logp_const[row].double()
    truth = torch.where((index < 0) | (scale == 0), 0.0, const - scale * square)
    bound = logp_bound(scale, const, square, numel)
    assert ((found.logp.double() - truth).abs() <= bound).all(), (found.logp, truth)


@pytest.mark.parametrize("extras", [False, True])
@pytest.mark.parametrize("noise", ["none", "given", "drawn"])
@pytest.mark.parametrize("dtype", STORAGE)
@pytest.mark.parametrize("shape", SHAPES)
def test_against_reference(device: str, shape, dtype: torch.dtype, noise: str, extras: bool) -> None:
    rows = 9 if shape[0] < 64 else 3
    arguments, keywords = step_inputs(rows, shape, dtype, noise, extras, device)
    expected, on_cpu = step_inputs(rows, shape, dtype, noise, extras, "cpu")
    assert_same(sde_step(*arguments, **keywords, impl="triton"), sde_step_reference(*expected, **on_cpu), arguments[3].cpu())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [0, 1, 2])
def test_split_rows(device: str, rows: int, dtype: torch.dtype) -> None:
    """65 537 elements: 33 programs per row, the last one holding a single element."""
    arguments, _ = step_inputs(rows, (65537, 1), dtype, "given", False, device)
    expected, _ = step_inputs(rows, (65537, 1), dtype, "given", False, "cpu")
    assert_same(sde_step(*arguments, impl="triton"), sde_step_reference(*expected), arguments[3].cpu())


@pytest.mark.proof
@pytest.mark.parametrize("dtype", STORAGE)
def test_split_rows_with_drawn_noise(device: str, dtype: torch.dtype) -> None:
    arguments, keywords = step_inputs(4, (65537, 1), dtype, "drawn", True, device)
    expected, on_cpu = step_inputs(4, (65537, 1), dtype, "drawn", True, "cpu")
    assert_same(sde_step(*arguments, **keywords, impl="triton"), sde_step_reference(*expected, **on_cpu), arguments[3].cpu())


def test_a_row_does_not_depend_on_its_batch(device: str) -> None:
    """Bitwise, log-probability included: alone, in a batch, in another order."""
    (x, v, table, index, noise), _ = step_inputs(9, (7, 9), torch.float32, "given", False, device)
    whole = sde_step(x, v, table, index, noise, impl="triton")
    for rows in ([1], [8, 2, 1], [4, 1]):
        part = sde_step(x[rows], v[rows], table, index[rows], noise[rows], impl="triton")
        assert torch.equal(part.next, whole.next[rows]) and torch.equal(part.logp, whole.logp[rows])


def test_non_contiguous_inputs(device: str) -> None:
    """Transposed latents, a strided batch, a broadcast velocity, a strided index."""
    (_, _, table, index, _), _ = step_inputs(9, (7, 9), torch.float32, "none", False, "cpu")
    x = randn(9, 9, 7, seed=1).transpose(1, 2)
    v = randn(1, 7, 9, seed=2).expand(9, 7, 9)
    noise = randn(18, 7, 9, seed=3)[::2]
    index = index.repeat_interleave(2)[::2]
    found = sde_step(*(t.to(device) for t in (x, v)), table.to(device), index.to(device), noise.to(device), impl="triton")
    assert_same(found, sde_step_reference(x, v, table, index, noise), index)


def test_forks_of_one_latent(device: str) -> None:
    """`source` sends one latent to several rows; the mean is shared, the noise is not."""
    x, v, source = randn(2, 5, 13, seed=1), randn(2, 5, 13, seed=2), torch.tensor([1, 1, 0, 1, 0])
    index, noise = torch.tensor([16, 16, 18, 20, 18]), randn(5, 5, 13, seed=3)
    expected = sde_step_reference(x[source], v[source], TABLE, index, noise)
    on = [t.to(device) for t in (x, v, index, noise, source)]
    found = sde_step(on[0], on[1], TABLE.to(device), on[2], on[3], source=on[4], impl="triton")
    assert_same(found, expected, index)
    assert_same(sde_step(x, v, TABLE, index, noise, source=source, impl="reference"), expected, index)


def test_special_values(device: str) -> None:
    """NaN and Inf stay in their row and become what they become in the reference; fp16 overflows to Inf."""
    x = randn(4, 3, 5, seed=1, dtype=torch.float16)
    x[0, 0, 0], x[1, 1, 1], x[2, 2, 2] = float("nan"), float("inf"), 65504.0
    v, index = x.clone().nan_to_num(1.0, 1.0), torch.tensor([16, 18, 16, 18])
    v[2, 2, 2] = 65504.0
    noise = 300 * randn(4, 3, 5, seed=3)
    expected = sde_step_reference(x, v, TABLE, index, noise)
    found = sde_step(*(t.to(device) for t in (x, v)), TABLE.to(device), index.to(device), noise.to(device), impl="triton")
    for a, b in ((found.next.cpu(), expected.next), (found.mean.cpu(), expected.mean)):
        assert torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0))
    assert found.logp[3].isfinite() and not found.logp[:2].isfinite().any()


@settings(max_examples=12, deadline=None, derandomize=True)
@given(st.integers(0, 5), st.integers(1, 20), st.integers(1, 150), st.sampled_from(STORAGE), st.booleans())
def test_any_shape(rows: int, length: int, channels: int, dtype: torch.dtype, extras: bool) -> None:
    arguments, keywords = step_inputs(rows, (length, channels), dtype, "given", extras, "cpu")
    assert_same(sde_step(*arguments, **keywords, impl="triton"), sde_step_reference(*arguments, **keywords), arguments[3])


@pytest.mark.parametrize("dtype", STORAGE)
def test_rounding_of_every_kind_of_value(device: str, dtype: torch.dtype) -> None:
    """As `.to(dtype)` does: ties, carries, subnormals, overflow."""
    bits = torch.tensor([0, 1, 0x7FFF, 0x8000, 0x8001, 0x17FFF, 0x18000, 0x7F7FFFFF, 0x477FF000, 0x477FEFFF, 0x33000000,
                         0x33000001, 0x387FE000, 0x38800000, 0x3F808000, 0x3F818000, 0x3F801000, 0x3F803000])  # fmt: skip
    values = torch.cat([bits, bits | -0x80000000]).to(torch.int32).view(torch.float32)
    if device == "cpu" and dtype is torch.bfloat16:  # the interpreter's own cast flushes bfloat16 subnormals
        values = values[values.abs() >= 2.0**-126]
    table = type(TABLE)(**{f: torch.tensor([n]) for f, n in zip(
        ("a", "b", "w", "logp_scale", "logp_const", "sigma", "sigma_next"), (0.0, 1.0, 0.0, 0.0, 0.0, 0.5, 0.4), strict=True
    )})  # fmt: skip
    x = torch.zeros(1, 1, len(values), dtype=dtype, device=device)
    v = values.reshape(1, 1, -1).to(device)
    found = sde_step(x, v, table.to(device), torch.zeros(1, dtype=torch.int64, device=device), impl="triton").next.cpu()
    assert torch.equal(found.flatten(), values.to(dtype))


def test_mean_is_written_only_on_request(device: str) -> None:
    arguments, _ = step_inputs(2, (7, 9), torch.float32, "given", False, device)
    without = sde_step(*arguments, with_mean=False, impl="triton")
    assert without.mean.numel() == 0
    assert torch.equal(without.next, sde_step(*arguments, impl="triton").next)


def test_drawn_noise_is_philox(device: str) -> None:
    (x, v, table, index, draw), _ = step_inputs(5, (7, 9), torch.float32, "drawn", False, device)
    noise = philox_normal(*draw[:2], 63, *draw[2:], impl="triton").reshape(5, 7, 9)
    drawn, given_ = (sde_step(x, v, table, index, n, impl="triton") for n in (draw, noise))
    assert torch.equal(drawn.next, given_.next) and torch.equal(drawn.logp, given_.logp)


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.proof)])
def test_compiled_reference_and_interpreter_agree(dtype: torch.dtype) -> None:
    arguments, keywords = step_inputs(3, (7, 9), dtype, "given", False, "cpu")
    compiled = torch.compile(sde_step_reference, fullgraph=True)(*arguments, **keywords)
    assert torch.equal(compiled.next, sde_step(*arguments, **keywords, impl="triton").next)
    assert torch.equal(compiled.next, sde_step_reference(*arguments, **keywords).next)
