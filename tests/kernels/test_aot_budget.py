"""Every kernel and shape class goes through Triton's launch path for sm_90, on a stub driver, within `kernels/budget.json`."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

BUDGET = Path(__file__).resolve().parents[2] / "kernels" / "budget.json"
PACKAGE = BUDGET.parent / "adagrpo_kernels"
KERNELS = {
    "sde_step", "philox", "group_log_prob", "fused_advantage", "capability_step", "quantize_rowwise", "layer_norm_modulate",
    "gelu_join",
}  # fmt: skip
DTYPES = {name: {"bf16", "fp32", "fp16"} for name in KERNELS} | {
    "fused_advantage": {"fp64", "fp32"}, "capability_step": {"fp64", "fp32"},
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


@pytest.fixture(scope="module")
def found() -> dict:
    """What `python -m adagrpo_kernels.aot` found: the one process that launches."""
    done = without_interpreter("-m", "adagrpo_kernels.aot", "--json")
    assert done.stdout, done.stderr
    return json.loads(done.stdout)


def without_interpreter(*arguments: str, path: str = "") -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([path, *sys.path] if path else sys.path)
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=environment, timeout=300)


def test_triton_launches_every_kernel(found: dict) -> None:
    """Every jitted kernel of the package, for every shape class of the budget and every dtype its operator takes."""
    assert found["refused"] == {}
    source = "".join(path.read_text("utf-8") for path in PACKAGE.glob("_triton/*.py"))
    assert found["launched"] == sorted(re.findall(r"^def (\w+_kernel)\(", source, re.M))
    for kernel, shapes in budget()["kernels"].items():
        assert set(found["kernels"][kernel]) == set(shapes)
        default = {"fp64"} if kernel == "capability_step" else set()
        assert default | {name.split()[0].strip(",") for name in shapes} >= DTYPES[kernel], kernel


def test_compiled_kernels_stay_within_the_budget(found: dict) -> None:
    allowed, installed = budget(), metadata.version("triton")
    if installed != allowed["triton"]:
        pytest.skip(f"the budget was measured with triton {allowed['triton']}; installed is {installed}")
    assert not problems(found, allowed)


PROVE = """
import importlib, json, sys
found = {}
for name in sys.argv[1:]:
    aot, cases = (importlib.import_module(f"{name}.{part}") for part in ("aot", "cases"))
    case = next(case for case in cases.cases() if case.kernel == "philox")
    try:
        found[name] = sorted(aot.measure(case))
    except Exception as error:
        found[name] = f"{type(error).__name__}: {error}"
print(json.dumps(found))
"""


def test_arguments_that_triton_keeps_for_itself_are_refused(tmp_path: Path) -> None:
    """The same proof on copies of the package whose philox kernel calls an argument by another name."""
    names = {"stream": "stream option is deprecated", "device": "device option is deprecated"}
    names |= {"device_type": "device_type option is deprecated", "grid": "multiple values", "warmup": "multiple values"}
    names |= {"num_stages": "compile options: num_stages", "num_warps": "multiple values", "renamed": ""}
    for name in names:
        shutil.copytree(PACKAGE, tmp_path / f"with_{name}", ignore=shutil.ignore_patterns("__pycache__"))
        file = tmp_path / f"with_{name}" / "_triton" / "philox.py"
        file.write_text(re.sub(r"\bnoise_stream\b", name, file.read_text("utf-8")), "utf-8")
    done = without_interpreter("-c", PROVE, *(f"with_{name}" for name in names), path=str(tmp_path))
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert "registers" in found.pop("with_renamed")
    for name, answer in found.items():
        assert names[name.removeprefix("with_")] in answer, (name, answer)


def test_stub_refuses_the_interpreter() -> None:
    """With it nothing would be compiled, and every kernel would seem to launch."""
    from adagrpo_kernels import stub

    with pytest.raises(RuntimeError, match="TRITON_INTERPRET=1"), stub.installed():
        pass


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
