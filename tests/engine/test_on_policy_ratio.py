"""On policy the ratio is 1, whatever the scheme, plan, storage, batch split or batch-dependent rounding of the model."""

import dataclasses

import pytest
import torch
from toy import ToyModel, toy_config, toy_trainer

from adagrpo.algorithm import sde
from adagrpo.engine import executor as executor_module
from adagrpo.engine import update as update_module
from adagrpo.recipe.keys import Config, EngineConfig
from adagrpo.run.metrics import read_metrics

ETA = {"flow": 0.7, "dance": 0.3, "cps": 0.8}
PLANS = {"fork": "rollout", "trajectory": "recompute", "window": "recompute"}


def recipe(scheme: str, plan: str, storage: str, max_rows: int = 0, **rollout) -> Config:
    config = toy_config(
        rollout={"plan": plan, "scheme": scheme, "eta": ETA[scheme], "storage": storage, "window_size": 2, **rollout},
        loss={"old_logp": PLANS[plan]},
    )
    return dataclasses.replace(config, engine=EngineConfig(max_rows=max_rows))


def deviation(config: Config, row_noise: float = 0.0) -> float:
    return read_metrics(toy_trainer(config, ToyModel(row_noise=row_noise)).iteration())[0]["policy/ratio_deviation"]


@pytest.mark.parametrize("row_noise", [0.0, 1e-3])
@pytest.mark.parametrize("max_rows", [0, 5])
@pytest.mark.parametrize("storage", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("scheme", ETA)
def test_ratio_is_one(scheme: str, plan: str, storage: str, max_rows: int, row_noise: float) -> None:
    assert deviation(recipe(scheme, plan, storage, max_rows), row_noise) <= 1e-6


@pytest.mark.parametrize("ratio", ["guard", "guard_batch"])
@pytest.mark.parametrize(("plan", "old_logp"), [("fork", "rollout"), ("fork", "detached"), ("trajectory", "recompute")])
def test_guarded_ratio_is_one(plan: str, old_logp: str, ratio: str) -> None:
    """The stored means are of the same velocities as the stored log-probabilities: recomputed with them."""
    config = recipe("flow", plan, "bf16")
    guarded = dataclasses.replace(config, loss=dataclasses.replace(config.loss, old_logp=old_logp, ratio=ratio))
    assert deviation(guarded, row_noise=1e-3) <= 1e-6


@pytest.mark.parametrize("scheme", ETA)
def test_batch_dependent_rounding_breaks_the_naive_choices(scheme: str) -> None:
    """The planted fault is real: velocities or log-probabilities of another batch geometry move the ratio."""
    assert deviation(recipe(scheme, "fork", "fp32", fork_velocity="probe"), row_noise=1e-3) > 2e-5
    stored = recipe(scheme, "trajectory", "fp32")
    stored = dataclasses.replace(stored, loss=dataclasses.replace(stored.loss, old_logp="rollout"))
    assert deviation(stored, row_noise=1e-3) > 2e-5


@pytest.mark.proof
@pytest.mark.parametrize("storage", ["fp32", "bf16"])
@pytest.mark.parametrize(("scheme", "plan"), [("flow", "fork"), ("dance", "trajectory"), ("cps", "window")])
def test_ratio_is_one_with_compiled_references(monkeypatch, scheme: str, plan: str, storage: str) -> None:
    """Rollout compiled, update eager: rounding, mean and log-probability survive the compiler."""
    step, log_prob = (torch.compile(f, dynamic=True) for f in (sde.sde_step, sde.group_log_prob))
    monkeypatch.setattr(executor_module, "sde_step", step)
    monkeypatch.setattr(executor_module, "group_log_prob", log_prob)
    assert update_module.group_log_prob is sde.group_log_prob
    config = recipe(scheme, plan, storage)
    if plan != "fork":  # the compiled sde_step's own log-probability is what the eager update must reproduce
        config = dataclasses.replace(config, loss=dataclasses.replace(config.loss, old_logp="rollout"))
    assert deviation(config) <= 1e-6
