"""Groups over several anchors, and advantages summed over tails, against loops."""

from __future__ import annotations

import statistics

import pytest
import torch
from toy import toy_config, toy_trainer

from adagrpo.algorithm.selection import CapabilityState
from adagrpo.engine.fusion import Fusion


def standardised(rewards: list[float]) -> list[float]:
    return [(r - statistics.fmean(rewards)) / (statistics.stdev(rewards) + 1e-8) for r in rewards]


def test_the_samples_of_all_anchors_of_a_prompt_are_one_group() -> None:
    """2 prompts x 3 anchors x 2 steps x 2 members; rewards are ordered (prompt, anchor, step, member)."""
    rewards = torch.randn(1, 12, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    fusion = Fusion(("a",), torch.ones(1), weight=0.0, seeds=3, steps=2)
    found, _ = fusion(rewards, CapabilityState.for_rewards(1), 0)
    by_place, truth = found.reshape(2, 3, 2, 2), rewards.reshape(2, 3, 2, 2)
    for prompt in range(2):
        for step in range(2):
            expected = standardised(truth[prompt, :, step].flatten().tolist())
            assert by_place[prompt, :, step].flatten().tolist() == pytest.approx(expected, rel=1e-9)


def test_advantages_under_several_tails_are_summed() -> None:
    """Two rewards of weights 1 and 0.5 under two tails each, ordered (reward, tail); the level is the reward's."""
    rewards = torch.randn(4, 3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    level = CapabilityState(torch.tensor([0.2, -0.3]).double(), torch.tensor([4.0, 0.25]).double(), torch.ones(2).long())
    names, weights = ("a_tail0", "a_tail1", "b_tail0", "b_tail1"), torch.tensor([1.0, 1.0, 0.5, 0.5])
    fusion = Fusion(names, weights, calibration="zscore", tails=2)
    found, metrics = fusion(rewards, level, 0)
    for group in range(3):
        expected = [0.0] * 5
        for m, (mean, std) in enumerate([(0.2, 2.0)] * 2 + [(-0.3, 0.5)] * 2):
            values = rewards[m, group].tolist()
            for i, (value, local) in enumerate(zip(values, standardised(values), strict=True)):
                expected[i] += float(weights[m]) * (local + max(-5.0, min(5.0, (value - mean) / (std + 1e-8))))
        assert found[group].tolist() == pytest.approx(expected, rel=1e-6)
    assert float(metrics["reward/train_3_b_tail1"]) == pytest.approx(float(rewards[3].mean()))


def test_a_recipe_sums_the_advantages_under_its_tails_undivided() -> None:
    """2 prompts x 2 forks x 4 members, each under tails of one and of two places."""
    plain = {"selection": {"candidates": 1}, "advantage": {"weight": 0.0}}
    trainer = toy_trainer(toy_config(rollout={"granularities": (1, 2)}, **plain))
    rewards = torch.randn(2, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    found, _ = trainer.advantage(rewards)
    for group in range(4):
        under = [standardised(rewards[tail, group].tolist()) for tail in range(2)]
        assert found[group].tolist() == pytest.approx([sum(both) for both in zip(*under, strict=True)], rel=1e-6)
