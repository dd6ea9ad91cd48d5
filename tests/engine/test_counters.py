"""Evaluations and calls of executed iterations, against the counts of the paper's schedule worked out by hand."""

import dataclasses

import pytest
import torch
from toy import ToyModel, toy_config, toy_trainer

from adagrpo.engine.plans import Window, update_batches
from adagrpo.engine.ranks import Ranks
from adagrpo.engine.sampling import StepSchedule
from adagrpo.engine.share import Share
from adagrpo.forecast import planned_evaluations
from adagrpo.recipe.keys import Config, EngineConfig

OFFICIAL = {"steps": 16, "sde_steps": (0, 2, 4, 6), "group_size": 12}


def official(**sections) -> Config:
    rollout = OFFICIAL | sections.pop("rollout", {})
    train = {"slots": 1} | sections.pop("train", {})
    return toy_config(rollout=rollout, train=train, selection={"candidates": 10} | sections.pop("selection", {}), **sections)


def executed(config: Config, before: int = 0) -> tuple[dict[str, tuple[int, int]], list[int]]:
    """Of the iteration after ``before`` others."""
    model = ToyModel()
    trainer = toy_trainer(config, model)
    for _ in range(before + 1):
        model.calls.clear()
        trainer.iteration()
    counts = {phase: (count.evaluations, count.calls) for phase, count in trainer.executor.counts.items()}
    assert sum(model.calls) == sum(evaluations for evaluations, _ in counts.values())
    assert len(model.calls) == sum(calls for _, calls in counts.values())
    assert planned_evaluations(config, before) == {phase: evaluations for phase, (evaluations, _) in counts.items()}
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


@pytest.mark.parametrize(("before", "evaluations"), [(0, 2 + 3), (1, 3 + 3), (2, 4 + 2), (3, 5 + 1), (4, 2 + 3)])
def test_tails_behind_a_window(before: int, evaluations: int) -> None:
    """2 of 6 steps are stochastic, from step 0 … 3 on; behind them at most 3 more. A plan of no iteration takes the most."""
    config = toy_config(
        rollout={"plan": "window", "steps": 6, "window_size": 2, "window_every": 1, "tail_steps": 3},
        loss={"old_logp": "recompute"},
        selection={"candidates": 1},
        advantage={"weight": 0.0},
    )
    counts, _ = executed(config, before)
    assert counts["rollout"] == (8 * evaluations, evaluations) and counts["update"] == (16, 1)
    assert planned_evaluations(config)["rollout"] == 8 * 6


def test_anchors_of_several_seeds_and_tails_of_several_granularities() -> None:
    """2 slots, forks at 0 and 2 of 6 steps, 3 anchors each: 2 of them sampled apart; groups of 4, finished by tails of 5 and
    3 steps (from 1 over 2 and 4), or of 3 and 2 (from 3 over 4)."""
    config = toy_config(rollout={"seeds": 3, "granularities": (1, 2)}, selection={"candidates": 1})
    counts, _ = executed(config)
    tails = 2 * 3 * 4 * (5 + 3 + 3 + 2)
    assert counts["probe"][0] == 2 * 6 and counts["prefix"][0] == counts["update"][0] == 2 * 3 * 2
    assert counts["rollout"] == (2 * 2 * 6 + tails, 6 + 5)


def test_every_anchor_begins_from_noise_of_its_own() -> None:
    """2 slots x 3 anchors in 2 draws: 12 latents of 48 standard normals before the first step, which forks."""
    trainer = toy_trainer(toy_config(rollout={"seeds": 3}, selection={"candidates": 1}, advantage={"weight": 0.0}))
    begun = []
    for _ in range(2):
        transitions = trainer.draw().samples.transitions
        begun.append(transitions.latent[transitions.index == 6].flatten(1))
    assert len(torch.cat(begun)) == 12
    assert float(torch.pdist(torch.cat(begun)).min()) > 4  # of independent ones about 9.8


