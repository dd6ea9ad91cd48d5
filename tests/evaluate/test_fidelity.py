"""The fidelity report: what it says of rollouts that are the policy's, nearly the policy's, and not at all."""

import dataclasses
import json
import math

import pytest
import torch

from adagrpo.build import build_model
from adagrpo.cli import main
from adagrpo.evaluate.fidelity import Fidelity, changed_levers, compare
from adagrpo.recipe.keys import Config, EngineConfig, RolloutConfig, SelectionConfig
from adagrpo.rewards import build_reward
from adagrpo.text.strict_json import to_json
from adagrpo.tiny.prompts import training_prompts

PROMPTS = training_prompts("wide")[:60]
ROLLOUT = RolloutConfig(steps=6, sde_steps=(0, 2), group_size=3)


def recipe(engine: dict | None = None, **rollout) -> Config:
    changed = dataclasses.replace(ROLLOUT, **rollout)
    return Config(rollout=changed, selection=SelectionConfig(candidates=4), engine=EngineConfig(**(engine or {})))


def report(config: Config, reward: str, slots: int = 2) -> Fidelity:
    return compare(config, build_model(config.model), [build_reward(reward, {})], PROMPTS, slots)


def test_lossless_levers_pass() -> None:
    """By brightness, which is smooth: a rounding error cannot tip a threshold of the reward."""
    found = report(recipe({"forward": "fused"}), "brightness")
    assert found.passed and found.same_pick == 1 and found.spearman > 0.999 and found.images == 8
    assert found.latent_distance < 1e-4 and found.worst_image_distance < 1e-2


def test_a_shortened_tail_is_compared_on_forks_of_one_anchor() -> None:
    near, far = (report(recipe(tail_steps=count), "tiny") for count in (4, 1))
    assert math.isnan(near.same_pick) and near.images == 2 * 2 * 3
    assert 0 < near.image_distance < far.image_distance and not far.passed
    assert near.spearman > far.spearman


def test_broken_rollouts_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    from adagrpo.models.fused_flux import FusedFluxForward

    velocity = FusedFluxForward.velocity
    monkeypatch.setattr(FusedFluxForward, "velocity", lambda self, x, *rest: 1.5 * velocity(self, x, *rest))
    assert not report(recipe({"forward": "fused"}), "tiny").passed


@pytest.mark.parametrize(("spearman", "same_pick", "passed"), [
    (0.98, 0.95, True), (0.979, 1.0, False), (1.0, 0.94, False), (0.99, math.nan, True), (math.nan, 1.0, False),
])  # fmt: skip
def test_the_written_threshold(spearman: float, same_pick: float, passed: bool) -> None:
    found = Fidelity("r", {}, "cpu", 1, 1, 0.0, 0.0, 0.0, spearman, same_pick, math.nan)
    assert found.passed is passed and found.as_json()["passed"] is passed
    assert json.loads(to_json(found.as_json()))["group_spearman"] is None


def test_levers_are_what_differs_from_the_policy() -> None:
    assert changed_levers(recipe()) == {}
    config = recipe({"precision": "fp8", "max_rows": 4, "cuda_graphs": True}, tail_steps=3)
    assert changed_levers(config) == {"engine.precision": "fp8", "rollout.tail_steps": 3}


def test_the_command_writes_its_report_and_its_exit_code(tmp_path, capsys) -> None:
    keys = ["--rollout.steps", "6", "--rollout.sde-steps", "0", "2", "--rollout.group-size", "2", "--selection.candidates", "3"]
    out = tmp_path / "new" / "report.json"
    code = main(
        [
            "fidelity",
            "tiny",
            "--slots",
            "2",
            "--out",
            str(out),
            "--engine.forward",
            "fused",
            *keys,
            "--rewards.0.name",
            "brightness",
        ]
    )
    written = json.loads(out.read_text("utf-8"))
    assert code == 0 and written["passed"] and written["levers"] == {"engine.forward": "fused"}
    assert "verdict          passed" in capsys.readouterr().out


@pytest.mark.parametrize(("arguments", "message"), [
    (["tiny"], "its rollouts are the policy's own; set engine.precision"),
    (["tiny", "--slots", "0", "--engine.precision", "fp8"], "--slots 0: must be at least 1"),
    (["nothing"], "nothing"),
])  # fmt: skip
def test_what_cannot_be_compared_is_said(arguments: list[str], message: str, capsys) -> None:
    assert main(["fidelity", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_ranks_ignore_failed_samples() -> None:
    from adagrpo.evaluate.fidelity import spearman

    a = torch.tensor([1.0, math.nan, 3.0, 2.0, 5.0])
    b = torch.tensor([10.0, 0.0, 30.0, 20.0, math.inf])
    assert spearman(a, b) == pytest.approx(1) and math.isnan(spearman(a, torch.ones(5)))
