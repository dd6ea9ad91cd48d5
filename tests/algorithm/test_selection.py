"""Capability state, prompt selection and the curriculum object."""

from __future__ import annotations

import math

import pytest
import torch

from adagrpo.algorithm.selection import (
    STRATEGIES,
    CapabilityCurriculum,
    CapabilityState,
    select_prompt,
    update_capability,
)

NAN = math.nan


def test_std_has_a_floor() -> None:
    """sqrt(max(var, 1e-8))."""
    state = CapabilityState(torch.zeros(4), torch.tensor([0.0, 1e-9, 4e-8, 0.25], dtype=torch.float64), torch.ones(4))
    assert state.std.tolist() == pytest.approx([1e-4, 1e-4, 2e-4, 0.5], rel=1e-12)


def test_state_per_reward() -> None:
    """Scores [M, slots, B]: reward m against its own level, whatever the number of slots."""
    scores = torch.tensor([[[1.0, 3.0], [5.0, 7.0]], [[NAN, 10.0], [30.0, NAN]]])
    state = update_capability(CapabilityState.for_rewards(2), scores, 0.5)
    assert (state.mean.tolist(), state.var.tolist(), state.count.tolist()) == ([4, 20], [5, 100], [1, 1])
    state = update_capability(state, torch.tensor([[2.0, 2.0], [NAN, NAN]]), 0.5)
    assert (state.mean.tolist(), state.var.tolist(), state.count.tolist()) == ([3, 20], [2.5, 100], [2, 1])
    assert state.mean.dtype is torch.float64
    one = state[1]
    assert (float(one.mean), float(one.var), int(one.count), float(one.std)) == (20, 100, 1, 10)
    assert one.mean.ndim == 0


def test_update_leaves_the_old_state_alone() -> None:
    state = CapabilityState()
    update_capability(state, torch.tensor([4.0, 6.0]), 0.8)
    assert (float(state.mean), float(state.var), int(state.count)) == (0, 0, 0)


@pytest.mark.parametrize("alpha", [-0.1, 1.0, NAN])
def test_alpha_errors(alpha: float) -> None:
    with pytest.raises(ValueError, match="alpha"):
        update_capability(CapabilityState(), torch.zeros(3), alpha)
    with pytest.raises(ValueError, match="alpha"):
        CapabilityCurriculum(alpha=alpha)


def test_unknown_strategy() -> None:
    for call in (
        lambda: CapabilityCurriculum(strategy="best"),
        lambda: select_prompt(torch.zeros(2), CapabilityState(), ""),
    ):
        with pytest.raises(ValueError, match="strategy"):
            call()


@pytest.mark.parametrize(
    ("strategy", "expected"),
    [("closest", [1, 2, -1]), ("easiest", [2, 0, -1]), ("hardest", [0, 2, -1]), ("medium", [1, 1, -1])],
)
def test_select_per_slot(strategy: str, expected: list[int]) -> None:
    """Level 1: distances are 2, 1, 3 and 7, 4, 0.5."""
    state = CapabilityState(torch.tensor(1.0).double(), torch.tensor(4.0).double(), torch.tensor(1))
    scores = torch.tensor([[-1.0, 2.0, 4.0], [8.0, 5.0, 0.5], [NAN, NAN, NAN]])
    chosen = select_prompt(scores, state, strategy)
    assert chosen.dtype is torch.int64
    assert chosen.tolist() == expected


def test_several_rewards_use_the_floored_std() -> None:
    """Reward 1 has never varied: its std is 1e-4, so a thousandth off there outweighs a full std in reward 0."""
    state = CapabilityState(
        torch.tensor([0.0, 5.0]).double(), torch.tensor([1.0, 0.0]).double(), torch.ones(2, dtype=torch.int64)
    )
    scores = torch.tensor([[[0.0, 1.0]], [[5.001, 5.0]]]).double()
    assert select_prompt(scores, state, reward_weights=torch.tensor([1.0, 1.0])).tolist() == [1]
    assert select_prompt(scores, state, reward_weights=torch.tensor([20.0, 1.0])).tolist() == [0]