@pytest.mark.parametrize(("shared", "noises"), [(True, 2), (False, 8)])
def test_the_samples_of_a_group_begin_from_one_noise_or_each_from_its_own(shared: bool, noises: int) -> None:
    """2 slots x 4 members."""
    plain = {"selection": {"candidates": 1}, "advantage": {"weight": 0.0}, "loss": {"old_logp": "recompute"}}
    trainer = toy_trainer(toy_config(rollout={"plan": "trajectory", "shared_noise": shared}, **plain))
    transitions = trainer.draw().samples.transitions
    begun = transitions.latent[transitions.index == 6].flatten(1)
    assert len(begun) == 8 and len(begun.unique(dim=0)) == noises
    assert [len(group.unique(dim=0)) for group in begun.chunk(2)] == [noises // 2] * 2


def test_each_prompt_trains_a_step_of_its_own() -> None:
    """5 slots x 4 members x 6 steps in batches of 7: a row stores a transition, at its slot's step, which alone moves by noise;
    the steps change from iteration to iteration and do not depend on the batches."""
    config = toy_config(
        rollout={"plan": "trajectory", "sde_steps": (0, 1, 2, 3), "step_per_prompt": True},
        loss={"old_logp": "recompute"},
        train={"slots": 5},
        selection={"candidates": 1},
        advantage={"weight": 0.0},
    )
    chunked = dataclasses.replace(config, engine=EngineConfig(max_rows=7))
    found = []
    for recipe in (config, chunked):
        trainer = toy_trainer(recipe)
        kept, rollout = [], trainer.rollout
        trainer.rollout = lambda *given, rollout=rollout, kept=kept: kept.append(rollout(*given)) or kept[-1]
        numbers = [trainer.iteration()["policy/ratio_deviation"] for _ in range(3)]
        assert max(map(float, numbers)) <= 1e-6
        assert planned_evaluations(recipe, 2) == {p: count.evaluations for p, count in trainer.executor.counts.items()}
        found.append([samples.transitions for samples, _ in kept])
    table = trainer.executor.table
    for iteration, (whole, parts) in enumerate(zip(*found, strict=True)):
        steps = (whole.index - 6).reshape(5, 4)
        taken = trainer.sampler.plan(Share.alone(5), iteration=iteration).index  # rows of the table, from 6 on stochastic ones
        assert ((taken >= 6).sum(1) == 1).all() and taken.amax(1).tolist() == whole.index.tolist()
        assert (steps == steps[:, :1]).all() and set(steps.flatten().tolist()) <= {0, 1, 2, 3}
        assert whole.sample.flatten().tolist() == list(range(20)) and whole.slot.tolist() == [i // 4 for i in range(20)]
        assert torch.equal(whole.index, parts.index) and torch.equal(whole.sample, parts.sample)
        noise = (whole.successors[:, 0] - whole.mean).flatten(1).std(1) / table.w[whole.index]
        assert ((noise > 0.6) & (noise < 1.5)).all()  # 48 standard normals each
    assert len({tuple(t.index.tolist()) for t in found[0]}) == 3
    torch.testing.assert_close(found[0][0].latent, found[1][0].latent, rtol=1e-5, atol=1e-5)


def test_each_sample_trains_steps_that_it_draws() -> None:
    """2 slots x 4 members x 6 steps in batches of 3: 2 of the 4 stochastic steps of each row, rising, in the order of the rows;
    what the update replays is what was sampled there. A rank's samples have the steps that they have in a run of one."""
    config = toy_config(
        rollout={"plan": "trajectory", "sde_steps": (0, 1, 2, 4), "trained_share": 0.5, "trained_of": "sample"},
        loss={"old_logp": "rollout"},
        selection={"candidates": 1},
        advantage={"weight": 0.0},
    )
    found = []
    for recipe in (config, dataclasses.replace(config, engine=EngineConfig(max_rows=3))):
        trainer = toy_trainer(recipe)
        kept, rollout = [], trainer.rollout
        trainer.rollout = lambda *given, rollout=rollout, kept=kept: kept.append(rollout(*given)) or kept[-1]
        assert max(float(trainer.iteration()["policy/ratio_deviation"]) for _ in range(2)) <= 1e-5
        assert planned_evaluations(recipe, 1) == {p: count.evaluations for p, count in trainer.executor.counts.items()}
        found.append([samples.transitions for samples, _ in kept])
    for whole, parts in zip(*found, strict=True):
        steps = (whole.index - 6).reshape(8, 2)
        assert (steps[:, 0] < steps[:, 1]).all() and set(steps.flatten().tolist()) == {0, 1, 2, 4}
        assert all(len({tuple(row) for row in slot.tolist()}) > 1 for slot in steps.chunk(2))
        assert whole.sample.flatten().tolist() == [i // 2 for i in range(16)]
        assert torch.equal(whole.index, parts.index) and torch.equal(whole.sample, parts.sample)
    assert not torch.equal(found[0][0].index, found[0][1].index)
    schedule = StepSchedule(6, (0, 1, 2, 4), None, 2, 3, of_sample=True)
    second = schedule.of_rows(5, Share.dealt(Ranks(1, 2), 4), 3)
    assert second == schedule.of_rows(5, Share.alone(4), 3)[6:] and len(second) == 6


def test_update_batches_deal_steps_to_optimizer_steps_and_slots_to_micro_batches() -> None:
    # transitions are numbered (slot, sample, step): 2 slots, 1 sample, 4 steps
    batches = update_batches(2, 1, 4, optimizer_steps=2, slots_per_batch=1, max_rows=0)
    assert [[b.tolist() for b in step] for step in batches] == [[[0, 1], [4, 5]], [[2, 3], [6, 7]]]
    batches = update_batches(1, 2, 3, optimizer_steps=1, slots_per_batch=1, max_rows=4)
    assert [[b.tolist() for b in step] for step in batches] == [[[0, 1, 2, 3], [4, 5]]]


def test_update_batches_deal_slots_or_samples_to_optimizer_steps() -> None:
    """4 slots, 2 samples, 3 steps: optimizer steps of two slots each, or of one sample of every slot; all of their steps."""
    by_slot, by_sample = (update_batches(4, 2, 3, 2, slots_per_batch=2, max_rows=0, by=by) for by in ("slots", "samples"))
    assert [[b.tolist() for b in step] for step in by_slot] == [[list(range(12))], [list(range(12, 24))]]
    assert [[b.tolist() for b in step] for step in by_sample] == [
        [[0, 1, 2, 6, 7, 8], [12, 13, 14, 18, 19, 20]], [[3, 4, 5, 9, 10, 11], [15, 16, 17, 21, 22, 23]],
    ]  # fmt: skip


@pytest.mark.parametrize(("by", "rows"), [("slots", [16, 16]), ("samples", [8, 8, 8, 8])])
def test_optimizer_steps_over_prompts_or_samples(by: str, rows: list[int]) -> None:
    """2 slots x 4 members x 4 stochastic steps; the counts and the calls are those of the plan."""
    parts = len(rows)
    config = toy_config(
        rollout={"plan": "trajectory", "sde_steps": (0, 1, 2, 3)},
        loss={"old_logp": "recompute"},
        train={"slots": 2, "steps_per_iteration": parts, "update_by": by},
    )
    counts, calls = executed(config)
    assert counts["update"] == (32, parts) and calls[-parts:] == rows


def test_a_drawn_window_stays_within_its_range() -> None:
    """Three places for two of the steps 1 … 4; each is drawn, in no order, and the same each time."""
    window = Window(2, first=1, end=5, seed=7)
    seen = [window.steps(i) for i in range(60)]
    assert set(seen) == {(1, 2), (2, 3), (3, 4)} and seen == [Window(2, 1, 5, seed=7).steps(i) for i in range(60)]
    assert seen != [Window(2, 1, 5, seed=8).steps(i) for i in range(60)]
    assert len({(seen[i], seen[i + 1]) for i in range(59)}) > 5
    assert [Window(2, 1, 5).steps(i) for i in range(4)] == [(1, 2), (2, 3), (3, 4), (1, 2)]


def test_window_moves_and_wraps_and_spares_the_last_step() -> None:
    seen = [Window(2, 0, 5, every=2).steps(i) for i in range(10)]
    assert seen[:4] == [(0, 1), (0, 1), (1, 2), (1, 2)]
    assert seen[6] == (3, 4) and seen[8] == (0, 1)
