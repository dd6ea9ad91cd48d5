"""Run folders that commit 05477f5 wrote are resumed.

``former/`` is one of them: a toy run of four iterations, interrupted in the fourth, with a checkpoint of the second.
"""

import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch

from adagrpo.cli import main
from adagrpo.train import Trainer

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
FORMER = "05477f5"
OVERLAP = ["--data.allow-overlap"]  # it held out prompts that trained
MAKE = """
import sys
import torch
torch.set_num_threads(1)
from adagrpo.cli import main
from adagrpo.run.fit import Fit

recipe, out, last = sys.argv[1:]
one = Fit._one_iteration

def interrupted(self):
    if self.trainer.iterations_done == int(last):
        raise KeyboardInterrupt
    return one(self)

Fit._one_iteration = interrupted
sys.exit(main(["train", recipe, "--out", out]))
"""


def untimed(folder: Path) -> list[dict]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if not k.endswith("seconds")} for line in lines]


def test_a_folder_of_the_former_version_goes_on(tmp_path, capsys, monkeypatch) -> None:
    run = tmp_path / "run"
    shutil.copytree(HERE / "former", run)
    before = untimed(run)
    loaded = []
    load = Trainer.load_state_dict
    monkeypatch.setattr(
        Trainer, "load_state_dict", lambda self, state: (load(self, state), loaded.append(self.state_dict()))[0]
    )
    command = ["train", str(run / "config.toml"), "--out", str(run), "--resume", "latest"]
    assert main(command) == 2
    assert "data.allow_overlap" in capsys.readouterr().err and untimed(run) == before and not loaded
    state = torch.load(run / "checkpoints" / "step-000002" / "state" / "state.pt")["trainer"]
    assert main([*command, *OVERLAP]) == 0
    assert "held-out reward" in capsys.readouterr().out
    assert {key: value for key, value in loaded[0].items() if key != "optimizer"}.keys() == state.keys() - {"optimizer"}
    assert loaded[0]["stream_position"] == state["stream_position"] and loaded[0]["draws"] == state["draws"] == 2
    assert untimed(run)[:2] == before[:2] and [line["iteration"] for line in untimed(run)] == [1, 2, 3, 4]
    assert json.loads((run / "result.json").read_text())


@pytest.mark.proof
def test_a_former_run_ends_bit_for_bit_as_it_would_have_there(tmp_path, capsys) -> None:
    """The former version is taken from the history; skipped where that is not there."""
    found = subprocess.run(["git", "-C", str(ROOT), "archive", FORMER, "adagrpo", "kernels", "tests"], capture_output=True)
    if found.returncode:
        pytest.skip(f"no commit {FORMER} here")
    former = tmp_path / "former"
    with tarfile.open(fileobj=io.BytesIO(found.stdout)) as files:
        files.extractall(former, filter="data")
    (former / "make.py").write_text(MAKE)
    paths = [str(former), str(former / "kernels"), str(former / "tests")]
    environment = os.environ | {"PYTHONPATH": ":".join(paths)}
    recipe = str(HERE / "former" / "config.toml")
    for name, last, code in (("whole", 9, 0), ("run", 3, 130)):
        command = [sys.executable, str(former / "make.py"), recipe, str(tmp_path / name), str(last)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path)
        assert done.returncode == code, done.stderr
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert main(["train", recipe, "--out", str(tmp_path / "run"), "--resume", "auto", *OVERLAP]) == 0
    finally:
        torch.set_num_threads(threads)
    ours, theirs = untimed(tmp_path / "run"), untimed(tmp_path / "whole")
    assert [{k: line.get(k) for k in other} for line, other in zip(ours, theirs, strict=True)] == theirs
    states = [
        torch.load(tmp_path / name / "checkpoints" / "step-000004" / "state" / "state.pt")["trainer"]["optimizer"]
        for name in ("run", "whole")
    ]
    for part in ("masters", "averages"):
        assert all(torch.equal(a, b) for a, b in zip(states[0][part], states[1][part], strict=True))
