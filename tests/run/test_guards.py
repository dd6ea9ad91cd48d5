"""Guards trip when they should, and act: warn, stop, roll back."""

import dataclasses
import json
import math

import pytest
import torch
from toy import toy_config, toy_trainer

from adagrpo.errors import RunError
from adagrpo.parts.isolation import PartHung
from adagrpo.recipe.keys import GuardConfig, GuardsConfig
from adagrpo.run.fit import Fit
from adagrpo.run.folder import RunFolder
from adagrpo.run.guards import Guards

QUIET = GuardsConfig(
    **{f.name: GuardConfig() for f in dataclasses.fields(GuardsConfig) if f.name != "max_rollbacks"}, max_rollbacks=2
)


def record(**changes) -> dict:
    metrics = {"policy/loss": 0.0, "policy/grad_norm": 1.0, "policy/kl": 0.0, "policy/ratio_deviation": 0.0}
    metrics |= {"advantage/failed": 0.0, "advantage/equal_groups": 0.0, "reward/train": 0.5}
    return metrics | {name.replace("__", "/"): value for name, value in changes.items()}


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("kl", "policy__kl"),
        ("grad_norm", "policy__grad_norm"),
        ("ratio", "policy__ratio_deviation"),
        ("failed_rewards", "advantage__failed"),
        ("equal_groups", "advantage__equal_groups"),
    ],
)
def test_limits_and_patience(name: str, key: str) -> None:
    guards = Guards(dataclasses.replace(QUIET, **{name: GuardConfig(limit=2.0, patience=2)}))
    assert guards.observe(record(**{key: 3.0})) == []
    assert guards.observe(record(**{key: 1.0})) == []  # the row is broken
    assert guards.observe(record(**{key: 3.0})) == []
    (trip,) = guards.observe(record(**{key: 3.0}))
    assert trip.name == name and trip.action == "warn" and "3" in trip.message and f"guards.{name}" in trip.message
    assert guards.observe(record(**{key: math.nan})) == []  # a new row; not a number counts as beyond every limit
    assert len(guards.observe(record(**{key: math.nan}))) == 1


def test_non_finite_loss_or_gradient_trips() -> None:
    guards = Guards(dataclasses.replace(QUIET, non_finite=GuardConfig(limit=0.5, action="stop")))
    assert guards.observe(record()) == []
    assert guards.observe(record(policy__loss=math.nan))[0].action == "stop"
    assert guards.observe(record(policy__grad_norm=math.inf))[0].name == "non_finite"


def test_reward_hacking_is_held_out_falling_while_trained_rises() -> None:
    def outcomes(trained: list[float], held_out: list[float]) -> list[bool]:
        guards = Guards(dataclasses.replace(QUIET, reward_hacking=GuardConfig(limit=0.05)))
        pairs = zip(trained, held_out, strict=True)
        return [bool(guards.observe(record(reward__train=t, reward__held_out=h))) for t, h in pairs]

    assert outcomes([0.5, 0.6, 0.7], [0.5, 0.52, 0.4]) == [False, False, True]
    assert outcomes([0.5, 0.6, 0.4], [0.5, 0.52, 0.4]) == [False, False, False]  # both fall: not hacking
    assert outcomes([0.5, 0.6, 0.7], [0.5, 0.52, 0.48]) == [False, False, False]  # within the limit


def test_state_round_trip() -> None:
    config = dataclasses.replace(QUIET, kl=GuardConfig(limit=1, patience=2), reward_hacking=GuardConfig(limit=0.05))
    first, second = Guards(config), Guards(config)
    first.observe(record(policy__kl=5, reward__held_out=0.9))
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    later = record(policy__kl=5, reward__held_out=0.5, reward__train=0.6)
    assert [t.name for t in first.observe(later)] == [t.name for t in second.observe(later)] == ["kl", "reward_hacking"]


