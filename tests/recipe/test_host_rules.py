"""What the keys of other host algorithms may not hold, and what goes together."""

from __future__ import annotations

from typing import Any

import pytest
from toy import toy_config

from adagrpo.recipe.derived import Derived
from adagrpo.recipe.rules import problems

TRAJECTORY: dict[str, Any] = {"rollout": {"plan": "trajectory", "sde_steps": (0, 1, 2, 3)}, "loss": {"old_logp": "recompute"}}
WINDOW: dict[str, Any] = {"rollout": {"plan": "window", "window_size": 2}, "loss": {"old_logp": "recompute"}}


def first_problem(*changes: dict[str, Any]) -> str:
    """The first one of the toy recipe with these sections; empty if there is none."""
    sections: dict[str, dict[str, Any]] = {}
    for change in changes:
        for section, keys in change.items():
            sections.setdefault(section, {}).update(keys)
    found = next(problems(toy_config(**sections)), None)
    return "" if found is None else f"{found[0]} = {found[1]}: {found[2]}"


@pytest.mark.parametrize(
    ("base", "changes", "message"),
    [
        (TRAJECTORY, {"train": {"steps_per_iteration": 3}}, "must divide the 4 trained steps"),
        (TRAJECTORY, {"train": {"steps_per_iteration": 3, "update_by": "slots"}}, "must divide the 2 prompts"),
        (TRAJECTORY, {"train": {"steps_per_iteration": 3, "update_by": "samples"}}, "must divide the 4 samples"),
        (TRAJECTORY, {"train": {"steps_per_iteration": 4, "update_by": "samples"}}, ""),
        ({}, {"train": {"steps_per_iteration": 2, "update_by": "samples"}}, "share one transition"),
        ({}, {"train": {"steps_per_iteration": 2, "update_by": "slots"}}, ""),
        ({}, {"train": {"update_by": "slots"}}, "needs train.steps_per_iteration above 1"),
        ({}, {"loss": {"ratio": "guard"}, "rollout": {"scheme": "cps"}}, "needs a Gaussian"),
        ({}, {"loss": {"ratio": "guard_batch"}, "rollout": {"scheme": "cps"}}, "needs a Gaussian"),
        ({}, {"loss": {"kl_space": "velocity"}}, "needs loss.kl_weight above 0"),
        ({}, {"loss": {"kl_weight": 0.1, "kl_space": "logp", "kl_variance": "none"}}, "needs loss.kl_space = mean"),
        ({}, {"advantage": {"std_floor": 0.2}}, "needs advantage.std = floored"),
        ({}, {"advantage": {"std": "none", "eps": 0.1}}, "needs another advantage.std than none"),
        ({}, {"advantage": {"ddof": 2}}, "must be at most 1"),
        ({}, {"advantage": {"std": "global", "ddof": 0, "eps": 1e-4, "clip_of": "sum"}}, ""),
        (WINDOW, {"rollout": {"window_range": (1, 4), "window_order": "random"}}, ""),
        (WINDOW, {"rollout": {"window_range": (3, 4)}}, "the length of rollout.window_range = 1"),
        (WINDOW, {"rollout": {"window_range": (3, 6)}}, "must be two steps, rising, within 0 … 5"),
        (WINDOW, {"rollout": {"window_range": (1, 2, 3)}}, "must be two steps"),
        (WINDOW, {"rollout": {"window_order": "random", "window_stride": 2}}, "needs rollout.window_order = sliding"),
        ({}, {"rollout": {"window_order": "random"}}, "needs rollout.plan = window"),
        ({}, {"optimizer": {"ema_every": 8}}, "needs optimizer.ema_decay above 0"),
        ({}, {"rollout": {"granularities": (2, 1)}}, "rising, without repeats"),
        ({}, {"rollout": {"granularities": ()}}, "at least one number"),
        ({}, {"rollout": {"granularities": (1, 2), "tail_steps": 2}}, "already says how long"),
        ({}, {"rollout": {"granularities": (1, 2)}, "advantage": {"equal_groups": "refill"}}, "know keep only"),
        ({}, {"rollout": {"granularities": (1, 2)}, "selection": {"probe": "memory"}}, "know full only"),
        ({}, {"rollout": {"granular_end": "released"}}, "needs a step of rollout.granularities above 1"),
        (TRAJECTORY, {"rollout": {"seeds": 2}}, "needs rollout.plan = fork"),
        ({}, {"rollout": {"seeds": 2, "fork_velocity": "probe"}, "loss": {"old_logp": "detached"}}, "needs fresh"),
        ({}, {"advantage": {"groups": "prompt"}}, "needs rollout.seeds above 1"),
        ({}, {"rollout": {"seeds": 2}, "advantage": {"groups": "prompt", "equal_groups": "skip"}}, "know keep only"),
        ({}, {"rollout": {"step_per_prompt": True}}, "needs rollout.plan = trajectory"),
        (TRAJECTORY, {"rollout": {"step_per_prompt": True, "trained_share": 0.5}}, "must be 1 with"),
        (TRAJECTORY, {"rollout": {"step_per_prompt": True, "tail_steps": 2}}, "must be 0 with"),
        (TRAJECTORY, {"rollout": {"step_per_prompt": True, "tail_share": 0.5}}, "must be 0 with"),
        ({}, {"rollout": {"granularities": (1, 2), "tail_share": 0.5}}, "already says how long"),
        ({}, {"rollout": {"tail_steps": 2, "tail_share": 0.5}}, "already says how long"),
        ({}, {"rollout": {"tail_share": 1.5}}, "must be at most 1"),
        (WINDOW, {"rollout": {"tail_share": 0.5, "tail_solver": "euler"}}, ""),
        (TRAJECTORY, {"rollout": {"step_per_prompt": True}}, ""),
        (TRAJECTORY, {"rollout": {"trained_of": "sample"}}, "rollout.trained_share below 1"),
        ({}, {"rollout": {"trained_of": "sample", "trained_share": 0.5}}, "without forks"),
        (TRAJECTORY, {"rollout": {"trained_of": "sample", "trained_share": 0.5}}, ""),
    ],
)
def test_problems(base: dict, changes: dict, message: str) -> None:
    found = first_problem(base, changes)
    assert message in found if message else found == "", found


def test_a_floor_under_the_spread_needs_the_probes_scores() -> None:
    """Without a filter and without fusion nothing else reads them."""
    plain = {"selection": {"candidates": 1}, "advantage": {"weight": 0.0}}
    assert not Derived(toy_config(**plain)).scores_needed
    assert Derived(toy_config(selection={"candidates": 1}, advantage={"weight": 0.0, "std": "floored"})).scores_needed
