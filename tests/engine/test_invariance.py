"""What must not matter does not: batch split, accumulation, micro-batches."""

import dataclasses

import pytest
import torch
from toy import ToyModel, recorded, toy_config, toy_trainer

from adagrpo.recipe.keys import Config, EngineConfig


def run(config: Config, iterations: int = 10) -> tuple[list, list, list]:
    trainer = toy_trainer(config, ToyModel(torch.float64 if config.model.dtype == "fp64" else torch.float32))
    picks, rewards = recorded(trainer)
    for _ in range(iterations):
        trainer.iteration()
    return picks, rewards, [p.detach().clone() for _, p in trainer.model.trainable()]


def fp64(max_rows: int = 0, **sections) -> Config:
    sections = {"rollout": {}, **sections}
    sections["rollout"] = {"storage": "fp64", **sections["rollout"]}
    config = toy_config(model={"dtype": "fp64"}, **sections)
    return dataclasses.replace(config, engine=EngineConfig(max_rows=max_rows))


def assert_same(a: tuple[list, list, list], b: tuple[list, list, list]) -> None:
    for x, y in zip(a[0], b[0], strict=True):
        assert torch.equal(x, y)
    for x, y in zip(a[1], b[1], strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=1e-6)
    for x, y in zip(a[2], b[2], strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=1e-6)


@pytest.mark.parametrize("plan", ["fork", "trajectory"])
def test_max_rows_changes_nothing(plan: str) -> None:
    sections = {"rollout": {"plan": plan}, "loss": {"old_logp": "rollout" if plan == "fork" else "recompute"}}
    train = {"train": {"slots": 4}}
    assert_same(run(fp64(**sections, **train)), run(fp64(max_rows=8, **sections, **train)))


def test_accumulation_changes_nothing() -> None:
    whole = run(fp64(train={"slots": 8}))
    split = run(fp64(train={"slots": 2, "accumulation": 4}))
    assert_same(whole, split)
    assert not torch.equal(whole[2][0], ToyModel(torch.float64).transformer.mix)  # it did train


def test_runs_repeat_bit_for_bit_and_seeds_differ() -> None:
    first, again, other = (run(toy_config(train={"seed": s, "slots": 2}), 3) for s in (0, 0, 1))
    assert all(torch.equal(x, y) for x, y in zip(first[2], again[2], strict=True))
    assert not torch.equal(first[2][0], other[2][0])