def start(path, guards: GuardsConfig, spikes: dict[int, float]) -> Fit:
    """A toy run whose gradient norm is reported as ``spikes[draw]`` at some draws."""
    config = toy_config(guards=guards, train={"iterations": 6, "slots": 1})
    run = RunFolder.fresh(path)
    trainer = toy_trainer(config)
    run.write_start(config, trainer.model.device, {})
    update = trainer.update

    def spiked(draw, advantage):
        policy = update(draw, advantage)
        if trainer.draws in spikes:
            policy["policy/grad_norm"] = torch.tensor(spikes[trainer.draws])
        return policy

    trainer.update = spiked
    return Fit(trainer.config, trainer, run, ["a", "b"], say=lambda line: None)


def events(fit: Fit) -> list[tuple[int, str]]:
    lines = (fit.run.path / "events.jsonl").read_text().splitlines()
    return [(json.loads(line)["iteration"], json.loads(line)["kind"]) for line in lines]


def limited(action: str) -> GuardsConfig:
    return dataclasses.replace(QUIET, grad_norm=GuardConfig(limit=100.0, action=action))


def test_warning_goes_on(tmp_path) -> None:
    fit = start(tmp_path / "run", limited("warn"), {3: 1e6})
    assert fit().exit_code == 0 and events(fit) == [(3, "warning")]


def test_stop_ends_with_code_three_and_saves_nothing_of_that_iteration(tmp_path) -> None:
    fit = start(tmp_path / "run", limited("stop"), {4: 1e6})
    assert fit().exit_code == 3 and events(fit) == [(4, "stop")]
    assert fit.run.latest_checkpoint().name == "step-000002"


def test_rollback_goes_on_from_the_last_checkpoint_with_new_prompts_and_noise(tmp_path) -> None:
    fit = start(tmp_path / "run", limited("rollback"), {3: 1e6})
    assert fit().exit_code == 0 and events(fit) == [(3, "rollback")]
    # 6 iterations and the one thrown away
    assert fit.trainer.draws == 7 and fit.trainer.stream.position == 7 * 3
    iterations = [json.loads(line)["iteration"] for line in fit.run.metrics_file.read_text().splitlines()]
    assert iterations == [1, 2, 3, 4, 5, 6]


def test_an_iteration_that_is_judged_on_resume_only_is_rolled_back_to_the_one_before(tmp_path) -> None:
    """Its evaluation hung, so its state was saved unjudged: going "back" to that state would trip the guard for ever."""
    fit = start(tmp_path / "run", limited("rollback"), {4: 1e6})
    curve = fit.held_out.curve

    def hangs() -> dict[str, float]:
        if fit.trainer.iterations_done == 4:
            raise PartHung("rewards.0 hangs")
        return curve()

    fit.held_out.curve = hangs
    with pytest.raises(RunError, match="hangs"):
        fit()
    saved = fit.run.latest_checkpoint()
    assert saved.name == "step-000004" and (fit.run.checkpoints / "step-000002").is_dir()
    config = fit.trainer.config
    resumed = Fit(config, toy_trainer(config), RunFolder.existing(tmp_path / "run", config), ["a", "b"], say=lambda line: None)
    resumed.resume(saved)
    assert resumed().exit_code == 0
    assert [kind for _, kind in events(resumed)].count("rollback") == 1
    told = (resumed.run.path / "events.jsonl").read_text()
    assert "back to iteration 2" in told and resumed.trainer.iterations_done == 6


def test_rollbacks_are_limited(tmp_path) -> None:
    fit = start(tmp_path / "run", limited("rollback"), {3: 1e6, 4: 1e6, 5: 1e6})
    assert fit().exit_code == 3
    assert events(fit) == [(3, "rollback"), (3, "rollback"), (3, "stop")]


def test_rollback_without_a_checkpoint_stops(tmp_path) -> None:
    fit = start(tmp_path / "run", limited("rollback"), {1: 1e6})
    assert fit().exit_code == 3 and events(fit) == [(1, "stop")]


def test_weights_that_are_not_finite_are_never_saved(tmp_path) -> None:
    fit = start(tmp_path / "run", QUIET, {2: math.nan})
    fit()
    assert [p.name for p in sorted(fit.run.checkpoints.iterdir())] == ["step-000004", "step-000006"]
