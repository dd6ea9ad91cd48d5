"""Keys of hosts and of rivals reach what they name: with another value a training becomes another one."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from toy import ToyModel, half_bright, toy_config

from adagrpo.build import assemble
from adagrpo.recipe.keys import Config
from adagrpo.recipe.rules import check

PROMPTS = [f"prompt {i}" for i in range(8)]  # so few that each comes again and again
PLAIN = {"selection": {"candidates": 1}, "advantage": {"weight": 0.0}, "train": {"slots": 2}}
TRAJECTORY = {**PLAIN, "rollout": {"plan": "trajectory"}, "loss": {"old_logp": "recompute"}}
TWICE = {"steps_per_iteration": 2}


def over(base: dict[str, Any], **sections: Any) -> dict[str, Any]:
    return base | {name: base.get(name, {}) | keys for name, keys in sections.items()}


WINDOW = over(TRAJECTORY, rollout={"plan": "window", "window_size": 2, "window_every": 1})
TAIL = over(WINDOW, rollout={"window_range": (0, 3), "tail_share": 0.8})
SHARE = over(TRAJECTORY, rollout={"sde_steps": (0, 1, 2, 3), "trained_share": 0.5})
TAILS = over(PLAIN, rollout={"sde_steps": (0, 1), "granularities": (1, 2)})
MOVED = over(TRAJECTORY, loss={"clip_range": 1e-3, "kl_weight": 0.5}, train=TWICE, optimizer={"lr": 0.05})
BOTS, PROCURL = ({"selection": {"candidates": 4, "probe": probe}} for probe in ("bots", "procurl"))
CASES: list[tuple[dict[str, Any], str, Any]] = [
    *((PLAIN, f"advantage.{key}", value) for key, value in (("ddof", 0), ("eps", 0.1), ("clip", 0.4))),
    *((PLAIN, "advantage.std", value) for value in ("global", "floored", "none")),
    (over(PLAIN, advantage={"std": "floored"}), "advantage.std_floor", 5.0),
    ({"advantage": {"clip": 0.5}}, "advantage.clip_of", "sum"),
    (over(PLAIN, rollout={"seeds": 2}), "advantage.groups", "prompt"),
    (PLAIN, "rollout.seeds", 2), (TAILS, "rollout.granularities", (1, 3)), (TAILS, "rollout.granular_end", "released"),
    (TRAJECTORY, "rollout.shared_noise", True), (TRAJECTORY, "rollout.step_per_prompt", True),
    (TRAJECTORY, "rollout.scheme", "flash"), (SHARE, "rollout.trained_of", "sample"),
    (WINDOW, "rollout.window_order", "random"), (WINDOW, "rollout.window_range", (1, 4)),
    (TAIL, "rollout.tail_share", 0.5), (TAIL, "rollout.tail_solver", "euler"),
    *((MOVED, "loss.ratio", value) for value in ("guard", "guard_batch")),
    (over(MOVED, loss={"ratio": "guard"}), "loss.ratio", "guard_batch"), (MOVED, "loss.clip_range", 1e-5),
    *((MOVED, "loss.kl_space", value) for value in ("velocity", "logp")),
    *((MOVED, "loss.kl_variance", value) for value in ("diffusion", "none")),
    *((MOVED, "loss.step_weights", value) for value in ("equal_gradient", "noise")),
    *((over(TRAJECTORY, train=TWICE), "train.update_by", value) for value in ("slots", "samples")),
    *((BOTS, f"selection.{key}", value) for key, value in (("target_success", 0.9), ("success_range", (-0.05, 0.05)))),
    (BOTS, "selection.half_life", 1.0), (PROCURL, "selection.sharpness", 400.0),
    ({"selection": {"candidates": 4}}, "selection.capability", "per_slot"),
]  # fmt: skip


def trained(config: Config) -> torch.Tensor:
    check(config)
    trainer = assemble(config, ToyModel(), [half_bright], PROMPTS)
    trainer.model.keep_reference()
    for _ in range(4):
        trainer.iteration()
    return torch.cat([weight.detach().flatten() for _, weight in trainer.model.trainable()])


KEPT: dict[str, torch.Tensor] = {}


@pytest.mark.parametrize(("base", "key", "value"), CASES, ids=[f"{key} = {value}" for _, key, value in CASES])
def test_a_key_acts(base: dict[str, Any], key: str, value: Any) -> None:
    one, (section, name) = toy_config(**base), key.split(".")
    other = dataclasses.replace(one, **{section: dataclasses.replace(getattr(one, section), **{name: value})})
    if repr(one) not in KEPT:
        KEPT[repr(one)] = trained(one)
    assert float((trained(other) - KEPT[repr(one)]).abs().max()) > 1e-6
