"""The suite passes on other processors: under other instruction sets, and with another rounding of every velocity.

Writes ``bench/results/cpu/any-processor.json``, case by case.
"""

import json
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from adagrpo.run.folder import describe_machine, processor

ROOT = Path(__file__).resolve().parents[2]
RECORD = ROOT / "bench" / "results" / "cpu" / "any-processor.json"
SEEDS = 20
INSTRUCTIONS = {"ATEN_CPU_CAPABILITY": "default", "MKL_CBWR": "COMPATIBLE"}


def suite(*arguments: str, **environment: str) -> dict:
    """What pytest said of the suite, or of the tests named, in a process of its own: counts, and who failed."""
    paths = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), *sys.path])
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-rfE", *arguments]
    inherited = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"} | environment
    done = subprocess.run(command, cwd=ROOT, env=inherited, capture_output=True, text=True, timeout=3600)
    last = done.stdout.strip().splitlines()[-1] if done.stdout.strip() else done.stderr[-500:]
    counts = {word: int(number) for number, word in re.findall(r"(\d+) (passed|failed|skipped|errors?)", last)}
    failed = re.findall(r"^(?:FAILED|ERROR) (\S+)", done.stdout, re.MULTILINE)
    assert done.returncode in (0, 1) and counts.get("passed"), f"pytest did not run: {last}\n{done.stderr[-2000:]}"
    return counts | {"failed_tests": failed}


def record(case: str, found: dict) -> None:
    whole = json.loads(RECORD.read_text("utf-8")) if RECORD.exists() else {}
    whole[case] = found | {"machine": describe_machine(torch.device("cpu")) | {"processor": processor()}}
    RECORD.parent.mkdir(parents=True, exist_ok=True)
    RECORD.write_text(json.dumps(whole, indent=1) + "\n", "utf-8")


@pytest.mark.proof
@pytest.mark.parametrize("variable", INSTRUCTIONS)
def test_the_suite_passes_under_other_instructions(variable: str, tmp_path: Path) -> None:
    """With a cache of its own: inductor would take code that it made for the processor's own instructions."""
    environment = {variable: INSTRUCTIONS[variable], "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    found = suite("-n", "2", "--dist", "loadfile", **environment)
    record(f"{variable}={INSTRUCTIONS[variable]}", found)
    assert not found["failed_tests"]


@pytest.mark.proof
def test_another_rounding_of_each_velocity_changes_no_verdict(tmp_path: Path) -> None:
    """The whole suite by the first seed, which tells the tests that drive a model; those by all others."""
    driving = tmp_path / "driving.txt"
    found = {0: suite("--other-rounding", "0", "--drives-model", str(driving))}
    again = lambda seed: suite("--other-rounding", str(seed), f"@{driving}")  # noqa: E731
    with ThreadPoolExecutor(2) as two:
        found |= zip(range(1, SEEDS), two.map(again, range(1, SEEDS)), strict=True)
    names = driving.read_text("utf-8").split("\n")
    record("another rounding", {"tests_that_drive_a_model": len(names) - 1, "relative": 1e-6, "seeds": found})
    assert len(names) > 200 and not any(one["failed_tests"] for one in found.values())
