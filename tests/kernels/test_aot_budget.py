"""Every kernel and shape class, compiled for sm_90 without a GPU, stays within `kernels/budget.json`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

BUDGET = Path(__file__).resolve().parents[2] / "kernels" / "budget.json"
KERNELS = {
    "sde_step", "philox", "group_log_prob", "fused_advantage", "capability_step", "quantize_rowwise", "layer_norm_modulate",
    "gelu_join",
}  # fmt: skip
AT_MOST, AT_LEAST = ("registers", "shared", "stack", "local", "fma"), ("load_bits", "store_bits")


def budget() -> dict:
    return json.loads(BUDGET.read_text("utf-8"))


def problems(found: dict, allowed: dict) -> list[str]:
    """What is out of budget, with both numbers."""
    out = []
    for kernel in sorted(set(found["kernels"]) | set(allowed["kernels"])):
        measured, limits = found["kernels"].get(kernel, {}), allowed["kernels"].get(kernel, {})
        for shape in sorted(set(measured) | set(limits)):
            if shape not in measured or shape not in limits:
                out.append(f"{kernel}, {shape}: {'not in the budget' if shape in measured else 'no longer compiled'}")
                continue
            row, limit = measured[shape], limits[shape]
            out += [f"{kernel}, {shape}: {n} {row[n]}, budget {limit[n]}" for n in AT_MOST if row[n] > limit[n]]
            out += [f"{kernel}, {shape}: {n} {row[n]}, budget at least {limit[n]}" for n in AT_LEAST if row[n] < limit[n]]
    return out


def test_budget_allows_no_stack_and_wide_loads() -> None:
    """The promises of the file itself: nothing spills, nothing is contracted, long rows move 16 bytes at a time."""
    allowed = budget()
    assert set(allowed["kernels"]) == KERNELS and allowed["target"] == "sm_90"
    for kernel, shapes in allowed["kernels"].items():
        for shape, row in shapes.items():
            assert row["stack"] == row["local"] == 0, (kernel, shape)
            if kernel not in ("fused_advantage", "capability_step"):
                assert row["fma"] == 0, (kernel, shape)
            if "long rows" in shape:
                assert max(row["load_bits"], row["store_bits"]) == 128, (kernel, shape)
                if kernel != "philox":
                    assert row["load_bits"] == 128, (kernel, shape)


def test_compiled_kernels_stay_within_the_budget() -> None:
    allowed, installed = budget(), metadata.version("triton")
    if installed != allowed["triton"]:
        pytest.skip(f"the budget was measured with triton {allowed['triton']}; installed is {installed}")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    command = [sys.executable, "-m", "adagrpo_kernels.aot", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    assert not problems(json.loads(done.stdout), allowed)


def test_beyond_the_budget_names_both_numbers() -> None:
    allowed, found = budget(), budget()
    row = found["kernels"]["philox"]["fp32, long rows"]
    limit = allowed["kernels"]["philox"]["fp32, long rows"]["registers"]
    row["registers"], row["stack"], row["store_bits"] = limit + 9, 8, 32
    del found["kernels"]["capability_step"]["closest, one reward"]
    assert problems(found, allowed) == [
        "capability_step, closest, one reward: no longer compiled",
        f"philox, fp32, long rows: registers {limit + 9}, budget {limit}",
        "philox, fp32, long rows: stack 8, budget 0",
        "philox, fp32, long rows: store_bits 32, budget at least 128",
    ]
