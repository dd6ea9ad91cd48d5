"""Row kernels of the FP8 forward: the references against hand-worked truth, the kernels against the references.

Every test of a kernel runs under the interpreter here and with `-m gpu` on a CUDA device.
"""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from adagrpo_kernels import (
    Quantized,
    gelu_join,
    launch_counts,
    layer_norm_modulate,
    quantize_rowwise,
    quantize_rowwise_reference,
    quantize_tensorwise,
    reset_counts,
)
from torch import Tensor
from triton_cases import randn

GRID = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
GRID = GRID[GRID.isfinite()].unique()
IMPLS = ["reference", "triton"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SIZES = [1, 7, 100, 130, 640]


def real(q: Quantized) -> Tensor:
    return q.values.double() * q.scale.double()


def nearest(x: Tensor) -> Tensor:
    """The e4m3 numbers nearest to ``x``, ties to even, by search over the whole grid."""
    gap = (x.double().unsqueeze(-1) - GRID.double()).abs()
    least = gap.min(-1, keepdim=True).values
    odd = (GRID.to(torch.float8_e4m3fn).view(torch.uint8) & 1).double()
    return GRID[torch.where(gap == least, odd, torch.inf).argmin(-1)]


def ties() -> Tensor:
    """Every midpoint of the grid and its float32 neighbours, in a row whose scale is 1."""
    middle = (GRID[1:] + GRID[:-1]) / 2
    x = torch.cat([GRID, middle, *(torch.nextafter(middle, torch.full_like(middle, s)) for s in (-1e9, 1e9))])
    return torch.cat([x, torch.tensor([448.0])]).unsqueeze(0)


@pytest.mark.parametrize("impl", IMPLS)
def test_every_tie_rounds_to_even(device: str, impl: str) -> None:
    x = ties()
    found = quantize_rowwise(x.to(device), impl)
    assert found.scale.item() == 1.0
    assert torch.equal(found.values.float().cpu(), nearest(x))


@pytest.mark.parametrize("columns", SIZES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_quantised_rows_are_the_references(device: str, dtype: torch.dtype, columns: int) -> None:
    x = randn(5, columns, seed=1, dtype=dtype) * torch.tensor([1e-3, 1.0, 40.0, 1e-20, 0.0], dtype=dtype).unsqueeze(1)
    found, expected = quantize_rowwise(x.to(device), "triton"), quantize_rowwise_reference(x)
    assert torch.equal(found.scale.cpu(), expected.scale)
    assert torch.equal(found.values.cpu().view(torch.uint8), expected.values.view(torch.uint8))


def test_one_scale_per_row_of_its_largest_magnitude() -> None:
    x = torch.tensor([[1.0, -448.0, 3.3], [0.5, 0.25, -0.1], [0.0, 0.0, 0.0]])
    found = quantize_rowwise_reference(x)
    torch.testing.assert_close(found.scale.flatten(), torch.tensor([1.0, 0.5 / 448, 1e-12 / 448]))
    assert found.values[0].tolist() == [1.0, -448.0, 3.25] and found.values[2].tolist() == [0, 0, 0]
    # e4m3 has 3 bits after the leading one: half a unit in the last place is 1/16 of a normal number.
    assert ((real(found)[1] - x[1].double()).abs() <= x[1].abs() / 16 + 1e-9).all()


def test_one_scale_per_tensor() -> None:
    x = torch.tensor([[1.0, -224.0], [448.0, 2.0]])
    found = quantize_tensorwise(x)
    assert found.scale.shape == () and float(found.scale) == 1 and found.values.float().tolist() == x.tolist()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_row_that_is_not_finite_never_becomes_a_number(device: str, impl: str, bad: float) -> None:
    x = randn(3, 20, seed=2)
    x[1, 7] = bad
    found = quantize_rowwise(x.to(device), impl).scale.flatten().cpu()
    assert found.isnan().tolist() == [False, True, False]


@pytest.mark.parametrize("impl", IMPLS)
def test_strides_out_and_empty_batches(device: str, impl: str) -> None:
    joint = randn(2, 9, 40, seed=3).to(device)
    part, expected = joint[:, 4:, 8:], quantize_rowwise_reference(joint[:, 4:, 8:].cpu().contiguous())
    found = quantize_rowwise(part, impl)
    assert torch.equal(found.values.cpu().view(torch.uint8), expected.values.view(torch.uint8))
    storage = Quantized(torch.zeros(20, 32, device=device).to(torch.float8_e4m3fn), torch.zeros(20, 1, device=device))
    rows = Quantized(storage.values[5:15], storage.scale[5:15])
    assert quantize_rowwise(part.reshape(10, 32), impl, rows).values.data_ptr() == rows.values.data_ptr()
    assert torch.equal(storage.scale[5:15].cpu(), expected.scale.reshape(10, 1)) and not storage.scale[15:].any()
    assert quantize_rowwise(joint[:0], impl).values.shape == (0, 9, 40)
    assert quantize_rowwise(joint.transpose(0, 1), impl).scale.shape == (9, 2, 1)


def norm_inputs(columns: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """x [2, 3, D] far from its mean 0, shift and scale as strided columns of one table."""
    table = randn(2, 6 * columns, seed=5, dtype=dtype)
    x = (randn(2, 3, columns, seed=4) * 3 + 5).to(dtype)
    return x, table[:, columns : 2 * columns], table[:, 4 * columns : 5 * columns]


def exact_norm(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    y = F.layer_norm(x.double(), x.shape[-1:], eps=1e-6)
    return y * (1 + scale.double().unsqueeze(1)) + shift.double().unsqueeze(1)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("columns", SIZES[1:])
@pytest.mark.parametrize("dtype", DTYPES)
def test_layer_norm_and_modulation(device: str, dtype: torch.dtype, columns: int, impl: str) -> None:
    x, shift, scale = norm_inputs(columns, dtype)
    truth = exact_norm(x, shift, scale)
    on = [t.to(device) for t in (x, shift, scale)]
    found = layer_norm_modulate(*on, impl=impl)
    assert found.dtype is dtype and found.shape == x.shape
    ulp = torch.finfo(dtype).eps
    torch.testing.assert_close(found.cpu().double(), truth, rtol=ulp / 2 + 1e-6, atol=3e-6)
    quantised = layer_norm_modulate(*on, quantized=True, impl=impl)
    same_rounding(quantised, truth)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("first", [0, 16, 33])
def test_gelu_beside_the_attention(device: str, first: int, dtype: torch.dtype, impl: str) -> None:
    packed = (randn(2, 3, 30 + 80, seed=6) * 3).to(dtype).to(device)
    mlp = packed[..., 30:]
    left = randn(2, 3, first, seed=7, dtype=dtype).to(device) if first else None
    truth = F.gelu(mlp.cpu().double(), approximate="tanh")
    truth = truth if left is None else torch.cat([left.cpu().double(), truth], -1)
    found = gelu_join(mlp, left, impl=impl)
    assert found.dtype is dtype and found.shape == (2, 3, first + 80)
    torch.testing.assert_close(found.cpu().double(), truth, rtol=torch.finfo(dtype).eps / 2 + 2e-6, atol=1e-6)
    same_rounding(gelu_join(mlp, left, quantized=True, impl=impl), truth)


def same_rounding(found: Quantized, truth: Tensor) -> None:
    """Quantised from float32 values that may err by a few roundings: equal but for values next to a tie."""
    expected = quantize_rowwise_reference(truth.float())
    torch.testing.assert_close(found.scale.cpu(), expected.scale, rtol=1e-5, atol=0)
    differ = found.values.cpu().float() != expected.values.float()
    assert differ.double().mean() <= 0.005
    step = expected.values.float().abs() / 8 + 2.0**-9
    assert ((found.values.cpu().float() - expected.values.float()).abs() <= step * 1.01).all()


@pytest.mark.parametrize("impl", IMPLS)
def test_extreme_inputs_of_the_activation(device: str, impl: str) -> None:
    x = torch.tensor([[[-1e4, -30.0, -0.0, 0.0, 30.0, 1e4]]])
    assert gelu_join(x.to(device), impl=impl).flatten().tolist() == [0, 0, 0, 0, 30, 1e4]


def test_constant_tokens_are_shifted_only(device: str) -> None:
    x, shift, scale = torch.full((1, 2, 24), 3.0), randn(1, 24, seed=8), randn(1, 24, seed=9)
    found = layer_norm_modulate(*(t.to(device) for t in (x, shift, scale)), impl="triton").cpu()
    torch.testing.assert_close(found, shift.unsqueeze(1).expand(1, 2, 24))


def test_a_row_does_not_depend_on_its_batch(device: str) -> None:
    x, shift, scale = norm_inputs(130, torch.bfloat16)
    many = layer_norm_modulate(*(t.to(device) for t in (x, shift, scale)), impl="triton")
    one = layer_norm_modulate(*(t[1:].to(device) for t in (x, shift, scale)), impl="triton")
    assert torch.equal(many[1:], one)


def test_one_launch_per_call_also_on_meta_tensors() -> None:
    x, shift, scale = (t.to("meta") for t in norm_inputs(128, torch.bfloat16))
    reset_counts()
    q = quantize_rowwise(x, "triton")
    assert (q.values.dtype, q.values.shape, q.scale.shape) == (torch.float8_e4m3fn, (2, 3, 128), (2, 3, 1))
    assert layer_norm_modulate(x, shift, scale, quantized=True, impl="triton").values.shape == (2, 3, 128)
    assert gelu_join(x, x, impl="triton").shape == (2, 3, 256)
    assert launch_counts() == {"quantize_rowwise": 1, "layer_norm_modulate": 1, "gelu_join": 1}


@pytest.mark.parametrize(("call", "reason"), [
    (lambda: quantize_rowwise(torch.zeros(2, 4, dtype=torch.float64), "triton"), "it does not take torch.float64"),
    (lambda: gelu_join(torch.zeros(1, 1, 16385), impl="triton"), "rows of 16385; it holds at most 16384"),
])  # fmt: skip
def test_what_a_kernel_cannot_take_is_said(call, reason: str) -> None:
    with pytest.raises(RuntimeError, match=reason):
        call()


def test_float64_stays_float64_in_the_reference() -> None:
    x, shift, scale = (t.double() for t in norm_inputs(16, torch.float32))
    torch.testing.assert_close(layer_norm_modulate(x, shift, scale), exact_norm(x, shift, scale), rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(gelu_join(x), F.gelu(x, approximate="tanh"), rtol=1e-14, atol=1e-14)
