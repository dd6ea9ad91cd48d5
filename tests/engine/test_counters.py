"""Evaluations and calls of executed iterations, against the counts of the paper's schedule worked out by hand."""

import pytest
from toy import ToyModel, toy_config, toy_trainer

from adagrpo.engine.plans import update_batches, window_steps
from adagrpo.forecast import planned_evaluations
from adagrpo.recipe.keys import Config

OFFICIAL = {"steps": 16, "sde_steps": (0, 2, 4, 6), "group_size": 12}


def official(**sections) -> Config:
    rollout = OFFICIAL | sections.pop("rollout", {})
    train = {"slots": 1} | sections.pop("train", {})
    return toy_config(rollout=rollout, train=train, selection={"candidates": 10} | sections.pop("selection", {}), **sections)


def executed(config: Config) -> tuple[dict[str, tuple[int, int]], list[int]]:
    model = ToyModel()
    trainer = toy_trainer(config, model)
    trainer.iteration()
    counts = {phase: (count.evaluations, count.calls) for phase, count in trainer.executor.counts.items()}
    assert sum(model.calls) == sum(evaluations for evaluations, _ in counts.values())
    assert len(model.calls) == sum(calls for _, calls in counts.values())
    assert planned_evaluations(config) == {phase: evaluations for phase, (evaluations, _) in counts.items()}
    return counts, model.calls


def test_default_schedule() -> None:
    counts, calls = executed(official())
    assert counts == {"probe": (160, 16), "prefix": (4, 1), "rollout": (576, 15), "update": (4, 1)}
    assert calls == [10] * 16 + [4] + [12, 12, 24, 24, 36, 36] + [48] * 9 + [4]


def test_schedule_of_the_released_code() -> None:
    config = official(
        rollout={"fork_velocity": "probe"}, loss={"old_logp": "detached"}, train={"steps_per_iteration": 4, "slots": 1}
    )
    counts, calls = executed(config)
    assert counts == {"probe": (160, 16), "rollout": (576, 15), "update": (4, 4)}
    assert sum(calls) - 4 == 736 and calls[-4:] == [1, 1, 1, 1]


def test_without_curriculum_the_probe_is_the_anchor() -> None:
    counts, _ = executed(official(selection={"candidates": 1}))
    assert sum(evaluations for evaluations, _ in counts.values()) == 600


def test_a_call_never_exceeds_max_rows() -> None:
    import dataclasses

    from adagrpo.recipe.keys import EngineConfig

    config = dataclasses.replace(official(), engine=EngineConfig(max_rows=7))
    counts, calls = executed(config)
    assert max(calls) == 7
    assert {phase: evaluations for phase, (evaluations, _) in counts.items()} == {
        "probe": 160, "prefix": 4, "rollout": 576, "update": 4,
    }  # fmt: skip


@pytest.mark.parametrize("plan", ["trajectory", "window"])
def test_trajectories(plan: str) -> None:
    config = toy_config(
        rollout={"plan": plan, "steps": 6, "sde_steps": (0, 1, 2, 3, 4), "window_size": 5, "trained_share": 0.6},
        loss={"old_logp": "recompute"},
        selection={"candidates": 1},
        advantage={"weight": 0.0},
    )
    counts, _ = executed(config)
    # 2 slots x 4 members x 6 steps; 3 of the 5 stochastic steps are trained.
    assert counts == {"rollout": (48, 6), "recompute": (24, 1), "update": (24, 1)}


def test_update_batches_deal_steps_to_optimizer_steps_and_slots_to_micro_batches() -> None:
    # transitions are numbered (slot, sample, step): 2 slots, 1 sample, 4 steps
    batches = update_batches(2, 1, 4, optimizer_steps=2, slots_per_batch=1, max_rows=0)
    assert [[b.tolist() for b in step] for step in batches] == [[[0, 1], [4, 5]], [[2, 3], [6, 7]]]
    batches = update_batches(1, 2, 3, optimizer_steps=1, slots_per_batch=1, max_rows=4)
    assert [[b.tolist() for b in step] for step in batches] == [[[0, 1, 2, 3], [4, 5]]]


def test_window_moves_and_wraps_and_spares_the_last_step() -> None:
    seen = [window_steps(i, num_steps=6, size=2, stride=1, every=2) for i in range(10)]
    assert seen[:4] == [(0, 1), (0, 1), (1, 2), (1, 2)]
    assert seen[6] == (3, 4) and seen[8] == (0, 1)
