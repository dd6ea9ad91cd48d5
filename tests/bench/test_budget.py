"""The budget gate: hand-worked counts of the published schedule, limits, and planted faults that it must catch."""

import dataclasses
import json

import pytest
import small_sd3
import torch
from toy import ToyModel, toy_config

import adagrpo.engine.fusion
from adagrpo.bench.budget import (
    exceeded,
    limits,
    off_schedule,
    overhead_of,
    schedule_evaluations,
    scheduled_probes,
    unseen_work,
)
from adagrpo.bench.measure import Iteration, host_read
from adagrpo.cli import main
from adagrpo.engine.executor import RolloutExecutor
from adagrpo.forecast import planned_evaluations
from adagrpo.forward.forwards import PolicyForward
from adagrpo.recipe.keys import BudgetConfig, Config, RewardConfig
from adagrpo.recipe.load import load_recipe, to_toml
from adagrpo.recipe.rules import check
from adagrpo.study.hosts import hosts, with_probe, without_adagrpo


def toy(**sections) -> Config:
    """The published schedule on the toy model, one slot."""
    rollout = {"steps": 16, "sde_steps": (0, 2, 4, 6), "group_size": 12, **sections.pop("rollout", {})}
    parts = {
        "model": {"family": "parts:model", "device": "cpu"},
        "data": {"prompts": "parts:prompts", "held_out": "parts:held_out"},
    }
    train = {"slots": 1, **sections.pop("train", {})}
    selection = {"candidates": 10, **sections.pop("selection", {})}
    rewards = (RewardConfig("parts:reward"),)
    return toy_config(rollout=rollout, train=train, selection=selection, rewards=rewards, name="toy", **parts, **sections)


def run(config: Config, tmp_path, *extra: str) -> int:
    file = tmp_path / "toy.toml"
    file.write_text(to_toml(config), "utf-8")
    return main(["bench", "budget", str(file), "--rounds", "2", "--out", str(tmp_path / "results"), *extra])


def iteration(seconds: float, **evaluations: int) -> Iteration:
    phases = dict.fromkeys(("select", "prefix", "decode", "reward", "advantage", "update", "sync", "other"), 0.0)
    return Iteration(seconds, {"probe": 0.1, "rollout": seconds - 0.1, **phases}, evaluations, {}, 0, 0, None)


def test_published_schedule_by_hand() -> None:
    """10 x 16 probes, 12 x (15 + 13 + 11 + 9) branches, 4 replays: 740; with one candidate 16 + 576 + 4 = 596."""
    config = load_recipe("bench-tiny")
    assert schedule_evaluations(config) == {"probe": 160, "rollout": 576, "update": 4}
    assert schedule_evaluations(without_adagrpo(config)) == {"probe": 16, "rollout": 576, "update": 4}
    overhead = overhead_of("fork-probe", [iteration(1.2, probe=160, rollout=576, update=4)],
                           [iteration(1.0, probe=16, rollout=576, update=4)])  # fmt: skip
    assert overhead.evaluations == pytest.approx(144 / 596) and f"{overhead.evaluations:+.1%}" == "+24.2%"
    assert overhead.evaluations_by_phase == {"probe": 144 / 596, "rollout": 0, "update": 0}
    assert overhead.time == pytest.approx(0.2) and overhead.seconds["rollout"] == pytest.approx(0.2)


def test_schedules_of_all_hosts_by_hand() -> None:
    """Fresh velocities: 744 against 600. Trajectories: 160 probes, 12 x 16 rollouts, 12 x 4 replayed and 12 x 4 recomputed."""
    found, refused = hosts(toy())
    assert list(found) == ["fork-fresh", "fork-probe", "trajectory", "window"] and not refused
    for config in found.values():
        check(config)
    counts = {
        host: (schedule_evaluations(config), schedule_evaluations(without_adagrpo(config))) for host, config in found.items()
    }
    total = {host: tuple(sum(counted.values()) for counted in pair if counted) for host, pair in counts.items()}
    # The recompute and replay of each host: stored log-probabilities of the fork with fresh velocities need no recomputing.
    assert total["fork-fresh"] == (744, 600)
    assert total["fork-probe"] == (744, 600)  # 4 recomputed instead of 4 fresh
    assert total["trajectory"] == total["window"] == (160 + 192 + 48 + 48, 192 + 48 + 48)


