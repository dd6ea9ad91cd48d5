"""The recipes that are measured: defaults, without AdaGRPO's two additions, on other host algorithms, with other probes."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from ..errors import InputError
from ..recipe.keys import Config, RolloutConfig, SelectionConfig
from ..recipe.rules import check

PROBES: dict[str, dict[str, Any]] = {
    "full": {"probe": "full"},
    "short-4": {"probe": "short", "probe_steps": 4},
    "short-2": {"probe": "short", "probe_steps": 2},
    "racing": {"probe": "racing"},
    "pool-3": {"probe": "pool", "candidates": 3},
    "pool-2": {"probe": "pool", "candidates": 2},
    "memory": {"probe": "memory"},
    "memory-blind": {"probe": "memory", "allow_unseen": True},
    "memory-2": {"probe": "memory", "finalists": 2},
    "memory+pool": {"probe": "memory+pool"},
    "bots": {"probe": "bots"},
    "greso": {"probe": "greso"},
    "procurl": {"probe": "procurl"},
    "dps": {"probe": "dps"},
    "dapo": {"candidates": 1, "strategy": "closest"},
    "random": {"strategy": "random"},
}
"""Changes of ``selection`` by name; ``random`` draws prompts blindly, the control. ``dapo`` too, and again where groups lack
spread (``advantage.equal_groups = refill``)."""
READ = {
    "full": ("strategy", "kwargs"),
    "short": (),
    "racing": ("race_steps",),
    "memory": ("allow_unseen", "half_life", "noise_share", "group_evidence"),
    "bots": ("half_life", "success_range", "target_success"),
    "greso": ("success_range",),
    "procurl": ("half_life", "success_range", "sharpness"),
    "dps": ("half_life", "success_range"),
}
"""Keys of ``selection`` that a judge reads beside those of ``PROBES``."""


def default_recipe(command: str) -> str:
    """What a command measures when no recipe is named: the published schedule, on a CPU with tiny-flux."""
    if torch.cuda.is_available():
        return "bench-flux1-dev"
    return "tiny" if command == "iteration" else "bench-tiny"


def without_adagrpo(config: Config) -> Config:
    """The identical recipe without selection and fusion.

    One candidate per slot: on plan fork its probe is the anchor the groups fork from anyway, so it costs no extra; on the other
    plans nothing reads a probe, and none is drawn.
    """
    selection = dataclasses.replace(SelectionConfig(), candidates=1)
    advantage = dataclasses.replace(config.advantage, weight=0.0)
    return dataclasses.replace(config, selection=selection, advantage=advantage)


def hosts(config: Config) -> tuple[dict[str, Config], dict[str, str]]:
    """The recipe on every host plan it can express, its own first; and why it cannot express the others.

    Groups, steps and stochastic steps stay; the window is as long as there are stochastic steps. Where log-probabilities
    cannot be those of the rollout they are computed anew. ``fork-probe`` forks with the velocities of the probe, as the
    released code does, ``fork-fresh`` with new ones, as our defaults do.
    """
    own = _name(config)
    plans: dict[str, dict[str, Any]] = {
        "fork-probe": {"plan": "fork", "fork_velocity": "probe"},
        "fork-fresh": {"plan": "fork", "fork_velocity": "fresh"},
        "trajectory": {"plan": "trajectory"},
        "window": {"plan": "window", "window_size": len(config.rollout.sde_steps)},
    }
    found, refused = {own: config}, {}
    for name, keys in plans.items():
        if name == own:
            continue
        other = _on_plan(config, keys)
        try:
            check(other)
        except InputError as error:
            refused[name] = str(error)
        else:
            found[name] = other
    return found, refused


def with_probe(config: Config, name: str) -> Config:
    """The recipe with another probe of ``PROBES``; keys that this probe reads stay, forks take fresh velocities where it has
    none to give them.

    Raises:
        InputError: unknown name, or a recipe that cannot have it.
    """
    if name not in PROBES:
        raise InputError(f"--probes: unknown probe {name!r}: one of {', '.join(PROBES)}")
    keys, own, rollout = PROBES[name], config.selection, config.rollout
    judge = dataclasses.replace(own, **keys).judge
    read = {"candidates", "alpha", *READ[judge]} if "strategy" not in keys else {"candidates", "alpha"}
    keys = {key: getattr(own, key) for key in read} | keys
    if judge == "racing" and own.judge != "racing":
        keys["race_steps"] = race_steps(keys["candidates"], rollout.steps)
    selection = dataclasses.replace(SelectionConfig(), **keys)
    if judge != "full" and rollout.fork_velocity == "probe":
        rollout = dataclasses.replace(rollout, fork_velocity="fresh")
    advantage = dataclasses.replace(config.advantage, equal_groups="refill") if name == "dapo" else config.advantage
    changed = dataclasses.replace(config, selection=selection, rollout=rollout, advantage=advantage)
    check(changed)
    return changed


def race_steps(candidates: int, steps: int) -> tuple[int, ...]:
    """Previews after 5, 6 and 7 eighths of the steps, as many of the last ones as halve the field."""
    found = sorted({min(max(1, round(share * steps)), steps - 1) for share in (0.625, 0.75, 0.875)})
    return tuple(found[-(candidates - 1).bit_length() :])


def _name(config: Config) -> str:
    r = config.rollout
    if r.plan != "fork":
        return r.plan
    return f"fork-{r.fork_velocity}"


def _on_plan(config: Config, keys: dict[str, Any]) -> Config:
    """The recipe on another plan, keys that plan does not read at their defaults."""
    default, plan = RolloutConfig(), keys["plan"]
    unread = ["window_size", "window_stride", "window_every"] if plan != "window" else []
    unread += ["fork_velocity", "tail_steps", "tail_share", "tail_solver"] if plan != "fork" else ["shared_noise"]
    rollout = dataclasses.replace(config.rollout, **{**{key: getattr(default, key) for key in unread}, **keys})
    exact = plan == "fork" and rollout.fork_velocity == "fresh"
    old = "recompute" if config.loss.old_logp == "rollout" and not exact else config.loss.old_logp
    return dataclasses.replace(config, rollout=rollout, loss=dataclasses.replace(config.loss, old_logp=old))
