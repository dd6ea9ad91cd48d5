"""An iteration on the kernels: launches, host round trips, and the same training as on the references."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from adagrpo_kernels import implementations, launch_counts, reset_counts
from toy import ToyModel, recorded, toy_config, toy_trainer

from adagrpo.recipe.keys import Config, EngineConfig, RewardConfig
from adagrpo.run.metrics import read_metrics
from adagrpo.train import Trainer

OPERATORS = {"philox_normal", "sde_step", "group_log_prob", "fused_advantage", "capability_step"}


def recipe(kernels: str, **sections) -> Config:
    return dataclasses.replace(toy_config(**sections), engine=EngineConfig(kernels=kernels))


def brightness_on_device(images: torch.Tensor, _prompts) -> torch.Tensor:
    return images[..., :2].mean((1, 2, 3)) - images[..., 2:].mean((1, 2, 3))


@pytest.mark.parametrize("slots", [1, 2])
def test_launches_per_iteration(slots: int) -> None:
    """2T + 6: noise, T probe steps, selection, fork and its log-probability, T - 1 tails, advantage, replay and backward."""
    trainer = toy_trainer(recipe("triton", train={"slots": slots}))
    trainer.iteration()
    reset_counts()
    trainer.iteration()
    counts, steps = launch_counts(), trainer.config.rollout.steps
    assert sum(counts.values()) <= 2 * steps + 6, counts
    assert counts == {
        "philox": 1, "sde_step": 2 * steps, "capability_step": 1, "group_log_prob": 2, "group_log_prob_backward": 1,
        "fused_advantage": 1,
    }  # fmt: skip
    assert implementations() == dict.fromkeys(OPERATORS, "triton")


@pytest.mark.parametrize("kernels", ["reference", "triton"])
@pytest.mark.parametrize("steps", [6, 16])
def test_no_host_round_trip_on_meta_tensors(kernels: str, steps: int) -> None:
    """Every synchronisation raises on meta tensors; from probe to advantage and replay nothing does."""
    config = recipe(kernels, rollout={"steps": steps, "sde_steps": (0, 2, 4)}, train={"slots": 2})
    trainer = toy_trainer(config, ToyModel(device="meta"), brightness_on_device)
    reset_counts()
    metrics = trainer.iteration()
    assert all(t.device.type == "meta" for name, t in metrics.items() if isinstance(t, torch.Tensor) and name != "policy/lr")
    if kernels == "triton":
        assert sum(launch_counts().values()) == 2 * steps + 6
    else:
        assert launch_counts() == {}


def trained(trainer: Trainer, iterations: int) -> tuple[list[list[int]], list[torch.Tensor], list[float]]:
    """Picks, rewards and losses of each iteration."""
    losses = []
    picks, rewards = recorded(trainer)
    for _ in range(iterations):
        metrics = trainer.iteration()
        numbers, _ = read_metrics(metrics)
        losses.append(numbers["policy/loss"])
        assert numbers["policy/ratio_deviation"] <= 1e-6
    return [p.tolist() for p in picks], rewards, losses


def assert_same_training(kernels: tuple, reference: tuple) -> None:
    """The first iteration's latents are bitwise equal; later ones differ by what a rounded gradient moves the weights."""
    assert kernels[0] == reference[0]
    for number, (a, b) in enumerate(zip(kernels[1], reference[1], strict=True)):
        torch.testing.assert_close(a, b, rtol=0, atol=0 if number == 0 else 1e-5)
    assert kernels[2] == pytest.approx(reference[2], abs=1e-5)


@pytest.mark.parametrize("plan", ["fork", "trajectory"])
def test_five_iterations_match_the_reference(plan: str) -> None:
    """fp32 storage: the same picks, rewards within 1e-5, losses within 1e-5."""
    sections = {"rollout": {"plan": plan}, "train": {"slots": 1, "iterations": 5}}
    sections["loss"] = {"old_logp": "rollout" if plan == "fork" else "recompute"}
    runs = [trained(toy_trainer(recipe(kernels, **sections)), 5) for kernels in ("triton", "reference")]
    assert_same_training(*runs)


@pytest.mark.parametrize("strategy", ["random", "medium"])
def test_other_strategies_and_several_rewards(strategy: str) -> None:
    rewards = (RewardConfig(name="a", weight=1.0), RewardConfig(name="b", weight=0.5))
    runs = []
    for kernels in ("triton", "reference"):
        config = dataclasses.replace(recipe(kernels, selection={"strategy": strategy}), rewards=rewards)
        runs.append(trained(toy_trainer(config), 2))
    assert_same_training(*runs)


def test_tiny_recipe_picks_the_same_prompts() -> None:
    """Three one-slot iterations of the shipped tiny recipe, on the interpreter and on the references.

    By brightness, whose picks have margins, and with an Adam whose step is smooth in the gradient.
    """
    from adagrpo.build import build_trainer
    from adagrpo.recipe.load import load_recipe

    config = load_recipe("tiny")
    runs = []
    for kernels in ("triton", "reference"):
        one_slot = dataclasses.replace(
            config,
            engine=dataclasses.replace(config.engine, kernels=kernels),
            train=dataclasses.replace(config.train, slots=1, accumulation=1, iterations=3),
            rewards=(RewardConfig("brightness"),),
            optimizer=dataclasses.replace(config.optimizer, eps=1e-5),
        )
        runs.append(trained(build_trainer(one_slot)[0], 3))
    assert_same_training(*runs)


def test_triton_that_cannot_run_is_refused_before_any_work(monkeypatch: pytest.MonkeyPatch) -> None:
    from adagrpo.build import check_engine
    from adagrpo.errors import InputError

    config = recipe("triton", model={"device": "cpu"})
    check_engine(config)
    with pytest.raises(InputError, match="fp64"):
        check_engine(recipe("triton", model={"device": "cpu"}, rollout={"storage": "fp64"}))
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(InputError, match=r"engine\.kernels = triton.*TRITON_INTERPRET"):
        check_engine(config)
    check_engine(recipe("auto"))