def test_a_host_that_cannot_be_expressed_says_why() -> None:
    config = dataclasses.replace(toy(), rollout=dataclasses.replace(toy().rollout, steps=4, sde_steps=(0, 1, 2)))
    found, refused = hosts(dataclasses.replace(config, train=dataclasses.replace(config.train, steps_per_iteration=3)))
    assert "window" in found and not refused
    lossy = dataclasses.replace(toy(), engine=dataclasses.replace(toy().engine, precision="fp8"))
    lossy = dataclasses.replace(lossy, model=dataclasses.replace(lossy.model, family="flux"))
    assert "fork_velocity" in hosts(lossy)[1]["fork-probe"]


def test_limits() -> None:
    overhead = overhead_of("fork-probe", [iteration(1.3, probe=160)], [iteration(1.0, probe=120)])
    assert exceeded(overhead, {"evaluations": 0.34}) == []
    (evaluations,) = exceeded(overhead, {"evaluations": 0.25})
    assert "evaluations +33.3%" in evaluations and "budget.evaluations allows +25.0%" in evaluations
    (time,) = exceeded(overhead, {"evaluations": 0.34, "time": 0.25})
    assert "time +30.0%" in time and "budget.time allows +25.0%" in time
    assert exceeded(overhead, {"evaluations": 0.34, "time": 0.31}) == []
    (cheap,) = exceeded(overhead, {"cheap_evaluations": 0.05})
    assert "budget.cheap_evaluations allows +5.0%" in cheap


def test_each_probe_has_its_own_limits() -> None:
    budget = {"evaluations": 0.4, "time": 0.3, "cheap_evaluations": 0.2, "cheap_time": 0.1}
    config = dataclasses.replace(toy(), budget=BudgetConfig(**budget))
    assert limits(config, torch.device("cpu")) == {"evaluations": 0.4}
    assert limits(config, torch.device("cuda")) == {"evaluations": 0.4, "time": 0.3}
    for name in ("short-2", "racing", "pool-2", "memory"):
        assert limits(with_probe(config, name), torch.device("cuda")) == {"cheap_evaluations": 0.2, "cheap_time": 0.1}


# One slot of the published schedule, ten candidates, without them 600.
@pytest.mark.parametrize(("name", "probes"), [
    ("full", 160), ("short-4", 40 + 32), ("short-2", 20 + 32), ("racing", 100 + 12 + 8 + 4), ("pool-3", 48), ("pool-2", 32),
    ("memory", 32), ("memory-2", 48), ("memory+pool", 32), ("random", 160),
    ("bots", 32), ("greso", 32), ("procurl", 32), ("dps", 32),
])  # fmt: skip
def test_scheduled_probes_by_hand_and_as_planned(name: str, probes: int) -> None:
    config = with_probe(toy(), name)
    assert scheduled_probes(config) == probes == planned_evaluations(config)["probe"]
    assert schedule_evaluations(without_adagrpo(config)) == {"probe": 16, "prefix": 4, "rollout": 576, "update": 4}


def test_named_probes_are_measured_and_gated(tmp_path, capsys) -> None:
    assert run(toy(), tmp_path, "--probes", "full,memory,pool-2") == 0
    out = capsys.readouterr().out
    assert "memory (limit: cheap_evaluations +5%): evaluations 616 against 600, +2.7%" in out
    assert run(toy(), tmp_path, "--probes", "memory,short-4") == 1
    out = capsys.readouterr().out
    assert "budget: short-4: evaluations +9.3%" in out and "budget: memory" not in out
    assert run(toy(), tmp_path, "--probes", "memroy") == 2
    assert "unknown probe 'memroy'" in capsys.readouterr().err