def test_random_draws_from_the_generator() -> None:
    """Only valid candidates, all of them, one draw per slot, repeatable."""
    scores = torch.tensor([1.0, NAN, 2.0, 3.0]).expand(300, 4)
    torch.manual_seed(5)
    chosen = select_prompt(scores, CapabilityState(), "random")
    torch.manual_seed(5)
    assert torch.equal(chosen, select_prompt(scores, CapabilityState(), "random"))
    assert chosen.shape == (300,)
    assert set(chosen.tolist()) == {0, 2, 3}
    weights = torch.ones(2)
    several = select_prompt(scores.expand(2, 300, 4), CapabilityState.for_rewards(2), "random", weights)
    assert several.shape == (300,)
    assert set(several.tolist()) == {0, 2, 3}


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_random_given_draws_or_none_needed(strategy: str) -> None:
    scores = torch.tensor([[2.0, 2.0], [2.0, 2.0]])
    uniform = torch.tensor([0.2, 0.7])
    chosen = select_prompt(scores, CapabilityState(), strategy, uniform=uniform)
    assert chosen.tolist() == ([0, 1] if strategy == "random" else [0, 0])


def test_curriculum_folds_in_before_selecting() -> None:
    """Level 0, then scores of mean 0.5: against the old level -0.1 is closest, against the new 0.1 it is 0.15."""
    curriculum = CapabilityCurriculum(alpha=0.8)
    assert math.isnan(curriculum.mean)
    assert math.isnan(curriculum.std)
    assert curriculum.select([0.0, 0.0, 0.0]) == 0
    assert (curriculum.mean, curriculum.std) == pytest.approx((0.0, 1e-4))
    assert curriculum.select([-0.1, 0.15, 1.45]) == 1
    assert curriculum.mean == pytest.approx(0.1, abs=1e-7)
    # Variance of the three scores: (0.36 + 0.1225 + 0.9025)/3.
    assert curriculum.std == pytest.approx(math.sqrt(0.2 * 1.385 / 3), rel=1e-7)


def test_first_call_selects_against_its_own_mean() -> None:
    assert CapabilityCurriculum().select(torch.tensor([0.0, 10.0, 4.0, 6.0])) == 2


@pytest.mark.parametrize(("strategy", "expected"), [("easiest", 1), ("hardest", 3), ("medium", 0), ("closest", 2)])
def test_curriculum_strategies(strategy: str, expected: int) -> None:
    """Mean 3.25, lower median 2."""
    assert CapabilityCurriculum(strategy=strategy).select([2.0, 7.0, 4.0, 0.0, NAN]) == expected


@pytest.mark.parametrize("scores", [[], [NAN, math.inf], 1.0, [[[1.0, 2.0]]], [[1.0, 2.0], [NAN, NAN]]])
def test_curriculum_errors_leave_the_state(scores: list) -> None:
    curriculum = CapabilityCurriculum()
    curriculum.select([1.0, 3.0])
    with pytest.raises(ValueError, match="scores"):
        curriculum.select(scores)
    assert (curriculum.mean, curriculum.std, int(curriculum.state.count)) == (2.0, 1.0, 1)


def test_state_dict_round_trip() -> None:
    """A resumed curriculum continues exactly, and shares no memory with the checkpoint."""
    batches = ([1.0, 2.0, 4.0], [0.3, NAN, 0.7], [2.0, 1.9, 2.1], [0.5, 5.5, 1.1])
    whole, first = CapabilityCurriculum(), CapabilityCurriculum()
    for scores in batches[:2]:
        whole.select(scores)
        first.select(scores)
    saved = first.state_dict()
    resumed = CapabilityCurriculum()
    resumed.load_state_dict(saved)
    for value in saved.values():
        value.zero_()
    for scores in batches[2:]:
        assert resumed.select(scores) == whole.select(scores)
    assert (resumed.mean, resumed.std) == (whole.mean, whole.std)
    assert int(resumed.state.count) == int(whole.state.count) == 4
