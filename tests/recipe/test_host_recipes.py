"""Every host's recipe trains, without AdaGRPO and with it, in bf16: its ratio is exactly 1 before the first step, and it
evaluates what was predicted."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from adagrpo.build import build_trainer
from adagrpo.forecast import planned_evaluations
from adagrpo.recipe.keys import Config, RewardConfig
from adagrpo.recipe.load import load_recipe
from adagrpo.run.metrics import read_metrics

HOSTS = [
    "flow-grpo", "flow-grpo-fast", "dance-grpo", "flow-cps", "mix-grpo", "mix-grpo-flash", "grpo-guard", "g2rpo", "tempflow",
    "flash-grpo",
]  # fmt: skip
SMALL = {
    "model": {"dtype": "bf16", "height": 16, "width": 16},
    "rollout": {"steps": 6, "group_size": 4, "storage": "bf16"},
    "train": {"slots": 2, "iterations": 2},
    "evaluation": {"every": 0, "final_prompts": 0},
    "output": {"grid_every": 0},
}


def small(name: str) -> Config:
    """The recipe on 6 steps, with its stochastic steps within them."""
    config = load_recipe(name)
    changes = {section: dict(keys) for section, keys in SMALL.items()}
    changes["selection"] = {"candidates": min(config.selection.candidates, 3)}
    r = config.rollout
    if r.window_range:
        changes["rollout"]["window_range"] = (0, min(r.window_range[1], 5))
    elif r.plan != "window":
        changes["rollout"]["sde_steps"] = tuple(k for k in r.sde_steps if k < 5)
    sections = {s: dataclasses.replace(getattr(config, s), **keys) for s, keys in changes.items()}
    return dataclasses.replace(config, **sections, rewards=(RewardConfig("brightness"),))


@pytest.mark.parametrize("ending", ["", "-ada"])
@pytest.mark.parametrize("host", HOSTS)
def test_two_iterations(host: str, ending: str) -> None:
    config = small(f"tiny-{host}{ending}")
    trainer, _ = build_trainer(config)
    if config.loss.kl_weight:
        trainer.model.keep_reference()
    before = [weight.detach().clone() for weight in trainer.optimizer.masters]
    for iteration in range(2):
        numbers, _ = read_metrics(trainer.iteration())
        counted = {phase: count.evaluations for phase, count in trainer.executor.counts.items()}
        assert counted == planned_evaluations(config, iteration)
        assert numbers["policy/ratio_deviation"] == 0
        assert math.isfinite(numbers["policy/loss"]) and numbers["policy/grad_norm"] > 0
        shares = [numbers[f"policy/clip_share{side}"] for side in ("", "_high", "_low")]
        assert 0 <= shares[0] <= 1 and shares[0] == pytest.approx(shares[1] + shares[2])
    assert any(not torch.equal(now, then) for now, then in zip(trainer.optimizer.masters, before, strict=True))