def test_the_gate_passes_and_records(tmp_path, capsys) -> None:
    assert run(toy(), tmp_path) == 0
    out = capsys.readouterr().out
    assert "evaluations 744 against 600, +24.0%" in out and "trajectory (not gated): evaluations" in out
    (path,) = (tmp_path / "results").rglob("*.json")
    record = json.loads(path.read_text())
    assert record["facts"]["gated"] == ["fork-fresh"] and record["facts"]["problems"] == []
    assert record["facts"]["host_reads"] == {"fork-fresh": ""}
    assert len(record["series"]["fork-fresh/full/seconds"]["values"]) == 2
    assert record["series"]["window/plain/evaluations"]["median"] == 288


def test_the_gate_fails_above_the_recipes_limit(tmp_path, capsys) -> None:
    assert run(toy(), tmp_path, "--budget.evaluations", "0.2") == 1
    assert "budget: fork-fresh: evaluations +24.0%" in capsys.readouterr().out


def test_the_gate_fails_for_one_evaluation_more_than_scheduled(tmp_path, capsys, monkeypatch) -> None:
    velocity = RolloutExecutor.velocity

    def twice(self, x, index, conditioning, slot, phase):
        if phase == "prefix":
            velocity(self, x[:1], index[:1], conditioning, slot[:1], phase)
        return velocity(self, x, index, conditioning, slot, phase)

    monkeypatch.setattr(RolloutExecutor, "velocity", twice)
    assert run(toy(), tmp_path) == 1
    assert "off the recipe's schedule: prefix 5 instead of 4" in capsys.readouterr().out


def test_the_gate_fails_for_work_nobody_counted(tmp_path, capsys, monkeypatch) -> None:
    velocity = PolicyForward.velocity

    def twice(self, x, index, prepared, slot):
        velocity(self, x, index, prepared, slot)
        return velocity(self, x, index, prepared, slot)

    monkeypatch.setattr(PolicyForward, "velocity", twice)
    assert run(toy(), tmp_path) == 1
    assert "1488 rows entered a transformer, 744 evaluations were counted" in capsys.readouterr().out


def test_under_classifier_free_guidance_an_evaluation_is_two_rows(tmp_path, capsys) -> None:
    """2 x 2 x 4 probes, 2 replays of 2 slots, 2 x 3 x (3 + 2) branches, 4 transitions: 54."""
    file = tmp_path / "sd3.toml"
    file.write_text(to_toml(dataclasses.replace(small_sd3.recipe(small_sd3.saved(tmp_path / "sd3")), name="sd3")), "utf-8")
    command = ["bench", "budget", str(file), "--rounds", "1", "--probes", "full", "--out", str(tmp_path / "results")]
    assert main(command) == 0
    assert "evaluations 54 against 46" in capsys.readouterr().out
    assert unseen_work("full", 54, 54, 2) == ["full: 54 rows entered a transformer, 54 evaluations of 2 were counted"]


def test_the_gate_fails_for_a_host_sync(tmp_path, capsys, monkeypatch) -> None:
    advantage = adagrpo.engine.fusion.reward_advantage

    def reading(rewards, *args):
        rewards.sum().item()
        return advantage(rewards, *args)

    monkeypatch.setattr(adagrpo.engine.fusion, "reward_advantage", reading)
    assert run(toy(), tmp_path) == 1
    out = capsys.readouterr().out
    assert "an iteration reads the device: phase advantage, test_budget.py:" in out


def test_an_adapter_that_ignores_the_device_is_not_called_clean(monkeypatch) -> None:
    import parts

    monkeypatch.setattr(parts, "model", lambda path, dtype, device, height, width: ToyModel(dtype))
    found = host_read(toy())
    assert not found.checked and "ignores the device" in found.where


def test_work_that_is_not_fixed_has_no_schedule() -> None:
    assert schedule_evaluations(toy(rollout={"trained_share": 0.5})) is None
    assert off_schedule("fork", toy(advantage={"equal_groups": "refill"}), [iteration(1.0, probe=3)]) == []
    assert schedule_evaluations(toy(rollout={"tail_steps": 4})) == {"probe": 160, "prefix": 4, "rollout": 192, "update": 4}
    assert torch.tensor([min(15 - k, 4) for k in (0, 2, 4, 6)]).sum() * 12 == 192
