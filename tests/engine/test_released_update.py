"""The recipes ``flux1-dev-official`` make the update of the released code: its own numbers against our functions.

``tests/assets/released_adagrpo.safetensors`` holds random inputs and what the released functions returned for them (its
metadata says which). Nothing of the trainer is replaced but the model, whose velocity is a table of parameters.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from toy import CHANNELS, ToyModel, toy_config, toy_trainer

from adagrpo.algorithm.advantages import reward_advantage
from adagrpo.algorithm.sde import group_log_prob, sde_step, sigma_schedule, step_table
from adagrpo.algorithm.selection import CapabilityState, capability_step
from adagrpo.algorithm.tables import rollout_table
from adagrpo.engine.batch_limit import BatchLimit
from adagrpo.engine.executor import RolloutExecutor
from adagrpo.engine.optimizer import OptimizerSettings, PolicyOptimizer
from adagrpo.engine.plans import update_batches
from adagrpo.engine.rollout import Transitions
from adagrpo.engine.sampling import Samples
from adagrpo.engine.update import Objective, update_policy
from adagrpo.models.base import Conditioning
from adagrpo.recipe.keys import Config
from adagrpo.recipe.load import load_recipe
from adagrpo.recipe.rules import check
from adagrpo.run.metrics import read_metrics

RELEASED = load_file(Path(__file__).resolve().parents[1] / "assets" / "released_adagrpo.safetensors")
STEPS, ETA, FORKS, GROUP, PROMPT = 8, 0.8, 4, 4, 1
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4}
OFFICIAL = ["flux1-dev-official", "flux1-dev-official-lora"]


def released(name: str, dtype: torch.dtype) -> Tensor:
    return RELEASED[name].to(dtype)


def distance(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


def capability() -> CapabilityState:
    one = lambda value: torch.tensor([value], dtype=torch.float64)  # noqa: E731
    return CapabilityState(one(0.55), one(0.09), torch.tensor([3]))


class VelocityTable(nn.Module):
    """One parameter: the velocity of each fork step's latent, found by its noise level."""

    def __init__(self, velocity: Tensor, sigmas: Tensor) -> None:
        super().__init__()
        self.velocity, self.sigmas = nn.Parameter(velocity.clone()), sigmas

    def forward(self, sigma: Tensor) -> Tensor:
        return self.velocity[(sigma[:, None] - self.sigmas[None]).abs().argmin(1)]


