"""`adagrpo doctor --recipe`: every check of a recipe that can be trained passes, and each fault fails its own row."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from adagrpo.cli import main
from adagrpo.doctor import rehearse
from adagrpo.doctor.selftest import FAILED, PASSED, SKIPPED
from adagrpo.recipe.keys import Config, RewardConfig
from adagrpo.recipe.load import load_recipe


class Odd:
    """Scores that are wrong in the way that is asked for."""

    def __init__(self, fault: str) -> None:
        self.fault, self.calls = fault, 0

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        self.calls += 1
        scores = images.mean((1, 2, 3))
        return {"nan": scores * torch.nan, "drifts": scores + self.calls}.get(self.fault, scores)


def short_tiny() -> Config:
    tiny, r = load_recipe("tiny"), dataclasses.replace
    return r(
        tiny,
        rollout=r(tiny.rollout, steps=5, group_size=2),
        selection=r(tiny.selection, candidates=2),
        train=r(tiny.train, slots=1),
    )


def rows(config: Config) -> dict[str, tuple[str, str]]:
    return {row.name: (row.outcome, row.detail) for row in rehearse.check_recipe(config)}


def with_rewards(config: Config, *entries: RewardConfig) -> Config:
    return dataclasses.replace(config, rewards=entries)


def test_a_sound_recipe_passes_every_check_and_writes_nothing(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    keys = ("--rollout.group-size", "2", "--selection.candidates", "2", "--train.slots", "1", "--rollout.steps", "5")
    assert main(("doctor", "--recipe", "tiny", *keys)) == 0
    out = capsys.readouterr().out
    assert out.count(" pass ") == 9 and "FAIL" not in out and "tiny can be trained here" in out
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("fault", "words"), [("nan", "not finite"), ("drifts", "not deterministic")])
def test_a_reward_that_fails_or_drifts_is_named(fault: str, words: str) -> None:
    odd = RewardConfig(name=f"{__name__}:Odd", kwargs={"fault": fault})
    found = rows(with_rewards(short_tiny(), RewardConfig(), odd))
    outcome, detail = found[f"rewards.1 ({__name__}:Odd)"]
    assert outcome == FAILED and words in detail
    assert found["rewards.0 (tiny)"][0] == PASSED and found["iterations"][0] == SKIPPED


def test_a_reward_is_tried_on_the_device_of_the_run_and_then_rests(monkeypatch) -> None:
    told: list[object] = []

    class Placed:
        groupwise = False

        def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
            told.append((images.device.type, prompts.text_index.device.type))
            return torch.full((len(images),), 0.5)

        def rest(self) -> None:
            told.append("rests")

    monkeypatch.setattr(rehearse, "place_reward", lambda *given: Placed())
    monkeypatch.setattr(rehearse, "choose_device", lambda name: torch.device("meta"))
    assert rehearse._reward(short_tiny(), rehearse._Found(prompts=["a red cat"]), 0)[0] == PASSED
    assert told == [("meta", "meta"), ("meta", "meta"), "rests"]


def test_scores_outside_of_where_they_lie_are_named(monkeypatch) -> None:
    monkeypatch.setitem(rehearse.BUILT_IN, "tiny", dataclasses.replace(rehearse.BUILT_IN["tiny"], bounds=(2.0, 3.0)))
    assert "outside 2 to 3" in rows(short_tiny())["rewards.0 (tiny)"][1]
    shifted = with_rewards(short_tiny(), RewardConfig(scale=0.5, shift=2.5))
    assert "outside 2 to 3" in rows(shifted)["rewards.0 (tiny)"][1]  # bounds are of the reward's own scores


def test_missing_files_fail_before_anything_is_loaded(monkeypatch) -> None:
    monkeypatch.setattr(rehearse, "build_model", lambda *given: pytest.fail("loaded"))
    found = rows(with_rewards(short_tiny(), RewardConfig(name="imagereward")))
    outcome, detail = found["rewards.0 (imagereward) files"]
    assert outcome == FAILED and "hf download THUDM/ImageReward ImageReward.pt" in detail
    assert found["model"][0] == found["iterations"][0] == SKIPPED


def test_too_little_disk_fails_its_row(monkeypatch) -> None:
    free = type("Usage", (), {"free": 10})
    monkeypatch.setattr(rehearse.shutil, "disk_usage", lambda folder: free)
    outcome, detail = rows(short_tiny())["disk"]
    assert outcome == FAILED and "output.keep_last" in detail


def test_keys_without_a_recipe_and_unknown_ones_are_errors(capsys) -> None:
    with pytest.raises(SystemExit):
        main(("doctor", "--data.prompts", "x"))
    assert main(("doctor", "--recipe", "tinyy")) == 2
    assert "did you mean tiny" in capsys.readouterr().err
