"""Planned calls of parts made by hand, against rows counted by hand."""

import pytest

from adagrpo.curriculum.base import Leg
from adagrpo.engine.plans import Window
from adagrpo.engine.sampling import ForkSampler, GroupShape, Sampler, StepSchedule, TrajectorySampler
from adagrpo.engine.share import Share
from adagrpo.engine.update import Objective
from adagrpo.estimate.calls import decoded, iteration_calls


def schedule(window: Window | None = None, trained: int = 2) -> StepSchedule:
    return StepSchedule(6, (0, 2), window, trained, seed=0)


def test_a_probe_and_its_forks() -> None:
    """2 slots: a leg of 6 rows over 2 steps, then one of 4 over the rest; groups of 3 forked at the steps 0 and 2 of 6."""
    legs = [Leg(6, (0, 1), (6,)), Leg(4, (2, 3, 4, 5), (2,))]
    sampler = ForkSampler(schedule(), GroupShape(3, slots_per_batch=2))
    calls = iteration_calls(legs, sampler, Objective(), slots=2)
    assert calls["probe"] == [6, 6, 4, 4, 4, 4]
    assert calls["prefix"] == calls["update"] == [4]  # each fork once, whatever its members
    assert calls["rollout"] == [6, 6, 12, 12, 12]  # 2 slots x 3 members from step 1 on, as many more from step 3 on
    assert calls["decode"] == [6, 2, 12]
    assert list(calls) == ["probe", "prefix", "rollout", "decode", "update"]


def test_trajectories_without_a_probe() -> None:
    """2 slots x 3 members over 6 steps; the 12 stored transitions in a micro-batch per slot, by halves of the steps."""
    sampler = TrajectorySampler(schedule(), GroupShape(3, optimizer_steps=2, slots_per_batch=1))
    calls = iteration_calls([], sampler, Objective(old_logp="recompute", kl_weight=0.1), slots=2)
    assert calls["rollout"] == [6] * 6 and "probe" not in calls and "prefix" not in calls
    assert calls["recompute"] == calls["update"] == calls["reference"] == [3, 3, 3, 3]


@pytest.mark.parametrize(("trained", "update"), [(1, 6), (4, 24)])
def test_a_window_trains_a_share_of_its_steps(trained: int, update: int) -> None:
    sampler = TrajectorySampler(schedule(Window(4, 0, 5), trained), GroupShape(3, slots_per_batch=2))
    assert iteration_calls([], sampler, Objective(), slots=2)["update"] == [update]


def test_shortened_tails_end_together() -> None:
    """Two evaluations after either fork: all 12 rows at once."""
    calls = iteration_calls([], ForkSampler(schedule(), GroupShape(3)), Objective(), 2, tails={0: [(12, 13)], 2: [(14, 15)]})
    assert calls["rollout"] == [12, 12]


def test_stored_velocities_need_no_call() -> None:
    sampler = ForkSampler(schedule(), GroupShape(3), fresh_velocity=False)
    assert "prefix" not in iteration_calls([], sampler, Objective(), 2)


def test_the_decoder_splits_what_the_transformer_finishes() -> None:
    assert decoded([10, 3], max_rows=4, decode_rows=3) == [3, 1, 3, 1, 2, 3]
    assert decoded([10, 3], 0, 0) == [10, 3]


@pytest.mark.parametrize("iteration", range(4))
@pytest.mark.parametrize("kind", [ForkSampler, TrajectorySampler])
def test_no_iteration_runs_more_than_its_plan(kind: type, iteration: int) -> None:
    """One of the two steps is trained in each iteration; the plan takes both."""
    sampler: Sampler = kind(schedule(trained=1), GroupShape(3))
    assert sampler.plan(Share.alone(2), iteration=iteration).evaluations() <= sampler.plan(Share.alone(2)).evaluations()
    assert sampler.plan(Share.alone(2), iteration=iteration).num_rows == 2 * sampler.rows_per_slot(iteration)
