"""Every host's recipe trains, with AdaGRPO and without: its ratio begins at 1, and it evaluates what was predicted."""

from __future__ import annotations

import dataclasses
import functools
import math

import pytest
import torch

from adagrpo.build import build_model, build_trainer
from adagrpo.forecast import planned_evaluations
from adagrpo.recipe.keys import Config, RewardConfig
from adagrpo.recipe.load import load_recipe
from adagrpo.recipe.rules import check
from adagrpo.run.metrics import read_metrics

HOSTS = ["flow-grpo", "flow-grpo-fast", "dance-grpo", "flow-cps", "mix-grpo", "grpo-guard"]
SMALL = {
    "rollout": {"steps": 6, "group_size": 4, "storage": "bf16"},
    "train": {"slots": 2, "iterations": 2},
    "evaluation": {"every": 0, "final_prompts": 0},
    "output": {"grid_every": 0},
}


def small(name: str, ada: bool) -> Config:
    """The recipe on 6 steps, with its stochastic steps within them."""
    config = load_recipe(f"tiny-{name}")
    changes = {section: dict(keys) for section, keys in SMALL.items()}
    if config.rollout.plan == "trajectory":
        changes["rollout"]["sde_steps"] = (0, 1, 2, 3, 4)
    elif config.rollout.window_range:
        changes["rollout"]["window_range"] = (0, 3)
    changes["selection"], changes["advantage"] = ({"candidates": 3}, {"weight": 1.0}) if ada else ({}, {})
    sections = {s: dataclasses.replace(getattr(config, s), **keys) for s, keys in changes.items()}
    return dataclasses.replace(config, **sections, rewards=(RewardConfig("brightness"),))


@functools.cache
def weights(timestep: str) -> dict[str, torch.Tensor]:
    model = build_model(dataclasses.replace(load_recipe("tiny").model, timestep=timestep))
    return {name: p.detach().clone() for name, p in model.trainable()}


@pytest.mark.parametrize("ada", [False, True])
@pytest.mark.parametrize("name", HOSTS)
def test_two_iterations(name: str, ada: bool) -> None:
    config = small(name, ada)
    check(config)
    trainer, _ = build_trainer(config)
    if config.loss.kl_weight:
        trainer.model.keep_reference()
    for iteration in range(2):
        numbers, _ = read_metrics(trainer.iteration())
        counted = {phase: count.evaluations for phase, count in trainer.executor.counts.items()}
        assert counted == planned_evaluations(config, iteration)
        assert ("probe" in counted) == ada
        assert numbers["policy/ratio_deviation"] <= 1e-6
        assert math.isfinite(numbers["policy/loss"]) and numbers["policy/grad_norm"] > 0
        assert 0 <= numbers["policy/clip_share"] <= 1
    before = weights(config.model.timestep)
    assert any(not torch.equal(p, before[name]) for name, p in trainer.model.trainable())
