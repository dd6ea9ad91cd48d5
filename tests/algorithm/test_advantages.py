"""Advantages over several rewards, and the diagnostics of fusion, against loops and hand-made groups."""

from __future__ import annotations

import math
import statistics

import pytest
import torch

from adagrpo.algorithm.advantages import CALIBRATIONS, advantage_statistics, reward_advantage
from adagrpo.algorithm.selection import CapabilityState

NAN = math.nan
Floats = list[float]
REWARDS = (
    [[0.9, 0.1, 0.4, -0.7], [0.2, 0.2, NAN, 0.8], [1.0, 1.0, 1.0, 1.0]],
    [[30.0, 10.0, 20.0, 70.0], [5.0, math.inf, 4.0, 9.0], [3.0, 8.0, 1.0, 2.0]],
)
MEAN, STD = (0.3, 15.0), (0.4, 20.0)


def capability(mean: tuple[float, ...], std: tuple[float, ...], count: int = 1) -> CapabilityState:
    return CapabilityState(
        torch.tensor(mean, dtype=torch.float64),
        torch.tensor(std, dtype=torch.float64).square(),
        torch.full((len(mean),), count),
    )


def truth_part(values: Floats, mean: float, std: float, clip: float, weight: float, calibration: str) -> Floats:
    """One reward of one group without failed samples."""
    if max(values) == min(values):
        return [0.0] * len(values)
    clamp = lambda value: max(-clip, min(clip, value))  # noqa: E731
    centre, spread = statistics.fmean(values), statistics.stdev(values) + 1e-8
    z = [(value - mean) / (std + 1e-8) for value in values]
    gain, loss = sum(t for t in z if t > 0), -sum(t for t in z if t < 0)
    middle = statistics.fmean(z)
    above = {
        "mass": [t / gain if t > 0 else t / loss for t in z] if min(gain, loss) > 1e-6 else [t - middle for t in z],
        "zscore": z,
        "zscore_centred": [t - middle for t in z],
        "none": [value - mean for value in values],
    }[calibration]
    return [clamp((value - centre) / spread) + weight * clamp(t) for value, t in zip(values, above, strict=True)]


@pytest.mark.parametrize("clip", [5.0, 0.9])
@pytest.mark.parametrize("weight", [1.0, 0.5, 0.0])
@pytest.mark.parametrize("calibration", CALIBRATIONS)
def test_several_rewards(calibration: str, weight: float, clip: float) -> None:
    """A sample that failed in one reward is failed in all: 0 for itself, invisible to the others."""
    weights = [0.7, 1.5]
    rewards = torch.tensor(REWARDS, dtype=torch.float64)
    advantage = reward_advantage(rewards, capability(MEAN, STD), torch.tensor(weights), clip, weight, calibration).advantage
    assert advantage.shape == (3, 4)
    for group in range(3):
        valid = [i for i in range(4) if all(math.isfinite(REWARDS[m][group][i]) for m in range(2))]
        expected = [0.0] * 4
        for m in range(2):
            values = [REWARDS[m][group][i] for i in valid]
            part = truth_part(values, MEAN[m], STD[m], clip, weight, calibration)
            for i, value in zip(valid, part, strict=True):
                # float32 weights, as a configuration would hand them over.
                expected[i] += float(torch.tensor(weights[m])) * value
        assert advantage[group].tolist() == pytest.approx(expected, abs=1e-9)


def test_single_reward_in_float32() -> None:
    rewards = torch.tensor([REWARDS[0][:1]])
    advantage = reward_advantage(rewards, capability(MEAN[:1], STD[:1]), torch.ones(1), 5.0, 1.0, "mass").advantage
    assert advantage.dtype is torch.float32
    expected = truth_part(REWARDS[0][0], MEAN[0], STD[0], 5.0, 1.0, "mass")
    assert advantage[0].tolist() == pytest.approx(expected, rel=1e-5)


def test_without_fusion_the_level_is_not_read() -> None:
    """Weight 0 is plain group-relative advantage: even a broken level must not reach it."""
    rewards = torch.tensor(REWARDS, dtype=torch.float64)
    broken = capability((NAN, NAN), (NAN, NAN))
    advantage = reward_advantage(rewards, broken, torch.ones(2), 5.0, 0.0, "mass").advantage
    assert bool(advantage.isfinite().all())
    assert float(advantage.abs().max()) > 0.5


def example() -> tuple[torch.Tensor, torch.Tensor]:
    """Four groups around a level of 1, with the signs of local advantage noted; 15 samples are valid."""
    rewards = [
        [0.1, 0.4, 0.9, NAN],  # - - + .   0.9 is a false positive
        [1.5, 2.0, 4.0, 2.1],  # - - + -   1.5, 2.0, 2.1 are false negatives
        [0.5, 0.95, 1.6, 0.9],  # - - + -   neither
        [2.0, 2.0, 2.0, 2.0],  # no signal
    ]
    advantage = [[-0.5, 0.2, 0.3, 0.0], [1.0, 1.0, 1.0, -1.0], [-0.1, -0.2, 0.3, -0.4], [0.0, 0.0, 0.0, 0.0]]
    return torch.tensor(rewards, dtype=torch.float64), torch.tensor(advantage, dtype=torch.float64)


@pytest.mark.parametrize(("count", "positive", "negative"), [(3, 1 / 15, 3 / 15), (0, 0.0, 0.0)])
def test_statistics_by_hand(count: int, positive: float, negative: float) -> None:
    """Before the first iteration there is no level, so no false positives or negatives."""
    statistic = advantage_statistics(*example(), capability((1.0,), (0.5,), count)[0])
    assert {name: float(value) for name, value in statistic.items()} == pytest.approx(
        {
            "mean_abs": 6.0 / 16,
            "false_positive": positive,
            "false_negative": negative,
            "turned": 3 / 15,
            "equal_groups": 1 / 4,
            "failed": 1 / 16,
        },
        abs=1e-7,
    )
    assert all(value.ndim == 0 for value in statistic.values())


def test_reward_at_the_level_is_not_a_false_negative() -> None:
    """False negative is local < 0 and R > level, strictly: of 1, 2, 6 at level 1 only 2 is one."""
    rewards = torch.tensor([[1.0, 2.0, 6.0]], dtype=torch.float64)
    statistic = advantage_statistics(rewards, torch.zeros_like(rewards), capability((1.0,), (0.5,))[0])
    assert float(statistic["false_negative"]) == pytest.approx(1 / 3)


def test_statistics_without_a_valid_sample() -> None:
    rewards = torch.full((2, 3), NAN, dtype=torch.float64)
    statistic = advantage_statistics(rewards, torch.zeros_like(rewards), capability((1.0,), (0.5,))[0])
    expected = {"false_positive": 0, "false_negative": 0, "turned": 0, "equal_groups": 1, "failed": 1, "mean_abs": 0}
    assert {name: float(value) for name, value in statistic.items()} == expected
