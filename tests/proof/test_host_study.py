"""The study of prompts that cannot be learnt runs to its end: 1.6 hours on two quiet cores; it can be resumed."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent


@pytest.mark.proof
def test_every_arm_is_trained_from_every_seed() -> None:
    done = subprocess.run([sys.executable, str(HERE / "host_study.py")], cwd=HERE.parents[1], timeout=6 * 3600)
    assert done.returncode == 0
    record = json.loads((HERE.parents[1] / "bench" / "results" / "cpu" / "host-study.json").read_text())
    assert len(record["rows"]) == 20 and {row["seeds"] for row in record["rows"]} == {5}
    assert all(("difference" in row) == (row["arm"] != "plain") for row in record["rows"])
