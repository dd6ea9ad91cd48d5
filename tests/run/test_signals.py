"""SIGTERM, SIGUSR1 and Ctrl-C finish the iteration, save and leave with their codes; a second Ctrl-C leaves at once."""

import os
import signal

import pytest
from toy import toy_config, toy_trainer

from adagrpo.fit import Fit
from adagrpo.run.folder import RunFolder


def start(path, send: dict[int, list[signal.Signals]]) -> Fit:
    """A toy run that receives signals in the middle of some iterations."""
    config = toy_config(train={"iterations": 6, "slots": 1}, output={"grid_every": 0, "checkpoint_every": 5})
    run = RunFolder.fresh(path)
    trainer = toy_trainer(config)
    run.write_start(config, trainer.model.device, {})
    fuse = trainer.fuse

    def interrupted(rewards):
        for number in send.get(trainer.iterations_done + 1, []):
            os.kill(os.getpid(), number)
        return fuse(rewards)

    trainer.fuse = interrupted
    return Fit(trainer, run, ["a", "b"], say=lambda line: None)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGUSR1, 138), (signal.SIGINT, 130)])
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
