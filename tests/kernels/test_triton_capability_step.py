"""The curriculum kernel against the reference: EMA, every strategy, distances and the status word."""

from __future__ import annotations

import pytest
import torch
from adagrpo_kernels import Draw, capability_step, capability_step_reference
from adagrpo_kernels.capability_step import NO_CANDIDATE, NO_UPDATE, STRATEGIES
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from triton_cases import randn

NAN, INF = float("nan"), float("inf")


def state(rewards: int, count: int) -> tuple[Tensor, Tensor, Tensor]:
    m = torch.arange(rewards, dtype=torch.float64)
    return 0.5 - 0.1 * m, 0.2 + 0.1 * m, torch.full((rewards,), count)


def check(device: str, scores: Tensor, strategy: str, count: int = 3, seed: int = 5) -> int:
    """Same picks, count and status; EMA and distances to 1e-13 relative, a few hundred roundings of float64."""
    rewards, slots = scores.shape[:2]
    weights = None if rewards == 1 else 0.5 + torch.arange(rewards) / 4
    on = lambda t: None if t is None else t.to(device)  # noqa: E731
    draw = Draw(seed, torch.arange(slots), 4, 7)
    arguments = [on(t) for t in (scores, *state(rewards, count))]
    found = capability_step(*arguments, 0.8, strategy, on(weights), draw._replace(rows=on(draw.rows)), "triton")
    expected = capability_step_reference(scores, *state(rewards, count), 0.8, strategy, weights, draw)
    for name, a, b in zip(found._fields, found, expected, strict=True):
        torch.testing.assert_close(a.cpu(), b, rtol=1e-13, atol=1e-14, equal_nan=True, msg=f"{name}: {a} != {b}")
    return int(found.status)


def scores_of(rewards: int, slots: int, candidates: int, seed: int = 1) -> Tensor:
    return 0.5 + 0.4 * randn(rewards, slots, candidates, seed=seed).double()


@pytest.mark.parametrize("count", [0, 3])
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("shape", [(1, 1, 10), (1, 7, 5), (3, 2, 4), (1, 1, 1)])
def test_against_reference(device: str, shape: tuple[int, int, int], strategy: str, count: int) -> None:
    assert check(device, scores_of(*shape), strategy, count) == 0


@pytest.mark.parametrize("rewards", [1, 2])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_failed_probes_ties_and_status(device: str, strategy: str, rewards: int) -> None:
    scores = torch.tensor([[NAN, 0.5, INF, 0.9, -INF], [NAN] * 5, [0.7] * 5, [0.9, 0.1, 0.1, 0.9, NAN]], dtype=torch.float64)
    scores = scores.expand(rewards, 4, 5).clone()
    assert check(device, scores, strategy) == NO_CANDIDATE
    assert check(device, torch.full_like(scores, NAN), strategy) == NO_CANDIDATE | NO_UPDATE
    if rewards > 1:
        scores[0, 1], scores[1] = 0.3, INF
        assert check(device, scores, strategy) == NO_CANDIDATE | NO_UPDATE


def test_ties_go_to_the_first(device: str) -> None:
    """Equal scores are never told apart, whatever rounding does to their distance."""
    scores = torch.tensor([[[0.1, 0.7, 0.7, 0.7], [0.7, 0.7, 0.1, 0.1]]], dtype=torch.float64)
    for strategy, expected in (("easiest", [1, 0]), ("hardest", [0, 2]), ("medium", [1, 2])):
        found = capability_step(*(t.to(device) for t in (scores, *state(1, 3))), 0.8, strategy, impl="triton")
        assert found.picks.tolist() == expected, strategy


def test_scores_count_before_the_choice(device: str) -> None:
    """The EMA takes the scores in first: an empty one starts at their mean, 5, to which 4 is closest."""
    scores = torch.tensor([[[0.0, 4.0, 11.0]]], dtype=torch.float64)
    found = capability_step(*(t.to(device) for t in (scores, *state(1, 0))), 0.8, impl="triton")
    assert found.picks.tolist() == [1] and float(found.mean) == 5 and float(found.distance) == 1


@pytest.mark.parametrize("candidates", [64, 300])
def test_many_candidates(device: str, candidates: int) -> None:
    for strategy in ("closest", "random") if candidates > 64 else STRATEGIES:
        check(device, scores_of(1, 2, candidates), strategy)


@pytest.mark.proof
def test_many_slots(device: str) -> None:
    for strategy in STRATEGIES:
        check(device, scores_of(2, 96, 10), strategy)


@settings(max_examples=20, deadline=None, derandomize=True)
@given(st.integers(1, 3), st.integers(1, 6), st.integers(1, 20), st.sampled_from(STRATEGIES), st.integers(0, 2**63))
def test_any_shape(rewards: int, slots: int, candidates: int, strategy: str, seed: int) -> None:
    check("cpu", scores_of(rewards, slots, candidates, seed=2), strategy, seed=seed)


def test_errors() -> None:
    scores = scores_of(2, 1, 3)
    with pytest.raises(ValueError, match="reward_weights"):
        capability_step(scores, *state(2, 0), 0.8)
    with pytest.raises(ValueError, match="draw"):
        capability_step(scores[:1], *state(1, 0), 0.8, "random")
    with pytest.raises(ValueError, match="strategy"):
        capability_step(scores[:1], *state(1, 0), 0.8, "best")
