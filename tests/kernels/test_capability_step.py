"""Capability EMA and prompt selection against plain loops and hand-made cases."""

from __future__ import annotations

import math
import statistics

import pytest
import torch
from adagrpo_kernels import capability_update_reference, select_reference
from torch import Tensor

NAN, INF = math.nan, math.inf
ITERATIONS = (
    [0.9, 0.1, 0.4, -0.7, 1.3],
    [2.0, NAN, 3.0, INF, 2.5],
    [NAN, NAN, -INF, NAN, INF],
    [0.3, 0.3, 0.3, 0.3, 0.3],
    [14.25, 13.5, NAN, 12.0, 14.0],
)


def empty(shape: tuple[int, ...] = ()) -> tuple[Tensor, Tensor, Tensor]:
    return (
        torch.zeros(shape, dtype=torch.float64),
        torch.zeros(shape, dtype=torch.float64),
        torch.zeros(shape, dtype=torch.int64),
    )


def truth_ema(iterations: list[list[float]], alpha: float) -> tuple[float, float, int]:
    mean = var = 0.0
    count = 0
    for scores in iterations:
        finite = [s for s in scores if math.isfinite(s)]
        if not finite:
            continue
        memory = alpha if count else 0.0
        mean = memory * mean + (1 - memory) * statistics.fmean(finite)
        var = memory * var + (1 - memory) * statistics.pvariance(finite)
        count += 1
    return mean, var, count


@pytest.mark.parametrize("alpha", [0.8, 0.0, 0.95])
def test_update_over_iterations(alpha: float) -> None:
    """Mean and variance (ddof 0) of the finite scores; the first round initialises, an empty one changes nothing."""
    state = empty()
    for number in range(1, len(ITERATIONS) + 1):
        scores = torch.tensor(ITERATIONS[number - 1], dtype=torch.float64)
        before, state = state, capability_update_reference(*state, scores, alpha)
        mean, var, count = truth_ema(list(ITERATIONS[:number]), alpha)
        assert int(state[2]) == count
        assert [float(state[0]), float(state[1])] == pytest.approx([mean, var], rel=1e-12, abs=1e-14)
        if number == 3:
            assert all(torch.equal(a, b) for a, b in zip(before, state, strict=True))
    assert (state[0].dtype, state[2].dtype, state[0].shape) == (torch.float64, torch.int64, ())


def test_two_updates_by_hand() -> None:
    """Scores 1, 3 then 6, 6: mean .8*2 + .2*6, variance .8*1 + .2*0."""
    state = capability_update_reference(*empty(), torch.tensor([1.0, 3.0]), 0.8)
    assert [float(t) for t in state] == [2.0, 1.0, 1]
    state = capability_update_reference(*state, torch.tensor([6.0, 6.0]), 0.8)
    assert [float(t) for t in state] == pytest.approx([2.8, 0.8, 2], rel=1e-14)


def test_nothing_finite_leaves_an_empty_state_empty() -> None:
    state = capability_update_reference(*empty(), torch.tensor([NAN, INF]), 0.8)
    assert [float(t) for t in state] == [0.0, 0.0, 0]
    state = capability_update_reference(*state, torch.tensor([5.0, 7.0]), 0.8)
    assert [float(t) for t in state] == [6.0, 1.0, 1]


@pytest.mark.parametrize("shape", [(20,), (4, 5), (2, 2, 5)])
def test_scores_of_all_slots_count_alike(shape: tuple[int, ...]) -> None:
    scores = [math.sin(n) for n in range(20)]
    state = capability_update_reference(*empty(), torch.tensor(scores, dtype=torch.float64).reshape(shape), 0.8)
    assert float(state[0]) == pytest.approx(statistics.fmean(scores), rel=1e-12)
    assert float(state[1]) == pytest.approx(statistics.pvariance(scores), rel=1e-12)


def test_several_rewards_have_their_own_state() -> None:
    """Shape [M]: a reward that failed everywhere keeps its state while the other moves."""
    state = empty((2,))
    rounds = ([[1.0, 3.0], [10.0, 30.0]], [[NAN, NAN], [50.0, NAN]], [[4.0, 4.0], [0.0, 2.0]])
    for scores in rounds:
        state = capability_update_reference(*state, torch.tensor(scores, dtype=torch.float64), 0.8)
    for m in range(2):
        mean, var, count = truth_ema([scores[m] for scores in rounds], 0.8)
        assert [float(t[m]) for t in state] == pytest.approx([mean, var, count], rel=1e-12)


def pick(scores: list, strategy: str, mean: float = 0.0, uniform: float | list | None = None) -> int | list:
    draws = None if uniform is None else torch.tensor(uniform)
    tensor = torch.tensor(scores, dtype=torch.float64)
    return select_reference(tensor, torch.tensor(mean), torch.tensor(1.0), strategy, None, draws).tolist()


