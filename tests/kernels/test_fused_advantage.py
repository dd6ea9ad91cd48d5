"""Cross-level advantages against the statistics module and plain loops."""

from __future__ import annotations

import math
import statistics

import pytest
import torch
from adagrpo_kernels import (
    CALIBRATIONS,
    fused_advantage_reference,
    global_advantage_reference,
    local_advantage_reference,
)
from hypothesis import given, settings
from hypothesis import strategies as st

WIDE = 1e9
MEAN, STD = 0.35, 0.8
GROUPS = (
    [0.9, 0.1, 0.4, -0.7, 1.3, 0.2],
    [2.0, 3.0, 2.5, 2.5, 9.0, 1.0],
    [-1.0, -2.0, -1.5, -1.1, -1.7, -9.0],
    [0.35, 0.35, 1.35, -0.65, 0.35, 0.35],
    [5e-5, -3e-5, 1e-5, 2e-5, 0.0, -5e-5],
)


def truth_local(rewards: list[float], clip: float = WIDE) -> list[float]:
    mean, std = statistics.fmean(rewards), statistics.stdev(rewards)
    return [max(-clip, min(clip, (r - mean) / (std + 1e-8))) for r in rewards]


def truth_global(rewards: list[float], mean: float, std: float, calibration: str, clip: float = WIDE) -> list[float]:
    z = [(r - mean) / (std + 1e-8) for r in rewards]
    if calibration == "none":
        z = [r - mean for r in rewards]
    if calibration == "zscore_centred":
        z = [value - statistics.fmean(z) for value in z]
    if calibration == "mass":
        gain, loss = sum(value for value in z if value > 0), -sum(value for value in z if value < 0)
        if gain < 1e-6 or loss < 1e-6:
            z = [value - statistics.fmean(z) for value in z]
        else:
            z = [value / gain if value > 0 else value / loss for value in z]
    return [max(-clip, min(clip, value)) for value in z]


