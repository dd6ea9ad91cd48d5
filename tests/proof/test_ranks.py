"""The built-in model on 1, 2 and 4 ranks, and a real torchrun: the same training, saved at one number and gone on at another.

`make proof` runs it; about three minutes on two quiet cores.
"""

from __future__ import annotations

import dataclasses
import json
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks_pool import Pool

from adagrpo.build import assemble, build_model, load_data, load_reward
from adagrpo.engine.ranks import Ranks
from adagrpo.recipe.keys import Config
from adagrpo.recipe.load import read_recipe

pytestmark = pytest.mark.proof

KEYS: dict[str, dict[str, Any]] = {
    "model": {"device": "cpu", "max_text_tokens": 12},
    "rollout": {"steps": 4, "sde_steps": (0, 1), "group_size": 3},
    "selection": {"candidates": 3},
    "train": {"slots": 4, "iterations": 3},
    "optimizer": {"lr": 1e-4, "eps": 1e-4},
}
TRAJECTORY = {"rollout": {"plan": "trajectory"}, "loss": {"old_logp": "recompute"}}
CASES: dict[str, dict[str, dict[str, Any]]] = {
    "lora": {"model": {"tuning": "lora", "lora_rank": 4}},
    "full": {"optimizer": {"ema_decay": 0.5}},
    "trajectory, kl": {**TRAJECTORY, "loss": {"old_logp": "recompute", "kl_weight": 0.05}},
    "checkpointing, accumulation": {"model": {"gradient_checkpointing": True}, "train": {"accumulation": 2}},
    "memory+pool": {"selection": {"probe": "memory+pool", "finalists": 2}},
}
FP64 = {"model": {"dtype": "fp64"}, "rollout": {"storage": "fp64"}}


def recipe(*changes: dict[str, dict[str, Any]]) -> Config:
    config = read_recipe("tiny").config
    for change in (KEYS, *changes):
        config = dataclasses.replace(config, **{k: dataclasses.replace(getattr(config, k), **v) for k, v in change.items()})
    return dataclasses.replace(config, rewards=(dataclasses.replace(config.rewards[0], name="brightness"),))


def trained(ranks: Ranks | None, config: Config, iterations: int) -> dict[str, Any]:
    prompts, _ = load_data(config)
    trainer = assemble(config, build_model(config.model), [load_reward(config, 0)], prompts, ranks=ranks)
    trainer.model.keep_reference()
    found: dict[str, Any] = {"metrics": [], "picks": [], "rewards": []}
    draw = trainer.draw

    def kept(*given):
        groups = draw(*given)
        found["picks"].append(groups.picks)
        found["rewards"].append(groups.rewards)
        return groups

    trainer.draw = kept  # type: ignore[method-assign]
    for _ in range(iterations):
        metrics = trainer.iteration()
        named = ("reward/train", "selection/ema_mean", "selection/ema_std", "policy/grad_norm")
        found["metrics"].append({name: float(metrics[name]) for name in named})
    return found | {"weights": [p.detach().clone() for _, p in trainer.model.trainable()]}


@pytest.fixture(scope="module", params=[2, 4])
def pool(request: pytest.FixtureRequest) -> Iterator[Pool]:
    made = Pool(request.param)
    yield made
    made.close()


@pytest.mark.parametrize("name", CASES)
def test_any_number_of_ranks_trains_alike(name: str, pool: Pool) -> None:
    config = recipe(CASES[name])
    alone, together = trained(None, config, 3), pool(trained, config, 3, limit=900)
    for a, b in zip(alone["metrics"], together[0]["metrics"], strict=True):
        assert b == pytest.approx(a, rel=2e-4)
    for rank in together[1:]:
        assert rank["metrics"] == together[0]["metrics"]
        assert all(map(torch.equal, rank["weights"], together[0]["weights"]))


def test_in_fp64_picks_are_equal_and_weights_to_rounding(pool: Pool) -> None:
    config = recipe(CASES["lora"], FP64)
    alone, (first, *_) = trained(None, config, 10), pool(trained, config, 10, limit=900)
    assert all(map(torch.equal, alone["picks"], first["picks"]))
    torch.testing.assert_close(first["rewards"], alone["rewards"], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(first["weights"], alone["weights"], rtol=0, atol=1e-12)


WORDS = shlex.split("""
--train.iterations 3 --train.slots 4 --rollout.steps 4 --rollout.sde-steps 0 1 --rollout.group-size 3
--selection.candidates 3 --model.tuning lora --model.device cpu --rewards.0.name brightness --evaluation.every 2
--evaluation.prompts 3 --evaluation.final-prompts 3 --evaluation.final-noises 1 --output.grid-every 2 --output.grid-prompts 3
--output.checkpoint-every 1 --output.keep-last 9
""")


def command(ranks: int, out: Path, *more: str) -> None:
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    words = [sys.executable, *launch, "-m", "adagrpo", "train", "tiny", *WORDS, "--out", str(out), *more]
    done = subprocess.run(words, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr


def records(out: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{key: line[key] for key in ("reward/train", "selection/ema_mean", "policy/grad_norm")} for line in lines]


def test_torchrun_saves_at_two_and_goes_on_at_one_and_four(tmp_path: Path) -> None:
    command(2, tmp_path / "two")
    whole = records(tmp_path / "two")
    for ranks in (1, 4):
        out = tmp_path / f"on-{ranks}"
        shutil.copytree(tmp_path / "two", out)
        command(ranks, out, "--resume", str(out / "checkpoints" / "step-000001"))
        for a, b in zip(whole, records(out), strict=True):
            assert b == pytest.approx(a, rel=2e-4)
