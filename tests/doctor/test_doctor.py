"""`adagrpo doctor`: reasons per backend, fidelity reports, and a self-test that fails when something is wrong."""

import importlib.util
import json
import os
import shutil
from pathlib import Path

import adagrpo_kernels.selftest
import pytest
import torch

from adagrpo.cli import main
from adagrpo.doctor import command as doctor
from adagrpo.doctor import selftest
from adagrpo.engine.executor import RolloutExecutor
from adagrpo.models.fused_flux import FusedFluxForward

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch) -> Path:
    """An empty current folder on a machine without CUDA, and one timed iteration for three."""
    monkeypatch.setattr(selftest, "TIMED", 1)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    return tmp_path


def run(capsys, *args: str) -> tuple[int, str]:
    code = main(("doctor", *args))
    captured = capsys.readouterr()
    assert "Traceback" not in captured.out + captured.err
    return code, captured.out


def reasons(device: torch.device) -> dict[str, str | None]:
    return {f"{key} = {value}": problem for key, value, problem in doctor.backends(device)}


def rows(**keywords) -> dict[str, selftest.Row]:
    return {row.name: row for row in selftest.self_test(CPU, **keywords)}


def test_doctor_names_torch_and_device_and_proves_nothing_unasked(capsys, here: Path) -> None:
    code, out = run(capsys)
    assert code == 0 and "torch" in out and "Device: CPU" in out and "Advice:" in out and "Self-test" not in out
    assert "engine.attention     = flash    no: needs a CUDA device" in out
    assert "engine.forward       = fused    yes" in out
    assert "engine.forward       eager" in out and "engine.kernels       reference" in out
    assert "FP8 is not recommended" in out and "adagrpo fidelity RECIPE --engine.precision fp8" in out
    assert not list(here.iterdir())