def batch(dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.tensor(GROUPS, dtype=dtype)


@pytest.mark.parametrize("clip", [WIDE, 1.2])
@pytest.mark.parametrize(("dtype", "close"), [(torch.float64, 1e-11), (torch.float32, 1e-5)])
def test_local(dtype: torch.dtype, close: float, clip: float) -> None:
    advantage = local_advantage_reference(batch(dtype), clip)
    assert advantage.dtype is dtype
    for row, rewards in zip(advantage.tolist(), GROUPS, strict=True):
        assert row == pytest.approx(truth_local(rewards, clip), rel=close, abs=close)
    assert float(advantage.abs().max()) <= clip * (1 + 1e-6)


@pytest.mark.parametrize("clip", [WIDE, 0.6])
@pytest.mark.parametrize("calibration", CALIBRATIONS)
@pytest.mark.parametrize(("dtype", "close"), [(torch.float64, 1e-11), (torch.float32, 1e-5)])
def test_global(dtype: torch.dtype, close: float, calibration: str, clip: float) -> None:
    mean, std = (torch.tensor(value, dtype=dtype) for value in (MEAN, STD))
    advantage = global_advantage_reference(batch(dtype), mean, std, clip, calibration)
    assert advantage.dtype is dtype
    for row, rewards in zip(advantage.tolist(), GROUPS, strict=True):
        assert row == pytest.approx(truth_global(rewards, MEAN, STD, calibration, clip), rel=close, abs=close)


@pytest.mark.parametrize("calibration", CALIBRATIONS)
def test_small_std_shows_where_eps_stands(calibration: str) -> None:
    """At the EMA's floor of 1e-4 the 1e-8 is a relative 1e-4."""
    rewards = [0.3504, 0.3496, 0.3503, 0.3498]
    advantage = global_advantage_reference(torch.tensor([rewards], dtype=torch.float64), MEAN, 1e-4, WIDE, calibration)
    assert advantage[0].tolist() == pytest.approx(truth_global(rewards, MEAN, 1e-4, calibration), rel=1e-8)


def test_mass_by_hand() -> None:
    """z = 2, 1, -1, -3, 0: shares 2/3 and 1/3 of the gain, 1/4 and 3/4 of the loss."""
    rewards = torch.tensor([[3.0, 2.0, 0.0, -2.0, 1.0]], dtype=torch.float64)
    advantage = global_advantage_reference(rewards, 1.0, 1.0 - 1e-8, 5.0)
    assert advantage[0].tolist() == pytest.approx([2 / 3, 1 / 3, -1 / 4, -3 / 4, 0], abs=1e-14)


@pytest.mark.parametrize("std", [1e-4, 1.0, 25.0])
def test_mass_sums_to_one_each_side(std: float) -> None:
    """Positives add up to +1 and negatives to -1, whatever the level's std, where both sides are inhabited."""
    level = batch().median(-1, keepdim=True).values + 1e-3
    advantage = global_advantage_reference(batch()[:4], level[:4], std, WIDE)
    assert advantage.clamp_min(0).sum(-1).tolist() == pytest.approx([1.0] * 4, abs=1e-12)
    assert advantage.clamp_max(0).sum(-1).tolist() == pytest.approx([-1.0] * 4, abs=1e-12)


@pytest.mark.parametrize(
    ("rewards", "balanced"),
    [
        ([1.0, 2.0, 4.0], False),
        ([-1.0, -2.0, -4.0], False),
        ([5e-7, -1.0, -2.0], False),
        ([-5e-7, 1.0, 2.0], False),
        ([3e-7, 3e-7, -1.0, -2.0], False),
        ([2e-6, -1.0, -2.0], True),
        ([-2e-6, 1.0, 2.0], True),
        ([8e-7, 8e-7, -1.0, -2.0], True),
    ],
)
def test_one_sided_groups_are_centred(rewards: list[float], balanced: bool) -> None:
    """Below a mass of 1e-6 on either side the z are centred instead of blown up."""
    advantage = global_advantage_reference(torch.tensor([rewards], dtype=torch.float64), 0.0, 1.0 - 1e-8, WIDE)[0]
    if balanced:
        gain, loss = sum(r for r in rewards if r > 0), -sum(r for r in rewards if r < 0)
        expected = [r / gain if r > 0 else r / loss for r in rewards]
    else:
        expected = [r - sum(rewards) / len(rewards) for r in rewards]
    assert advantage.tolist() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("weight", [1.0, 0.25, 0.0, -2.0])
@pytest.mark.parametrize("calibration", CALIBRATIONS)
def test_fused(calibration: str, weight: float) -> None:
    """Both parts are clamped before they are added, so the sum may pass the clip."""
    advantage = fused_advantage_reference(batch(), MEAN, STD, 1.1, weight, calibration)
    for row, rewards in zip(advantage.tolist(), GROUPS, strict=True):
        local, above = truth_local(rewards, 1.1), truth_global(rewards, MEAN, STD, calibration, 1.1)
        assert row == pytest.approx([a + weight * b for a, b in zip(local, above, strict=True)], abs=1e-11)


def test_fused_defaults() -> None:
    advantage = fused_advantage_reference(batch(), MEAN, STD)
    for row, rewards in zip(advantage.tolist(), GROUPS, strict=True):
        local, above = truth_local(rewards, 5.0), truth_global(rewards, MEAN, STD, "mass", 5.0)
        assert row == pytest.approx([a + b for a, b in zip(local, above, strict=True)], abs=1e-11)


def test_reference_level_per_group() -> None:
    means, stds = [0.1, 2.5, -1.4, 0.35, 0.0], [1.0, 2.0, 0.5, 0.8, 1e-4]
    level, spread = torch.tensor([means, stds], dtype=torch.float64).unsqueeze(2)
    advantage = global_advantage_reference(batch(), level, spread, WIDE)
    for row, rewards, mean, std in zip(advantage.tolist(), GROUPS, means, stds, strict=True):
        assert row == pytest.approx(truth_global(rewards, mean, std, "mass"), rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("size", [2, 7, 12, 24])
@pytest.mark.parametrize("value", [0.1, 1 / 3, 1e-8, 1e6, -14.7, 0.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_rewards_give_exactly_zero(dtype: torch.dtype, value: float, size: int) -> None:
    rewards = torch.full((3, size), value, dtype=dtype)
    assert local_advantage_reference(rewards, 5.0).abs().max() == 0
    for calibration in CALIBRATIONS:
        assert fused_advantage_reference(rewards, 0.2, 0.7, 5.0, 1.0, calibration).abs().max() == 0


@pytest.mark.parametrize(
    ("level", "gap", "signal"),
    [
        (0.0, 0.9e-6, False),
        (0.0, 1.1e-6, True),
        (1.0, 0.9e-6, False),
        (1.0, 1.1e-6, True),
        (1e6, 0.9, False),
        (-1e6, 0.9, False),
        (1e6, 1.1, True),
        (-1e6, 1.1, True),
    ],
)
def test_nearly_equal_rewards(level: float, gap: float, signal: bool) -> None:
    """Differences up to 1e-6 of max(1, abs(mean)) are rounding."""
    rewards = torch.tensor([[level, level + gap, level]], dtype=torch.float64)
    for advantage in (
        local_advantage_reference(rewards, 5.0),
        global_advantage_reference(rewards, 0.0, 1.0, 5.0),
    ):
        assert bool((advantage != 0).any()) is signal


@pytest.mark.parametrize("calibration", CALIBRATIONS)
def test_fewer_than_two_valid_rewards_give_zero(calibration: str) -> None:
    nan, inf = math.nan, math.inf
    rewards = torch.tensor([[1.0, nan, inf], [nan, nan, nan], [-inf, 3.0, nan], [1.0, 2.0, 7.0]])
    mask = torch.tensor([[True] * 3, [True] * 3, [True] * 3, [False, True, False]])
    advantage = fused_advantage_reference(rewards, 0.2, 0.7, 5.0, 1.0, calibration, mask)
    assert advantage.tolist() == [[0.0] * 3] * 4


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 1e30])
@pytest.mark.parametrize("calibration", CALIBRATIONS)
def test_failed_samples_influence_nothing(calibration: str, bad: float) -> None:
    """A failed sample gets 0 and the others what they would get without it; 1e30 is finite and masked out."""
    kept = [0.9, 0.1, -0.7, 1.3]
    rewards = torch.tensor([[bad, 0.9, 0.1, bad, -0.7, 1.3], GROUPS[0]], dtype=torch.float64)
    mask = torch.tensor([[False, True, True, False, True, True], [True] * 6]) if bad == 1e30 else None
    advantage = fused_advantage_reference(rewards, MEAN, STD, 5.0, 1.0, calibration, mask)
    for row, valid, where in ((0, kept, [1, 2, 4, 5]), (1, GROUPS[0], range(6))):
        local, above = truth_local(valid, 5.0), truth_global(valid, MEAN, STD, calibration, 5.0)
        assert [float(advantage[row, i]) for i in where] == pytest.approx(
            [a + b for a, b in zip(local, above, strict=True)], abs=1e-12
        )
    assert advantage[0, [0, 3]].tolist() == [0.0, 0.0]


def test_leading_axes_are_independent() -> None:
    stacked = torch.stack([batch()[:2], batch()[2:4]])
    advantage = fused_advantage_reference(stacked, MEAN, STD)
    flat = [row for block in advantage.tolist() for row in block]
    for row, rewards in zip(flat, GROUPS[:4], strict=True):
        local, above = truth_local(rewards, 5.0), truth_global(rewards, MEAN, STD, "mass", 5.0)
        assert row == pytest.approx([a + b for a, b in zip(local, above, strict=True)], abs=1e-11)


def test_unknown_calibration() -> None:
    with pytest.raises(ValueError, match="calibration"):
        global_advantage_reference(batch(), 0.0, 1.0, 5.0, "softmax")


# Multiples of 1/64 add up without rounding, so that shifts are exact.
SAMPLES = st.lists(st.tuples(st.integers(-640, 640), st.booleans()), min_size=3, max_size=16)
REWARDS = st.lists(st.integers(-640, 640).map(lambda n: n / 64), min_size=2, max_size=16)
QUIET = settings(derandomize=True, deadline=None, max_examples=60)


@QUIET
@given(REWARDS, st.integers(-1000, 1000))
def test_local_is_shift_invariant(rewards: list[float], shift: int) -> None:
    both = torch.tensor([rewards, [reward + shift for reward in rewards]], dtype=torch.float64)
    before, after = local_advantage_reference(both, 5.0).tolist()
    assert after == pytest.approx(before, abs=1e-9)


@QUIET
@given(REWARDS.flatmap(lambda r: st.tuples(st.just(r), st.permutations(range(len(r))))), st.sampled_from(CALIBRATIONS))
def test_fused_is_permutation_equivariant(case: tuple[list[float], list[int]], calibration: str) -> None:
    rewards, order = torch.tensor([case[0]], dtype=torch.float64), list(case[1])
    advantage = fused_advantage_reference(rewards, MEAN, STD, 5.0, 1.0, calibration)
    permuted = fused_advantage_reference(rewards[:, order], MEAN, STD, 5.0, 1.0, calibration)
    assert permuted[0].tolist() == pytest.approx(advantage[0, order].tolist(), abs=1e-12)


@QUIET
@given(SAMPLES, st.sampled_from(CALIBRATIONS))
def test_any_masked_group_equals_the_loop(samples: list[tuple[int, bool]], calibration: str) -> None:
    rewards = torch.tensor([[n / 64 for n, _ in samples]], dtype=torch.float64)
    mask = torch.tensor([[keep for _, keep in samples]])
    valid = [n / 64 for n, keep in samples if keep]
    expected = [0.0] * len(valid)
    if len(valid) > 1 and max(valid) > min(valid):
        local, above = truth_local(valid, 5.0), truth_global(valid, MEAN, STD, calibration, 5.0)
        expected = [a + b for a, b in zip(local, above, strict=True)]
    advantage = fused_advantage_reference(rewards, MEAN, STD, 5.0, 1.0, calibration, mask)
    assert advantage[mask].tolist() == pytest.approx(expected, abs=1e-10)
    assert advantage[~mask].tolist() == [0.0] * (len(samples) - len(valid))
