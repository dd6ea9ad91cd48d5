"""Hundreds of specialisations through Triton's launch path; the shape classes of the budget are in `make test`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

LAUNCHES = {
    "sde_step", "philox", "group_log_prob", "group_log_prob_backward", "fused_advantage", "capability_step",
    "quantize_rowwise", "layer_norm_modulate", "gelu_join",
}  # fmt: skip


@pytest.mark.proof
def test_no_specialisation_is_refused() -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    command = [sys.executable, str(Path(__file__).with_name("launch_everything.py"))]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=1500)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    print(f"{found['calls']} calls, {found['compiled']} compiled, {len(found['refused'])} refused")
    assert found["refused"] == [] and set(found["launches"]) == LAUNCHES and found["compiled"] >= 250, found
