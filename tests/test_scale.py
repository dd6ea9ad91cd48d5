"""The calls of docs/scale.md: torchrun and adagrpo take their options, and the Slurm script queues again what it should."""

import json
import os
import re
import shlex
import signal
import subprocess
import time
from pathlib import Path

import pytest

from adagrpo.recipe.load import recipe_names

ROOT = Path(__file__).resolve().parents[1]
BLOCKS = re.findall(r"```bash\n(.*?)```", (ROOT / "docs" / "scale.md").read_text("utf-8"), re.DOTALL)
SCRIPT = next(block for block in BLOCKS if block.startswith("#!"))

SRUN = """#!/bin/bash
while [[ $1 == --* ]]; do echo "$1" >> "$LOG/srun"; shift; done
exec "$@"
"""
SCONTROL = """#!/bin/bash
if [ "$1" = show ]; then printf 'node-a\\nnode-b\\n'; else echo "$@" >> "$LOG/scontrol"; fi
"""
TORCHRUN = """#!/usr/bin/env python3
import json, os, signal, sys, time
from pathlib import Path
log, end, code = Path(os.environ["LOG"]), os.environ["END"], os.environ["CODE"]
def save(number, frame):
    time.sleep(0.5)
    if code:
        (log / "runs/first/ended.json").write_text(json.dumps({"code": int(code), "why": ""}, indent=1))
    sys.exit(1)
signal.signal(signal.SIGUSR1, save)
(log / "started").write_text(json.dumps(sys.argv[1:]))
if end == "signal":
    time.sleep(60)
sys.exit(int(end))
"""


def job(folder: Path, end: str, code: str = "") -> subprocess.Popen[bytes]:
    """The script under a Slurm whose only node runs ``torchrun``, which ends as ``end`` says.

    Args:
        code: of the run's end on purpose.
    """
    (folder / "bin").mkdir()
    (folder / "runs" / "first").mkdir(parents=True)
    (folder / "runs" / "first" / "ended.json").write_text('{"code": 138}')  # an earlier job's
    for name, text in {"srun": SRUN, "scontrol": SCONTROL, "torchrun": TORCHRUN}.items():
        (folder / "bin" / name).write_text(text)
        (folder / "bin" / name).chmod(0o755)
    (folder / "job.sh").write_text(SCRIPT)
    slurm = {"SLURM_JOB_ID": "77", "SLURM_JOB_NODELIST": "node-[a-b]", "SLURM_JOB_NUM_NODES": "2"}
    slurm |= {"SLURM_GPUS_ON_NODE": "8", "SLURM_CPUS_PER_TASK": "96"}
    place = {"PATH": f"{folder / 'bin'}:{os.environ['PATH']}", "LOG": str(folder), "END": end, "CODE": code}
    return subprocess.Popen(["bash", str(folder / "job.sh")], env=os.environ | slurm | place, cwd=folder)


def ended(process: subprocess.Popen[bytes]) -> int:
    try:
        return process.wait(30)
    finally:
        process.kill()


def test_the_script_is_bash() -> None:
    subprocess.run(["bash", "-n"], input=SCRIPT, text=True, check=True, timeout=30)


@pytest.mark.parametrize("end", ["0", "1"])
def test_a_job_that_ends_by_itself_is_not_queued_again(end: str, tmp_path: Path) -> None:
    assert ended(job(tmp_path, end)) == int(end)
    arguments = json.loads((tmp_path / "started").read_text())
    assert arguments[arguments.index("--rdzv-id") + 1] == "77-0"
    assert arguments[arguments.index("--rdzv-endpoint") + 1] == "node-a:29500"
    assert not (tmp_path / "scontrol").exists() and "--kill-on-bad-exit=0" in (tmp_path / "srun").read_text().splitlines()


@pytest.mark.parametrize(("code", "again"), [("138", True), ("", True), ("0", False), ("3", False)])
def test_a_job_whose_time_is_up_is_queued_again_if_there_is_more_to_do(code: str, again: bool, tmp_path: Path) -> None:
    process, deadline = job(tmp_path, "signal", code), time.monotonic() + 30
    while not (tmp_path / "started").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGUSR1)
    assert ended(process) == 1  # as torchrun ends after a signal
    assert (tmp_path / "scontrol").exists() == again
    assert not again or (tmp_path / "scontrol").read_text() == "requeue 77\n"


def torchruns() -> list[list[str]]:
    """The words of every torchrun call of the page."""
    found = []
    for block in BLOCKS:
        for line in block.replace("\\\n", " ").splitlines():
            words = [word for word in shlex.split(line, comments=True) if word != "&"]
            if "torchrun" in words:
                found.append(words[words.index("torchrun") + 1 :])
    return found


def test_torchrun_takes_every_option_of_the_page() -> None:
    from torch.distributed.run import get_args_parser

    assert len(torchruns()) == 3
    for words in torchruns():
        given = get_args_parser().parse_args(words)
        assert given.module and given.training_script == "adagrpo"
        assert "SIGUSR1" in given.signals_to_handle.split(",") and given.shutdown_timeout == 900
        command, recipe, *keys = given.training_script_args
        assert command == "train" and recipe in recipe_names() and keys[-2:] == ["--resume", "auto"]
        ranks = 8 if given.nnodes == "1:1" else 16
        assert int(keys[keys.index("--train.slots") + 1]) % ranks == 0
