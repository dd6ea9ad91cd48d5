"""The advantage kernel against the reference: values, statistics, exact zeros."""

from __future__ import annotations

import pytest
import torch
from adagrpo_kernels import (
    CALIBRATIONS,
    STATISTICS,
    fused_advantage,
    fused_advantage_reference,
    multi_reward_advantage,
    multi_reward_advantage_reference,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from triton_cases import randn

NAN, INF = float("nan"), float("inf")


def ema(rewards: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Mean, std, count and weights."""
    m = torch.arange(rewards, dtype=dtype)
    return 0.4 + 0.1 * m, 0.3 + 0.2 * m, torch.arange(rewards), 0.5 + 0.25 * m.float()


def check(device: str, rewards: Tensor, calibration: str, weight: float = 1.0, mask: Tensor | None = None, clip=5.0) -> None:
    """Against the reference in float64; the tolerance follows from the sums.

    A deviation from the mean of G rewards carries an error of at most (G + 2) units of the largest reward, which the division
    by the spread magnifies; the divisor itself is off by (G + 4) relative units. Quotients may be off by two more units.
    """
    state = ema(rewards.shape[0])
    on = [t.to(device) for t in state]
    masked = None if mask is None else mask.to(device)
    found = multi_reward_advantage(rewards.to(device), *on, clip, weight, calibration, masked, "triton")
    expected = multi_reward_advantage_reference(rewards.double(), *state, clip, weight, calibration, mask)
    assert found.advantage.dtype is rewards.dtype and found.advantage.shape == rewards.shape[1:]
    size, finite = rewards.shape[-1], rewards[rewards.isfinite()].double()
    unit = torch.finfo(rewards.dtype).eps
    largest = float(finite.abs().max()) if finite.numel() else 1.0
    spreads = rewards.double().std(-1).nan_to_num(1.0)
    smallest = min(float(spreads[spreads > 1e-6 * max(1.0, largest)].amin()), 0.3) if finite.numel() else 0.3
    allowed = unit * (size + 6) * (largest / smallest + 2 * clip + 4) * float(state[3].sum()) * (1 + abs(weight)) * 2
    assert (found.advantage.cpu().double() - expected.advantage).abs().max() <= allowed
    torch.testing.assert_close(
        found.statistics.cpu().double(), expected.statistics, rtol=max(1e-6, 10 * unit), atol=allowed, equal_nan=True
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("calibration", CALIBRATIONS)
@pytest.mark.parametrize("shape", [(1, 1, 4, 12), (2, 3, 2, 2), (3, 5, 1, 64), (1, 1, 1, 3)])
def test_against_reference(device: str, shape: tuple[int, ...], calibration: str, dtype: torch.dtype) -> None:
    rewards = (0.5 + 0.3 * randn(*shape, seed=1)).to(dtype)
    check(device, rewards, calibration)
    check(device, rewards, calibration, 0.3, randn(*shape[1:], seed=2) > -1, 1.25)


@pytest.mark.parametrize("size", [2, 3, 12, 24, 63, 64])
def test_group_sizes(device: str, size: int) -> None:
    check(device, 0.5 + 0.3 * randn(1, 2, 3, size, seed=size).double(), "mass")


def test_weight_zero_is_the_local_advantage(device: str) -> None:
    check(device, randn(2, 1, 3, 6, seed=1).double(), "mass", 0.0)


@pytest.mark.parametrize("calibration", CALIBRATIONS)
def test_failed_ties_and_one_sided(device: str, calibration: str) -> None:
    """NaN and Inf, ties, all above and all below the level, a single valid sample, none."""
    rows = [
        [NAN, 0.2, INF, 0.9, -INF, 0.4],
        [0.1, 0.1, 0.9, 0.9, 0.1, 0.9],
        [1.0, 2.0, 3.0, 4.0, 5.0, 6.0],
        [-1.0, -2.0, -3.0, -4.0, -5.0, -6.0],
        [NAN, NAN, 0.5, NAN, NAN, NAN],
        [NAN] * 6,
        [0.4, 0.4, 0.4, 0.4, 0.4, 0.5],
    ]
    check(device, torch.tensor([rows], dtype=torch.float64), calibration)
    check(device, torch.tensor([rows, rows[::-1]], dtype=torch.float64), calibration)


@settings(max_examples=10, deadline=None, derandomize=True)
@given(
    st.floats(-1e6, 1e6, width=32), st.integers(2, 64), st.sampled_from([torch.float32, torch.float64]),
    st.sampled_from(CALIBRATIONS),
)  # fmt: skip
def test_equal_rewards_give_exactly_zero(value: float, size: int, dtype: torch.dtype, calibration: str) -> None:
    rewards = torch.full((1, 1, 2, size), value, dtype=dtype)
    found = multi_reward_advantage(rewards, *ema(1), 5.0, 1.0, calibration, impl="triton")
    assert not found.advantage.any()
    assert float(found.statistics[0, STATISTICS.index("equal_groups")]) == 1


@settings(max_examples=8, deadline=None, derandomize=True)
@given(st.integers(1, 3), st.integers(1, 9), st.integers(1, 5), st.integers(2, 40), st.sampled_from(CALIBRATIONS))
def test_any_shape(number: int, slots: int, steps: int, size: int, calibration: str) -> None:
    check("cpu", 0.5 + 0.3 * randn(number, slots, steps, size, seed=7).double(), calibration)


def test_one_reward_without_statistics(device: str) -> None:
    rewards = 0.5 + 0.3 * randn(4, 12, seed=1)
    found = fused_advantage(rewards.to(device), 0.4, 0.3, impl="triton")
    torch.testing.assert_close(found.cpu(), fused_advantage_reference(rewards, 0.4, 0.3), rtol=1e-5, atol=1e-5)
    levels = torch.rand(4, 1)
    with pytest.raises(RuntimeError, match="one mean and one std"):
        fused_advantage(rewards, levels, levels, impl="triton")


def test_non_contiguous_rewards(device: str) -> None:
    rewards = randn(12, 4, 2, seed=1).double().permute(2, 1, 0)
    state = [t.to(device) for t in ema(2)]
    found, expected = (multi_reward_advantage(t.to(device), *state, impl="triton") for t in (rewards, rewards.contiguous()))
    assert torch.equal(found.advantage, expected.advantage) and torch.equal(found.statistics, expected.statistics)


def test_unknown_calibration() -> None:
    with pytest.raises(ValueError, match="calibration"):
        fused_advantage(torch.zeros(1, 2), 0.0, 1.0, calibration="none of these", impl="triton")
