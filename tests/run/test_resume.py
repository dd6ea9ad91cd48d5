"""A resumed run is the uninterrupted run, bit for bit; a damaged checkpoint is refused."""

import json
from pathlib import Path

import pytest
import torch
from toy import ToyModel, toy_config, toy_trainer

from adagrpo.errors import InputError, RunError
from adagrpo.recipe.keys import Config
from adagrpo.run.checkpoint import checkpoints, verify
from adagrpo.run.fit import Fit
from adagrpo.run.folder import RunFolder

HELD_OUT = ["a", "b", "c", "d"]


def start(config: Config, path) -> Fit:
    run = RunFolder.fresh(path)
    trainer = toy_trainer(config)
    run.write_start(config, trainer.model.device, {})
    return Fit(trainer.config, trainer, run, HELD_OUT, say=lambda line: None)


def records(fit: Fit) -> list[dict]:
    lines = fit.run.metrics_file.read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if not k.endswith("seconds")} for line in lines]


def weights(fit: Fit) -> list[torch.Tensor]:
    return [p.detach().clone() for _, p in fit.trainer.model.trainable()]


@pytest.mark.parametrize("plan", ["fork", "window"])
def test_resume_is_exact(plan: str, tmp_path) -> None:
    config = toy_config(
        rollout={"plan": plan, "window_size": 3, "window_every": 1, "trained_share": 0.7},
        loss={"old_logp": "rollout" if plan == "fork" else "recompute", "kl_weight": 0.1},
        optimizer={"lr": 1e-2, "schedule": "linear", "ema_decay": 0.5},
        train={"iterations": 5, "slots": 2},
    )
    whole = start(config, tmp_path / "whole")
    gain = whole().gain
    broken = start(config, tmp_path / "broken")
    original, calls = broken.trainer.iteration, []

    def dies_in_iteration_four():
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return original()

    broken.trainer.iteration = dies_in_iteration_four
    with pytest.raises(KeyboardInterrupt):
        broken()
    assert [r["iteration"] for r in records(broken)] == [1, 2, 3]
    resumed = Fit(config, toy_trainer(config), RunFolder.existing(tmp_path / "broken", config), HELD_OUT, say=lambda line: None)
    resumed.resume(resumed.run.latest_checkpoint())
    assert resumed.trainer.iterations_done == 2
    again = resumed().gain
    assert records(resumed) == records(whole)
    assert all(torch.equal(a, b) for a, b in zip(weights(whole), weights(resumed), strict=True))
    assert again == gain


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux's list of mapped files")
def test_a_resumed_run_keeps_no_removed_checkpoint_on_disk(tmp_path) -> None:
    """States are mapped, not read: a tensor that stayed one would hold the whole file after its removal."""
    config = toy_config(train={"iterations": 6, "slots": 2}, output={"keep_last": 1}, selection={"probe": "memory"})
    begun = start(config, tmp_path / "run")
    begun.trainer.update, update = (
        lambda *args: 1 / 0 if begun.trainer.iterations_done == 3 else update(*args),
        begun.trainer.update,
    )
    with pytest.raises(ZeroDivisionError):
        begun()
    resumed = Fit(config, toy_trainer(config), RunFolder.existing(tmp_path / "run", config), HELD_OUT, say=lambda line: None)
    resumed.resume(resumed.run.latest_checkpoint())
    resumed()
    assert str(tmp_path) not in Path("/proc/self/maps").read_text()


def test_portable_part_holds_the_weight_average(tmp_path) -> None:
    fit = start(toy_config(optimizer={"lr": 1e-2, "ema_decay": 0.9}), tmp_path / "run")
    fit()
    portable = ToyModel()
    portable.load_portable(fit.run.latest_checkpoint())
    average = fit.trainer.optimizer.averages[0]
    assert torch.equal(portable.transformer.mix, average) and not torch.equal(average, weights(fit)[0])


def test_checkpoints_are_rotated_and_verified(tmp_path) -> None:
    fit = start(toy_config(train={"iterations": 8, "slots": 1}), tmp_path / "run")
    fit()
    found = checkpoints(fit.run.checkpoints)
    assert [p.name for p in found] == ["step-000006", "step-000008"]
    state = found[-1] / "state" / "state.pt"
    content = bytearray(state.read_bytes())
    content[100] ^= 1
    state.write_bytes(content)
    with pytest.raises(InputError, match=r"state\.pt: missing, truncated or altered"):
        verify(found[-1])
    (found[0] / "checkpoint.json").unlink()
    with pytest.raises(InputError, match="not a complete checkpoint"):
        verify(found[0])


def test_a_failed_save_leaves_nothing(tmp_path, monkeypatch) -> None:
    fit = start(toy_config(), tmp_path / "run")
    fit.trainer.iteration()
    monkeypatch.setattr(torch, "save", lambda *a: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(RunError, match="No space left on device"):
        fit.state.save()
    assert list(fit.run.checkpoints.iterdir()) == []


def test_folders_of_others_are_not_touched(tmp_path) -> None:
    config = toy_config()
    (tmp_path / "mine.txt").write_text("x")
    with pytest.raises(InputError, match="not an empty folder"):
        RunFolder.fresh(tmp_path)
    start(config, tmp_path / "run")()
    with pytest.raises(InputError, match="--resume latest"):
        RunFolder.fresh(tmp_path / "run")
    with pytest.raises(InputError, match=r"rollout\.group_size = 4 there, 6 here"):
        RunFolder.existing(tmp_path / "run", toy_config(rollout={"group_size": 6}))
    with pytest.raises(InputError, match="no run to resume"):
        RunFolder.existing(tmp_path / "empty", config)