def test_reasons_on_a_cpu(monkeypatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    found = reasons(CPU)
    able = {"forward = eager", "forward = fused", "precision = bf16", "precision = fp8", "attention = native"}
    assert all(found[name] is None for name in able)
    for name in ("attention = cudnn", "attention = flash", "attention = flash3", "cuda_graphs = true"):
        assert "needs a CUDA device" in (found[name] or "")
    assert "passes of their own" in (found["fp8_attention = true"] or "")
    assert "with engine.forward = fused" in (found["fp8_scaling = tensorwise"] or "")
    assert "CPU" in (found["kernels = triton"] or "") or "not installed" in (found["kernels = triton"] or "")
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert "install gcc" in (reasons(CPU)["forward = compile"] or "")


def test_reasons_on_an_ampere_card_without_packages(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    found = reasons(CUDA)
    for name, words in {
        "forward = compile": "pip install 'adagrpo[cuda]'",
        "precision = fp8": "8.9",
        "attention = flash": "pip install 'adagrpo[flash]'",
        "attention = flash3": "needs Hopper",
        "fp8_attention = true": "cost more than FP8 attention saves",
        "kernels = triton": "not installed",
    }.items():
        assert words in (found[name] or ""), name
    assert found["forward = fused"] is found["attention = cudnn"] is found["cuda_graphs = true"] is None
    assert dict(doctor.automatic(CUDA))["forward"] == "eager"
    assert any("cannot run here" in line for line in doctor.fidelity(Path("none"), CUDA))


def test_auto_follows_the_environment(monkeypatch) -> None:
    monkeypatch.setenv("ADAGRPO_IMPL", "reference")
    assert dict(doctor.automatic(CPU))["kernels"] == "reference (ADAGRPO_IMPL)"


def write(folder: Path, name: str, **changes) -> None:
    report = {"recipe": "tiny", "levers": {"engine.precision": "fp8"}, "device": "cpu"}
    report |= {"spearman": 0.9912, "same_pick": 0.975, "passed": True}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(json.dumps(report | changes), "utf-8")


def test_fidelity_reports(here: Path, capsys) -> None:
    folder = here / "runs" / "fidelity"
    write(folder, "a.json", recipe="flux1-dev", passed=False, spearman=0.5, same_pick=float("nan"))
    write(folder, "b.json", levers={"rollout.tail_steps": 4})
    (folder / "c.json").write_bytes(b"\xff{")
    (folder / "d.json").write_text("[1]", "utf-8")
    os.mkfifo(folder / "pipe.json")
    (folder / "e.json").write_text('{"recipe": "tiny"}', "utf-8")
    code, out = run(capsys)
    lines = dict(line.strip().removeprefix("runs/fidelity/").split(": ", 1) for line in out.splitlines() if "fidelity/" in line)
    assert code == 0
    assert lines["a.json"] == (
        "engine.precision = fp8; recipe flux1-dev, cpu: Spearman 0.500, same pick not measured: NOT passed"
    )
    assert lines["b.json"] == "rollout.tail_steps = 4; recipe tiny, cpu: Spearman 0.991, same pick 0.975: passed"
    assert "not readable JSON" in lines["c.json"]
    assert "not readable JSON (report: a pipe" in lines["pipe.json"]
    assert "not a fidelity report" in lines["d.json"] and "levers" in lines["e.json"]
    assert "FP8 is not recommended" in out  # what passed was another lever
    write(folder, "f.json")
    assert "FP8 is recommended for tiny" in run(capsys)[1]


def test_passed_must_be_true(here: Path) -> None:
    write(here, "a.json", passed="no")
    assert any("NOT passed" in line for line in doctor.fidelity(here, CPU))


def test_self_test_passes_here_and_writes_nothing(capsys, here: Path) -> None:
    code, out = run(capsys, "--self-test")
    assert code == 0, out
    assert out.count("skipped: no CUDA device") == len(adagrpo_kernels.selftest.CHECKS)
    assert out.count("ratio deviates by 0.0e+00") == 4 and "compile, precision fp8     skipped" in out
    assert not list(here.iterdir())


def test_a_check_that_raises_is_a_failed_row_and_the_others_run(capsys, monkeypatch) -> None:
    def refuse(self, *args):
        raise RuntimeError("planted\nsecond line")

    monkeypatch.setattr(FusedFluxForward, "velocity", refuse)
    monkeypatch.setattr(selftest, "PRECISIONS", ("auto",))
    monkeypatch.setattr(selftest, "FORWARDS", ("fused", "eager"))
    code, out = run(capsys, "--self-test")
    assert code == 1 and "second line" not in out
    assert "fused, precision auto      FAIL     RuntimeError: planted" in out
    assert "eager, precision auto      pass" in out and "1 pass, 1 FAIL" in out


def planted(monkeypatch, forward: str) -> selftest.Row:
    """The row of one forward in the model's precision."""
    monkeypatch.setattr(selftest, "PRECISIONS", ("auto",))
    monkeypatch.setattr(selftest, "FORWARDS", (forward,))
    return rows()[f"{forward}, precision auto"]


def test_a_ratio_that_is_not_one_fails(monkeypatch) -> None:
    fork = RolloutExecutor.fork
    off = lambda self, *args, **keywords: (t := fork(self, *args, **keywords)).with_logp(t.logp + 1e-5)  # noqa: E731
    monkeypatch.setattr(RolloutExecutor, "fork", off)
    row = planted(monkeypatch, "eager")
    assert row.outcome == selftest.FAILED and "ratio deviates by 1" in row.detail


def test_a_velocity_that_is_off_fails(monkeypatch) -> None:
    """It leaves the ratio at 1, which is the policy's alone."""
    velocity = FusedFluxForward.velocity
    monkeypatch.setattr(FusedFluxForward, "velocity", lambda self, *args: 1.01 * velocity(self, *args))
    row = planted(monkeypatch, "fused")
    assert row.outcome == selftest.FAILED and row.detail.startswith("velocity is off by 1.0e-02")


def test_samples_that_are_not_finite_fail(monkeypatch) -> None:
    velocity = FusedFluxForward.velocity
    monkeypatch.setattr(FusedFluxForward, "velocity", lambda self, *args: torch.nan * velocity(self, *args))
    row = planted(monkeypatch, "fused")
    assert row.outcome == selftest.FAILED and "100% of the samples are not finite" in row.detail


def test_no_forward_is_begun_late(monkeypatch) -> None:
    monkeypatch.setattr(selftest, "SECONDS", -1.0)
    forwards = [row for name, row in rows().items() if "precision" in name]
    assert len(forwards) == 6 and all(row.outcome == selftest.SKIPPED and "no time left" in row.detail for row in forwards)


def test_on_cuda_the_self_test_runs_unless_refused(capsys, monkeypatch) -> None:
    asked = []

    def failing(device: torch.device, everything: bool):
        asked.append((device.type, everything))
        yield selftest.Row("sde_step", selftest.FAILED, "planted")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(doctor, "report", lambda device: "")
    monkeypatch.setattr(selftest, "self_test", failing)
    assert run(capsys)[0] == 1 and run(capsys, "--no-self-test")[0] == 0 and run(capsys, "--all")[0] == 1
    assert asked == [("cuda", False), ("cuda", True)]
