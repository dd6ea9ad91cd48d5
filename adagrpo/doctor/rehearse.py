"""``adagrpo doctor --recipe R``: whether this machine can train a recipe, from its files to two iterations."""

from __future__ import annotations

import dataclasses
import functools
import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..assembly import load_reward, place_reward
from ..build import assemble, build_model, check_engine, check_model, check_sizes, choose_device, load_data, load_plugins
from ..estimate.memory import free_bytes, size_text
from ..estimate.rehearsal import rehearse
from ..forecast import planned_memory
from ..recipe.keys import Config
from ..rewards import BUILT_IN, PromptRows, Reward, check_prompts, check_reward_files
from ..rewards.fetching import wanted_files
from .selftest import FAILED, PASSED, SKIPPED, Row, guarded

ITERATIONS = 2
_SIDE = 224
_FINITE = ("policy/loss", "policy/grad_norm")


@dataclasses.dataclass
class _Found:
    """What earlier checks leave to later ones; rewards by number."""

    prompts: Sequence[str] = ()
    held_out: Sequence[str] = ()
    rewards: dict[int, Reward] = dataclasses.field(default_factory=dict)
    model: Any = None


def check_recipe(config: Config) -> Iterator[Row]:
    """One row per check of a checked recipe, as each ends; what rests on a failed one is skipped.

    Files and packages are looked at before anything is loaded; then each reward is, and scores two pictures twice; then the
    model, its memory and the disk; then two iterations run, in memory alone.
    """
    found, failed = _Found(), False
    names = [f"rewards.{i} ({r.name})" for i, r in enumerate(config.rewards)]
    bind = lambda check, *more: functools.partial(check, config, found, *more)  # noqa: E731
    first = [("engine", bind(_engine)), ("prompts", bind(_prompts)), ("model files", bind(_model_files))]
    first += [(f"{name} files", bind(_reward_files, i)) for i, name in enumerate(names)]
    then = [(name, bind(_reward, i)) for i, name in enumerate(names)]
    then += [("model", bind(_model)), ("memory", bind(_memory)), ("disk", bind(_disk)), ("iterations", bind(_iterations))]
    for stage in (first, then):
        if failed:
            yield from (Row(name, SKIPPED, "not tried, because of what failed above") for name, _ in stage)
            return
        for name, check in stage:
            late = failed and name in ("memory", "disk", "iterations")
            row = Row(name, SKIPPED, "not tried, because of what failed above") if late else guarded(name, check)
            failed |= row.outcome == FAILED
            yield row


Finding = tuple[str, str]


def _engine(config: Config, found: _Found) -> Finding:
    check_engine(config)
    return PASSED, "what the recipe asks for runs on this device"


def _prompts(config: Config, found: _Found) -> Finding:
    found.prompts, found.held_out = load_data(config)
    load_plugins(config)
    return PASSED, f"{len(found.prompts)} to train on, {len(found.held_out)} held out"


def _model_files(config: Config, found: _Found) -> Finding:
    check_sizes(config)
    told = check_model(config.model)
    return PASSED, told or "whole, as far as can be told without reading weights"


def _reward_files(config: Config, found: _Found, number: int) -> Finding:
    entry, key = config.rewards[number], f"rewards.{number}"
    check_reward_files(entry.name, entry.kwargs, key, entry.dtype)
    for prompts in (found.prompts, found.held_out):
        check_prompts(entry.name, entry.kwargs, prompts, key)
    missing = wanted_files(entry.name, entry.kwargs, key)
    if missing:
        return FAILED, "; ".join(wanted.text for wanted in missing)
    return PASSED, "files and packages are here" if entry.name in BUILT_IN else "takes its arguments"


