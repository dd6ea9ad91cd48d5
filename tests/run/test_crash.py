"""kill -9 at any moment loses nothing: the resumed run is the uninterrupted one, bit for bit."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from toy import toy_config, toy_trainer

from adagrpo.recipe.load import to_toml
from adagrpo.run.fit import Fit
from adagrpo.run.folder import RunFolder

HERE = Path(__file__).parent
HELD_OUT = ["a", "b", "c", "d"]
MOMENTS = ("probe", "rollout", "update", "write", "rename")
CONFIG = toy_config(
    train={"iterations": 6, "slots": 2}, optimizer={"lr": 1e-2, "ema_decay": 0.5, "schedule": "linear"}, name="toy"
)


def finished(fit: Fit) -> tuple[list[dict], list[torch.Tensor], dict]:
    lines = [json.loads(line) for line in fit.run.metrics_file.read_text().splitlines()]
    untimed = [{k: v for k, v in line.items() if not k.endswith("seconds")} for line in lines]
    return untimed, [p.detach().clone() for _, p in fit.trainer.model.trainable()], fit.run.read_json("result.json")


@pytest.fixture(scope="module")
def killed(tmp_path_factory) -> Path:
    """A folder with one run killed at each moment."""
    base = tmp_path_factory.mktemp("killed")
    (base / "recipe.toml").write_text(to_toml(CONFIG), "utf-8")
    command = [sys.executable, str(HERE / "crash.py"), str(base)]
    environment = os.environ | {"PYTHONPATH": ":".join([str(HERE.parent), *sys.path])}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    assert done.stdout.split("\n")[:-1] == [f"{moment} -9" for moment in MOMENTS], done.stderr
    return base


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in the killed runs
    run = RunFolder.fresh(tmp_path_factory.mktemp("whole") / "run")
    trainer = toy_trainer(CONFIG)
    run.write_start(CONFIG, trainer.model.device, {})
    fit = Fit(trainer.config, trainer, run, HELD_OUT, say=lambda line: None)
    fit()
    yield finished(fit)
    torch.set_num_threads(threads)


@pytest.mark.parametrize("moment", MOMENTS)
def test_killed_run_resumes_exactly(moment: str, killed: Path, whole) -> None:
    run = RunFolder.existing(killed / moment, CONFIG)
    checkpoint = run.latest_checkpoint()
    assert checkpoint.name == "step-000002"
    written = len(run.metrics_file.read_text().splitlines())
    assert written == (4 if moment in ("write", "rename") else 3)
    fit = Fit(CONFIG, toy_trainer(CONFIG), run, HELD_OUT, say=lambda line: None)
    fit.resume(checkpoint)
    assert len(run.metrics_file.read_text().splitlines()) == 2
    fit()
    records, weights, result = finished(fit)
    assert records == whole[0] and result == whole[2]
    assert all(torch.equal(a, b) for a, b in zip(weights, whole[1], strict=True))
    assert not list(run.checkpoints.glob(".*"))
