"""Rounding to storage against hand-computed values and torch's own casts."""

from __future__ import annotations

import math

import pytest
import torch
from adagrpo_kernels import round_to_storage
from torch import Tensor

NARROW = (torch.bfloat16, torch.float16)


def assert_same_bits(actual: Tensor, expected: Tensor) -> None:
    """Equal bit for bit; NaN only has to stay NaN."""
    nan = expected.isnan()
    assert actual.dtype is expected.dtype
    assert torch.equal(actual.isnan(), nan)
    assert torch.equal(actual.view(torch.int32)[~nan], expected.view(torch.int32)[~nan])


def hard_cases(dtype: torch.dtype) -> Tensor:
    """Every value of ``dtype``, every midpoint between neighbours, and the float32 values right beside them."""
    patterns = torch.arange(0x8000, dtype=torch.int32).to(torch.int16)
    values = patterns.view(dtype).to(torch.float64)
    values = values[values.isfinite()]
    beyond = 2 * values[-1] - values[-2]
    middles = (values + torch.cat([values[1:], beyond.reshape(1)])) / 2
    exact = torch.cat([values, middles]).to(torch.float32)
    bits = exact.view(torch.int32)
    cases = torch.cat([exact, (bits + 1).view(torch.float32), (bits - 1).clamp_min(0).view(torch.float32)])
    special = torch.tensor([math.inf, math.nan, 3.4028235e38, 1e-45, 1.1754944e-38, 65519.996, 65520.0, 65536.0])
    return torch.cat([cases, special, -cases, -special])


@pytest.mark.parametrize("dtype", NARROW)
def test_ties_and_limits_equal_the_cast(dtype: torch.dtype) -> None:
    x = hard_cases(dtype)
    assert_same_bits(round_to_storage(x, dtype), x.to(dtype).float())


@pytest.mark.parametrize("dtype", NARROW)
def test_random_bits_equal_the_cast(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(-(2**31), 2**31, (200_000,), generator=generator).to(torch.int32)
    small = torch.randn(200_000, generator=generator) * torch.exp(8 * torch.randn(200_000, generator=generator))
    x = torch.cat([bits.view(torch.float32), small]).reshape(400, 1000)
    assert_same_bits(round_to_storage(x, dtype), x.to(dtype).float())
    assert_same_bits(round_to_storage(x.T, dtype), x.T.to(dtype).float())


@pytest.mark.parametrize(
    ("dtype", "value", "expected"),
    [
        # Seven fraction bits: ties go to the even neighbour, below or above.
        (torch.bfloat16, 1 + 2**-8, 1.0),
        (torch.bfloat16, 1 + 3 * 2**-8, 1 + 2**-6),
        (torch.bfloat16, -(1 + 3 * 2**-8), -(1 + 2**-6)),
        (torch.bfloat16, 1 + 2**-8 + 2**-23, 1 + 2**-7),
        (torch.bfloat16, 2**-134, 0.0),
        (torch.bfloat16, 3 * 2**-134, 2**-132),
        (torch.bfloat16, 2.0**128 - 2.0**119, math.inf),
        (torch.bfloat16, 2.0**128 - 2.0**119 - 2.0**104, 2.0**128 - 2.0**120),
        # Ten fraction bits, subnormals in steps of 2**-24, largest value 65504.
        (torch.float16, 1 + 2**-11, 1.0),
        (torch.float16, 1 + 3 * 2**-11, 1 + 2**-9),
        (torch.float16, 2**-25, 0.0),
        (torch.float16, 3 * 2**-25, 2**-23),
        (torch.float16, 2**-25 + 2**-40, 2**-24),
        (torch.float16, 65519.99609375, 65504.0),
        (torch.float16, 65520.0, math.inf),
        (torch.float16, -65520.0, -math.inf),
    ],
)
def test_by_hand(dtype: torch.dtype, value: float, expected: float) -> None:
    x = torch.tensor([value], dtype=torch.float32)
    assert float(x) == value, "the case must be exact in float32"
    assert float(round_to_storage(x, dtype)) == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_wide_storage_changes_nothing(dtype: torch.dtype) -> None:
    x = torch.tensor([0.1, -0.0, math.inf, 1 / 3], dtype=dtype)
    assert torch.equal(round_to_storage(x, dtype), x)


@pytest.mark.parametrize(
    ("source", "storage"),
    [
        (torch.float32, torch.float64),
        (torch.float64, torch.bfloat16),
        (torch.float64, torch.float32),
        (torch.float32, torch.int32),
        (torch.float32, torch.float8_e4m3fn),
    ],
)
def test_impossible_storage(source: torch.dtype, storage: torch.dtype) -> None:
    with pytest.raises(TypeError):
        round_to_storage(torch.zeros(2, dtype=source), storage)