def _reward(config: Config, found: _Found, number: int) -> Finding:
    """Loaded; two pictures scored twice, from and on the devices of a run."""
    entry = config.rewards[number]
    reward = load_reward(config, number)
    found.rewards[number] = reward
    placed = place_reward(config, number, reward)
    if placed.groupwise:
        return PASSED, "loaded; it compares the images of a group, so that two pictures tell nothing"
    prompt = found.prompts[0]
    images = pictures().to(choose_device(config.model.device))
    rows = PromptRows([prompt], torch.zeros(len(images), dtype=torch.int64, device=images.device))
    started = time.perf_counter()
    once, again = (placed(images, rows) for _ in range(2))
    placed.rest()
    once, again = once.cpu(), again.cpu()
    seconds = (time.perf_counter() - started) / 2
    low, high = BUILT_IN[entry.name].bounds if entry.name in BUILT_IN else (-torch.inf, torch.inf)
    raw = (once - entry.shift) / entry.scale
    told = f"scores {', '.join(f'{score:.4g}' for score in once.tolist())} of two pictures, {seconds:.2f} s"
    if not bool(once.isfinite().all()):
        return FAILED, f"{told}: not finite"
    if not torch.equal(once, again):
        return FAILED, f"{told}, then {', '.join(f'{score:.4g}' for score in again.tolist())}: not deterministic"
    if not bool(((raw >= low) & (raw <= high)).all()):
        return FAILED, f"{told}: outside {low:g} to {high:g}, where its scores lie"
    return PASSED, told


def _model(config: Config, found: _Found) -> Finding:
    found.model = build_model(config.model)
    trained = sum(p.numel() for _, p in found.model.trainable())
    return PASSED, f"loaded on {found.model.device}; {trained / 1e6:.1f} M trained weights"


def _memory(config: Config, found: _Found) -> Finding:
    """The plan of the run against what is free now, beside what is loaded."""
    numbers = len(found.prompts), len(found.held_out)
    rewards = [found.rewards[i] for i in sorted(found.rewards)]
    plan = planned_memory(config, found.model, rehearse(found.model, found.prompts[0]), rewards, *numbers)
    free = free_bytes(found.model.device)
    plan.check(free, device=str(found.model.device))
    there = f"; {size_text(free)} free beside what is loaded" if free is not None else ""
    return PASSED, f"{plan.summary()}{there}"


def _disk(config: Config, found: _Found) -> Finding:
    """The run's checkpoints against what is free where runs lie."""
    plan = planned_memory(config, found.model, "not asked")
    folder = next(place for place in (Path("runs"), Path()) if place.is_dir())
    free = shutil.disk_usage(folder).free
    plan.check(None, free)
    needed = size_text(plan.checkpoint * plan.checkpoints)
    return PASSED, f"{needed} of checkpoints at most, {size_text(free)} free in {folder.resolve()}"


def _iterations(config: Config, found: _Found) -> Finding:
    """Two iterations, of which nothing is written."""
    rewards = [found.rewards[i] for i in range(len(config.rewards))]
    trainer = assemble(config, found.model, rewards, found.prompts, load_plugins(config))
    started, problems = time.perf_counter(), []
    for _ in range(ITERATIONS):
        metrics = trainer.iteration()
        problems += [f"{key} is not finite" for key in _FINITE if not bool(torch.as_tensor(metrics[key]).isfinite())]
        if failed := float(metrics.get("advantage/failed", 0.0)):
            problems.append(f"{failed:.0%} of the samples have no score")
    seconds = (time.perf_counter() - started) / ITERATIONS
    told = f"{ITERATIONS} iterations, {seconds:.1f} s each"
    return (FAILED, f"{told}: {'; '.join(dict.fromkeys(problems))}") if problems else (PASSED, told)


def pictures() -> Tensor:
    """Two fixed pictures [2, 3, 224, 224] in [0, 1]: a smooth slope of colours, and dark bars on white."""
    ramp = torch.linspace(0, 1, _SIDE)
    slope = torch.stack([ramp.expand(_SIDE, -1), ramp[:, None].expand(-1, _SIDE), (1 - ramp).expand(_SIDE, -1)])
    bars = ((torch.arange(_SIDE) // 16) % 2).float().expand(3, _SIDE, -1)
    return torch.stack([slope, bars])
