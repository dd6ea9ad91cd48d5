"""pytest-benchmark suite of the parts of an iteration, on tiny-flux: ``make bench``.

Clocks never gate: ``make test`` runs each part once, without timing. To compare two commits on one machine:

    make bench ARGS=--benchmark-save=before      # then change, and
    make bench ARGS=--benchmark-compare='*before'
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from adagrpo_kernels import (
    Draw,
    capability_step,
    group_log_prob,
    multi_reward_advantage,
    philox_normal,
    sde_step,
    sigma_schedule,
    step_table,
)

from adagrpo.bench.measure import bench_trainer, forget_prompts
from adagrpo.recipe.keys import Config
from adagrpo.recipe.load import load_recipe
from adagrpo.rewards import PromptRows
from adagrpo.run.fit import read_metrics
from adagrpo.study.hosts import with_probe, without_adagrpo
from adagrpo.train import Trainer

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
OPERATORS = ("sde_step", "group_log_prob", "philox_normal", "capability_step", "fused_advantage")
ROWS, LENGTH, CHANNELS = 48, 16, 16  # the largest batch of the published schedule, latents of tiny-flux


def recipe(**engine: Any) -> Config:
    """The published schedule on tiny-flux, with fresh fork velocities, as cheap probes need them: one recipe for all."""
    config = load_recipe("bench-tiny")
    rollout = dataclasses.replace(config.rollout, fork_velocity="fresh")
    return dataclasses.replace(config, rollout=rollout, engine=dataclasses.replace(config.engine, **engine))


def waited(run: Callable[[], object]) -> Callable[[], None]:
    """``run``, and what it queued on the device."""

    def done() -> None:
        run()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    return done


@pytest.fixture(scope="module")
def trainer() -> Iterator[Trainer]:
    yield bench_trainer(recipe())


def operators() -> dict[str, Callable[[], object]]:
    """Our operators at the shapes of an iteration, by the implementation that this device gets."""
    generator = torch.Generator().manual_seed(0)
    normal = lambda *shape: torch.randn(*shape, generator=generator).to(DEVICE)  # noqa: E731
    table = step_table("flow", sigma_schedule(16, 3.0), 0.7).to(DEVICE, torch.float32)
    x, v, successors = normal(ROWS, LENGTH, CHANNELS), normal(ROWS, LENGTH, CHANNELS), normal(4, 12, LENGTH, CHANNELS)
    rows, index = torch.arange(ROWS, device=DEVICE), torch.full((ROWS,), 4, device=DEVICE)
    rewards, scores = normal(1, 4, 12).double(), normal(1, 1, 10).double()
    mean, var, count = (torch.full((1,), value, device=DEVICE, dtype=torch.float64) for value in (0.1, 0.9, 1.0))
    weights = torch.ones(1, device=DEVICE)
    zero = torch.zeros((), dtype=torch.int64, device=DEVICE)
    return {
        "sde_step": lambda: sde_step(x, v, table, index, Draw(zero, rows, zero, 2, zero)),
        "group_log_prob": lambda: group_log_prob(x[:4], v[:4], successors, table, index[:4]),
        "philox_normal": lambda: philox_normal(zero, rows, LENGTH * CHANNELS, zero, 2, zero, torch.float32),
        "capability_step": lambda: capability_step(scores, mean, var, count.long(), 0.8, "closest"),
        "fused_advantage": lambda: multi_reward_advantage(rewards, mean, var.sqrt(), count.long(), weights),
    }


@pytest.mark.parametrize("name", OPERATORS)
def test_operator(name: str, benchmark: Any) -> None:
    benchmark(waited(operators()[name]))


@pytest.mark.parametrize("forward", ["eager", "fused"])
def test_rollout_forward_of_48_rows(forward: str, benchmark: Any) -> None:
    executor = bench_trainer(recipe(forward=forward)).executor
    conditioning = executor.model.encode(["a red circle"] * ROWS)
    x, index = torch.zeros(ROWS, LENGTH, CHANNELS, device=DEVICE), torch.zeros(ROWS, dtype=torch.int64, device=DEVICE)
    with torch.no_grad():
        prepared = executor.rollout.prepare(conditioning)
        benchmark(waited(lambda: executor.rollout.velocity(x, index, prepared, torch.arange(ROWS, device=DEVICE))))


def test_decode_and_score_48_images(trainer: Trainer, benchmark: Any) -> None:
    prompts = PromptRows(["a red circle"], torch.zeros(ROWS, dtype=torch.int64, device=DEVICE))
    x = torch.zeros(ROWS, LENGTH, CHANNELS, device=DEVICE)
    with torch.no_grad():
        benchmark(waited(lambda: trainer.score(x, prompts)))


@pytest.mark.parametrize("probe", ["full", "short-4", "racing", "pool-2", "memory"])
def test_iteration_by_probe(probe: str, trainer: Trainer, benchmark: Any) -> None:
    one = bench_trainer(with_probe(recipe(), probe), trainer.model)
    benchmark.pedantic(iteration(one), rounds=3, warmup_rounds=1)


def test_iteration_without_selection_and_fusion(trainer: Trainer, benchmark: Any) -> None:
    benchmark.pedantic(iteration(bench_trainer(without_adagrpo(recipe()), trainer.model)), rounds=3, warmup_rounds=1)


def iteration(trainer: Trainer) -> Callable[[], None]:
    """One iteration with new prompts, metrics read."""

    def run() -> None:
        forget_prompts(trainer.model)
        read_metrics(trainer.iteration())
        trainer.phase.read()

    return waited(run)