class TableModel(ToyModel):
    latent_shape = (8, 4)

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__(dtype)
        self.transformer = VelocityTable(released("velocity", dtype), sigma_schedule(STEPS, 3.0)[:FORKS].to(dtype))

    def velocity(self, x: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        self.calls.append(x.shape[0])
        return self.transformer(sigma.to(self.dtype))


def gradients(config: Config, dtype: torch.dtype, eta: float = ETA, **changed: Any) -> tuple[list[Tensor], list[int], dict]:
    """Gradient by the velocities [4, 8, 4] that each optimizer step receives, rows of each backward, and the metrics."""
    model = TableModel(dtype)
    table = rollout_table(sigma_schedule(STEPS, 3.0), "flow", eta)
    executor = RolloutExecutor(model, table, 0, dtype, BatchLimit(config.engine.max_rows))
    index = torch.arange(FORKS) + STEPS
    logp = torch.full((FORKS, GROUP), torch.nan, dtype=dtype)  # the released code keeps none
    rows = torch.arange(FORKS * GROUP).reshape(FORKS, GROUP)
    anchor, slot = released("anchor", dtype), torch.zeros(FORKS, dtype=torch.int64)
    transitions = Transitions(anchor, released("next", dtype), anchor, logp, index, slot, rows)
    train = config.train
    batches = update_batches(1, 1, FORKS, train.steps_per_iteration, train.slots, config.engine.max_rows)
    samples = Samples(torch.zeros(FORKS * GROUP, 8, 4, dtype=dtype), FORKS, transitions, batches)
    a = config.advantage
    rewards = released("rewards", dtype)[None, PROMPT]
    advantage = reward_advantage(rewards, capability(), torch.ones(1), a.clip, a.weight, a.calibration).advantage
    o = config.optimizer
    optimizer = PolicyOptimizer(
        model.transformer.parameters(), OptimizerSettings(lr=0.0, eps=o.eps, max_grad_norm=o.max_grad_norm)
    )
    found: list[Tensor] = []
    step = optimizer.step

    def keep() -> Tensor:
        found.append(model.transformer.velocity.grad.clone())
        return step()

    optimizer.step = keep  # type: ignore[method-assign]
    options = {
        "old_logp": config.loss.old_logp, "clip_range": config.loss.clip_range or None, "kl_weight": config.loss.kl_weight,
        "step_weighting": config.loss.step_weights, "average": config.loss.average,
    } | changed  # fmt: skip
    valid = torch.ones(FORKS * GROUP, dtype=torch.bool)
    text = Conditioning({"text": torch.zeros(1, CHANNELS)})
    metrics = update_policy(executor, optimizer, samples, advantage.flatten(), valid, text, Objective(**options))
    return found, model.calls, metrics


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", OFFICIAL)
def test_gradients_are_those_of_the_released_update(name: str, dtype: torch.dtype) -> None:
    """Full: four optimizer steps of a quarter of the loss. Adapters: one, which gathers the four quarters."""
    steps, _, metrics = gradients(load_recipe(name), dtype)
    truth = released("gradient", torch.float64)
    assert len(steps) == (1 if "lora" in name else 4)
    assert distance(sum(steps), truth) <= TOLERANCE[dtype]
    if len(steps) == 4:
        for k, gradient in enumerate(steps):
            assert distance(gradient[k], truth[k]) <= TOLERANCE[dtype]
            assert not gradient[[i for i in range(4) if i != k]].any()
    assert abs(float(metrics["loss"]) - float(released("loss", torch.float64).mean())) <= 1e-7
    assert metrics["ratio_deviation"] == 0


def test_what_is_not_the_released_update_is_seen() -> None:
    official = load_recipe(OFFICIAL[0])
    truth = released("gradient", torch.float64)
    own, _, _ = gradients(official, torch.float64, average="update")
    assert distance(sum(own), 4 * truth) <= 1e-6, "without the key every step has the whole loss"
    for config, changed in (
        (official, {"average": "update"}),
        (official, {"eta": 0.7}),
        (official, {"step_weighting": "equal_gradient"}),
        (dataclasses.replace(official, advantage=dataclasses.replace(official.advantage, weight=0.0)), {}),
        (dataclasses.replace(official, advantage=dataclasses.replace(official.advantage, calibration="zscore")), {}),
    ):
        assert distance(sum(gradients(config, torch.float64, **changed)[0]), truth) > 1e-2


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_steps_and_log_probabilities_are_the_released_ones(dtype: torch.dtype) -> None:
    table = step_table("flow", sigma_schedule(STEPS, 3.0), ETA).to(dtype=dtype)
    index = torch.arange(FORKS)
    anchor, velocity = released("anchor", dtype), released("sampling_velocity", dtype)
    drawn = sde_step(anchor, velocity, table, index, released("noise", dtype))
    assert distance(drawn.next, RELEASED["sampled_next"]) <= TOLERANCE[dtype]
    v = released("velocity", dtype)
    assert distance(sde_step(anchor, v, table, index, torch.zeros_like(v)).mean, RELEASED["mean"]) <= TOLERANCE[dtype]
    logp = group_log_prob(anchor, v, released("next", dtype), table, index)
    logp = logp - table.logp_const[:FORKS, None]  # theirs has no constant
    assert distance(logp, RELEASED["logp"]) <= TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_advantages_are_the_released_ones(dtype: torch.dtype) -> None:
    """Also where all rewards lie on one side of the EMA: nothing to calibrate there."""
    fuse = lambda rewards, weight: reward_advantage(rewards, capability(), torch.ones(1), 5.0, weight, "mass").advantage  # noqa: E731
    rewards = released("rewards", dtype).flatten(0, 1)[None]
    local, both = RELEASED["local"].flatten(0, 1), (RELEASED["local"] + RELEASED["global"]).flatten(0, 1)
    assert distance(fuse(rewards, 0.0), local) <= TOLERANCE[dtype]
    assert distance(fuse(rewards, 1.0), both) <= TOLERANCE[dtype]
    one_sided = released("one_sided_rewards", dtype)[None, None]
    assert distance(fuse(one_sided, 1.0) - fuse(one_sided, 0.0), RELEASED["one_sided_global"][None]) <= 10 * TOLERANCE[dtype]


def test_the_filter_is_the_released_one() -> None:
    official = load_recipe(OFFICIAL[0]).selection
    state = CapabilityState.for_rewards(1)
    for i, scores in enumerate(RELEASED["scores"].double()):
        found = capability_step(state, scores[None, None], official.alpha, official.strategy)
        state = found.state
        assert int(found.picks) == int(RELEASED["picks"][i])
        assert float(state.mean) == pytest.approx(float(RELEASED["ema_mean"][i]), rel=1e-6)
        assert float(state.var) == pytest.approx(float(RELEASED["ema_var"][i]), rel=1e-6)


def test_the_key_reaches_the_update_of_a_run() -> None:
    """Two steps of half the loss: half the gradient norm of the first step, and the same logged loss."""
    loss = {"old_logp": "detached", "kl_weight": 0.1}
    recipes = [
        toy_config(train={"steps_per_iteration": 2, "iterations": 1}, loss=loss | {"average": average}, optimizer={"lr": 1e-12})
        for average in ("update", "iteration")
    ]
    runs = []
    for config in recipes:
        trainer = toy_trainer(config)
        trainer.model.keep_reference()
        runs.append(read_metrics(trainer.iteration())[0])
    own, whole = runs
    assert whole["policy/grad_norm"] == pytest.approx(own["policy/grad_norm"] / 2, rel=1e-4)
    assert whole["policy/loss"] == pytest.approx(own["policy/loss"], rel=1e-4, abs=1e-9)


def test_a_key_without_effect_is_refused() -> None:
    official = load_recipe(OFFICIAL[1])
    with pytest.raises(ValueError, match=r"loss\.average = iteration: has no effect here: it needs train\.steps_per_iteration"):
        check(dataclasses.replace(official, loss=dataclasses.replace(official.loss, average="iteration")))
