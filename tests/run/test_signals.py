"""Signals finish the iteration, save and leave with their codes; a second Ctrl-C leaves at once; outside iterations all do."""

import json
import os
import signal

import parts
import pytest
import torch
from toy import toy_config, toy_trainer

from adagrpo.cli import main
from adagrpo.recipe.keys import RewardConfig
from adagrpo.recipe.load import to_toml
from adagrpo.run.fit import Fit
from adagrpo.run.folder import RunFolder
from adagrpo.run.held_out import HeldOut


def start(path, send: dict[int, list[signal.Signals]]) -> Fit:
    """A toy run that receives signals in the middle of some iterations."""
    config = toy_config(train={"iterations": 6, "slots": 1}, output={"grid_every": 0, "checkpoint_every": 5})
    run = RunFolder.fresh(path)
    trainer = toy_trainer(config)
    run.write_start(config, trainer.model.device, {})
    advantage = trainer.advantage

    def interrupted(rewards):
        for number in send.get(trainer.iterations_done + 1, []):
            os.kill(os.getpid(), number)
        return advantage(rewards)

    trainer.advantage = interrupted
    return Fit(trainer.config, trainer, run, ["a", "b"], say=lambda line: None)


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 143), (signal.SIGUSR1, 138), (signal.SIGHUP, 129), (signal.SIGINT, 130)]
)
def test_first_signal_finishes_and_saves(number: signal.Signals, code: int, tmp_path) -> None:
    handler = signal.getsignal(number)
    fit = start(tmp_path / "run", {3: [number]})
    assert fit().exit_code == code
    assert fit.run.latest_checkpoint().name == "step-000003"
    assert number.name in (fit.run.path / "events.jsonl").read_text()
    assert signal.getsignal(number) is handler


def test_second_interrupt_leaves_at_once(tmp_path) -> None:
    fit = start(tmp_path / "run", {6: [signal.SIGINT, signal.SIGINT]})
    with pytest.raises(KeyboardInterrupt):
        fit()
    assert fit.run.latest_checkpoint().name == "step-000005"
    assert fit.trainer.iterations_done == 5


def test_a_second_ctrl_c_is_a_second_ctrl_c(tmp_path) -> None:
    fit = start(tmp_path / "one", {3: [signal.SIGTERM, signal.SIGINT]})
    assert fit().exit_code == 143 and fit.run.latest_checkpoint().name == "step-000003"
    fit = start(tmp_path / "two", {3: [signal.SIGTERM, signal.SIGHUP, signal.SIGINT, signal.SIGINT]})
    with pytest.raises(KeyboardInterrupt):
        fit()
    assert fit.run.latest_checkpoint() is None


def test_what_is_ignored_stays_ignored(tmp_path) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup leaves it
    try:
        assert start(tmp_path / "run", {3: [signal.SIGHUP]})().exit_code == 0
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_signal_while_saving_or_evaluating_loses_nothing(tmp_path, monkeypatch) -> None:
    save, scores = torch.save, HeldOut.scores
    for moment in ("save", "evaluate"):
        fit = start(tmp_path / moment, {})

        def saving(state, path, **rest) -> None:
            save(state, path, **rest)
            os.kill(os.getpid(), signal.SIGTERM)

        def evaluating(self, prompts, noises, stream):
            found = scores(self, prompts, noises, stream)
            if self.trainer.iterations_done == 2:
                os.kill(os.getpid(), signal.SIGTERM)
            return found

        with monkeypatch.context() as patch:
            patch.setattr(torch, "save", saving) if moment == "save" else patch.setattr(HeldOut, "scores", evaluating)
            assert fit().exit_code == 143
        assert fit.run.latest_checkpoint().name == {"save": "step-000005", "evaluate": "step-000002"}[moment]
        assert not [p for p in fit.run.path.rglob("*") if "partial" in p.name]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("moment", ["model", "baseline", "comparison"])
def test_a_signal_outside_the_iterations_leaves_cleanly(moment: str, number, tmp_path, monkeypatch, capsys) -> None:
    config = toy_config(
        model={"family": "parts:model", "device": "cpu"},
        data={"prompts": "parts:prompts", "held_out": "parts:held_out"},
        rewards=(RewardConfig("parts:reward"),),
        train={"iterations": 2, "slots": 1},
        evaluation={"every": 0, "final_prompts": 4, "final_noises": 2},
    )
    (tmp_path / "toy.toml").write_text(to_toml(config), "utf-8")
    command = ["train", str(tmp_path / "toy.toml"), "--out", str(tmp_path / "run"), "--resume", "auto"]
    model, scores = parts.model, HeldOut.scores

    def signalled_model(*args, **kwargs):
        os.kill(os.getpid(), number)
        return model(*args, **kwargs)

    def signalled_scores(self, prompts, noises, stream):
        if self.trainer.iterations_done == {"baseline": 0, "comparison": 2}[moment]:
            os.kill(os.getpid(), number)
        return scores(self, prompts, noises, stream)

    with monkeypatch.context() as patch:
        if moment == "model":
            patch.setattr(parts, "model", signalled_model)
        else:
            patch.setattr(HeldOut, "scores", signalled_scores)
        assert main(command) == 128 + number
    assert f"stopped by {number.name}" in capsys.readouterr().err
    assert not [p for p in tmp_path.rglob("*") if "partial" in p.name or p.name == ".owner.json"]
    assert main(command) == 0
    assert json.loads((tmp_path / "run" / "result.json").read_text())["prompts"] == 4
