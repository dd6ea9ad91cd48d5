"""Kills, starts, pairs and damage (``killing.py``): bitwise, named or fallen back, none silent.

Writes ``bench/results/cpu/killing.json``.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from adagrpo.run.machine import describe_machine

HERE = Path(__file__).resolve().parent
RECORD = HERE.parents[1] / "bench" / "results" / "cpu" / "killing.json"
SEED = 12


@pytest.mark.proof
def test_nothing_is_lost_and_nothing_silent(tmp_path) -> None:
    found = []
    for part in ("kills", "starts", "pairs", "damage"):
        answer = tmp_path / f"{part}.json"
        command = [sys.executable, str(HERE / "killing.py"), part, "--seed", str(SEED), "--record", str(answer)]
        subprocess.run(command, timeout=3600)
        found.append(json.loads(answer.read_text()))
    machine = describe_machine(torch.device("cpu"))
    RECORD.write_text(
        json.dumps({"case": "tests/proof/killing.py", "parts": found, "machine": machine}, indent=1) + "\n", "utf-8"
    )
    assert [part["wrong"] for part in found] == [[]] * 4