@pytest.mark.parametrize(
    ("strategy", "scores", "mean", "expected"),
    [
        ("closest", [3.0, 1.4, 2.2, 1.7], 2.0, 2),
        ("closest", [-1.0, 5.0, -3.0], -2.5, 2),
        ("closest", [3.0, 1.0, 1.0, 3.0], 2.0, 0),
        ("closest", [9.0, 1.0, 3.0, 1.0], 2.0, 1),
        ("closest", [NAN, 9.0, INF, 3.0, -INF], 2.0, 3),
        ("easiest", [1.0, 7.0, 2.0, 7.0], 0.0, 1),
        ("easiest", [NAN, -7.0, INF, -8.0], 0.0, 1),
        ("hardest", [5.0, -3.0, 2.0, -3.0], 0.0, 1),
        ("hardest", [NAN, 7.0, -INF, 8.0], 0.0, 1),
        ("medium", [5.0, 1.0, 3.0, 2.0, 4.0], 0.0, 2),
        ("medium", [4.0, 1.0, 3.0, 2.0], 0.0, 3),
        ("medium", [9.0, 3.0, 3.0, 1.0, 3.0], 0.0, 1),
        ("medium", [NAN, 8.0, INF, 6.0, -INF, 7.0], 0.0, 5),
        ("medium", [NAN, 8.0, 6.0], 0.0, 2),
        ("medium", [NAN, 8.0], 0.0, 1),
    ],
)
def test_select(strategy: str, scores: list[float], mean: float, expected: int) -> None:
    assert pick(scores, strategy, mean) == expected


@pytest.mark.parametrize("strategy", ["closest", "easiest", "hardest", "medium", "random"])
def test_select_per_slot(strategy: str) -> None:
    """Slots are independent; -1 where nothing is finite, the only finite one elsewhere, the first among equals."""
    scores = [[NAN, NAN, NAN], [NAN, NAN, 4.0], [INF, 4.0, -INF], [2.0, 2.0, 2.0]]
    assert pick(scores, strategy, 1.0, [0.0] * 4) == [-1, 2, 1, 0]
    assert pick([scores, scores[::-1]], strategy, 1.0, [[0.9, 0.9, 0.9, 0.0], [0.0, 0.9, 0.9, 0.9]]) == [
        [-1, 2, 1, 0],
        [0, 1, 2, -1],
    ]


@pytest.mark.parametrize(
    ("uniform", "expected"),
    [(0.0, 1), (0.33, 1), (0.34, 3), (0.66, 3), (0.67, 4), (1 - 2**-24, 4)],
)
def test_random_divides_the_unit_interval(uniform: float, expected: int) -> None:
    """Three valid candidates get a third each, in order."""
    assert pick([NAN, 5.0, INF, 1.0, 1.0, -INF], "random", 0.0, uniform) == expected


def test_random_is_fair() -> None:
    draws = (torch.arange(1200) + 0.5) / 1200
    scores = torch.tensor([[1.0, NAN, 3.0, 2.0]]).expand(1200, 4)
    chosen = select_reference(scores, torch.tensor(0.0), torch.tensor(1.0), "random", None, draws)
    assert chosen.bincount(minlength=4).tolist() == [400, 0, 400, 400]


@pytest.mark.parametrize(("weights", "expected"), [([1.0, 1.0], 2), ([1.0, 0.0], 0), ([0.0, 1.0], 1), ([1.0, 10.0], 1)])
def test_several_rewards_by_weighted_distance(weights: list[float], expected: int) -> None:
    """Distances in each EMA's own std: (0.1, 4), (2, 0.2), (0.5, 0.5), (4, 4 below); the last candidate failed once."""
    scores = torch.tensor([[10.2, 14.0, 11.0, 18.0, NAN], [0.9, 0.52, 0.55, 0.1, 0.5]], dtype=torch.float64)
    mean, std, factors = (torch.tensor(t, dtype=torch.float64) for t in ([10.0, 0.5], [2.0, 0.1], weights))
    assert select_reference(scores, mean, std, "closest", factors).tolist() == expected


@pytest.mark.parametrize(("strategy", "expected"), [("easiest", 1), ("hardest", 2), ("medium", 0)])
def test_several_rewards_by_weighted_level(strategy: str, expected: int) -> None:
    """Weighted sums of z: 0 + 1 = 1, 3 + 1 = 4, -2 + 0 = -2; the last candidate failed in one reward."""
    scores = torch.tensor([[[1.0, 4.0, -1.0, 9.0]], [[3.0, 3.0, 1.0, NAN]]], dtype=torch.float64)
    mean, std, weights = torch.tensor([1.0, 1.0]), torch.tensor([1.0, 2.0]), torch.tensor([1.0, 1.0])
    assert select_reference(scores, mean, std, strategy, weights).tolist() == [expected]


def test_errors() -> None:
    with pytest.raises(ValueError, match="strategy"):
        pick([1.0], "best")
    with pytest.raises(ValueError, match="uniform"):
        pick([1.0], "random")
