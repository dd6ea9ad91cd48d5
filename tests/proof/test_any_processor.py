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

from adagrpo.run.machine import describe_machine, processor

ROOT = Path(__file__).resolve().parents[2]
RECORD = ROOT / "bench" / "results" / "cpu" / "any-processor.json"
SEEDS = 20
INSTRUCTIONS = {"ATEN_CPU_CAPABILITY": "default", "MKL_CBWR": "COMPATIBLE"}


def suite(*arguments: str, **environment: str) -> str:
    """What pytest printed of the suite, or of the tests named, in a process of its own."""
    paths = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), *sys.path])
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-rfE", *arguments]
    inherited = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"} | environment
    done = subprocess.run(command, cwd=ROOT, env=inherited, capture_output=True, text=True, timeout=4 * 3600)
    assert done.returncode in (0, 1), f"pytest did not run: {done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    return done.stdout


def verdict(printed: str) -> dict:
    """Counts of one run, and who failed."""
    (last,) = re.findall(r"^\d+ \w+.* in [\d.]+s.*$", printed, re.MULTILINE)
    counts = {word: int(number) for number, word in re.findall(r"(\d+) (passed|failed|skipped|errors?)", last)}
    return counts | {"failed_tests": re.findall(r"^(?:FAILED|ERROR) (\S+)", printed, re.MULTILINE)}


def verdicts(printed: str) -> dict[int, dict]:
    """Those of several seeds."""
    _, *parts = re.split(r"^seed (\d+)$", printed.split("no tests ran")[0], flags=re.MULTILINE)
    return {int(seed): verdict(part) for seed, part in zip(parts[::2], parts[1::2], strict=True)}


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
    found = verdict(suite("-n", "2", "--dist", "loadfile", **environment))
    record(f"{variable}={INSTRUCTIONS[variable]}", found)
    assert not found["failed_tests"]


@pytest.mark.proof
def test_another_rounding_of_each_velocity_changes_no_verdict(tmp_path: Path) -> None:
    """The whole suite by the first seed, which tells the tests that drive a model; those by all others."""
    driving = tmp_path / "driving.txt"
    found = {0: verdict(suite("--other-rounding", "0", "--drives-model", str(driving)))}
    shares = [",".join(map(str, range(first, SEEDS, 2))) for first in (1, 2)]
    with ThreadPoolExecutor(2) as two:
        for printed in two.map(lambda seeds: suite("--other-rounding", seeds, f"@{driving}"), shares):
            found |= verdicts(printed)
    names = driving.read_text("utf-8").splitlines()
    record("another rounding", {"tests_that_drive_a_model": len(names), "relative": 1e-6, "seeds": found})
    assert len(names) > 200 and sorted(found) == list(range(SEEDS))
    assert not any(one["failed_tests"] for one in found.values())
