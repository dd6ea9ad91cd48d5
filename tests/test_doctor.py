"""What `adagrpo doctor` says of this machine, and whether its self-test notices what is broken."""

import json

import pytest
import torch
from adagrpo_kernels import selftest as kernel_checks

from adagrpo import selftest
from adagrpo.cli import main
from adagrpo.doctor import backends, fidelity_lines
from adagrpo.selftest import Row, self_test

CPU = torch.device("cpu")
REPORT = {
    "recipe": "mine", "levers": {"engine.precision": "fp8"}, "device": "NVIDIA H200", "spearman": 0.991, "same_pick": 0.96,
    "passed": True,
}  # fmt: skip


def lines() -> dict[str, str]:
    found = (line.strip().removeprefix("engine.") for line in backends(CPU))
    return {line[:24].strip(): line[24:].strip() for line in found}


def test_every_backend_has_an_answer_and_a_reason() -> None:
    found = lines()
    assert set(found) == {
        "forward = eager", "forward = compile", "forward = fused", "forward = auto", "precision = bf16", "precision = fp8",
        "attention = native", "attention = cudnn", "attention = flash", "attention = flash3", "fp8_attention = true",
        "cuda_graphs = true", "kernels = triton",
    }  # fmt: skip
    assert found["forward = auto"] == "means eager here"
    assert found["attention = flash3"] == "no: needs a CUDA device"
    assert found["cuda_graphs = true"].startswith("no: needs a CUDA device")


def test_a_machine_without_a_compiler_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda name: None)
    assert lines()["forward = compile"] == "no: torch.compile needs a C compiler: install gcc"


def test_reports_decide_what_is_recommended(tmp_path) -> None:
    assert "adagrpo fidelity RECIPE" in next(fidelity_lines(tmp_path / "nowhere"))
    (tmp_path / "a.json").write_text(json.dumps(REPORT))
    (tmp_path / "b.json").write_text(json.dumps(REPORT | {"passed": False, "same_pick": None, "spearman": 0.9}))
    (tmp_path / "c.json").write_text("{")
    (tmp_path / "d.json").write_text(json.dumps({"recipe": "x"}))
    (tmp_path / "e.json").write_text("[]")
    good, bad, *broken = fidelity_lines(tmp_path)
    assert good.strip() == (
        "engine.precision = fp8, recipe mine on NVIDIA H200: Spearman 0.991, same pick 96%; passed: recommended"
    )
    assert bad.strip().endswith("Spearman 0.900; not passed: not recommended")
    assert [path in line for path, line in zip(("c.json", "d.json", "e.json"), broken, strict=True)] == [True] * 3


def test_the_page_and_its_exit_code(capsys) -> None:
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert f"torch         {torch.__version__}" in out and "Device: CPU" in out and "Self-test" not in out


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Iterations that pass at once."""
    monkeypatch.setattr(selftest, "_iterations", lambda device, engine: (True, engine.forward))


def test_the_self_test_goes_on_after_a_failure(monkeypatch: pytest.MonkeyPatch, capsys, quick) -> None:
    def iterations(device, engine):
        if engine.precision == "fp8":
            raise RuntimeError("planted\nsecond line")
        return engine.forward != "fused", "seconds"

    monkeypatch.setattr(selftest, "_iterations", iterations)
    assert main(["doctor", "--self-test"]) == 1
    out = capsys.readouterr().out
    assert "iteration eager, auto              ok       seconds" in out
    assert "iteration eager, fp8               FAILED   RuntimeError: planted\n" in out
    assert "iteration fused, auto              FAILED   seconds" in out
    assert "kernel sde_step                    skipped  no CUDA device" in out


def test_a_sound_machine_passes(capsys, quick) -> None:
    assert main(["doctor", "--self-test"]) == 0
    assert "FAILED" not in capsys.readouterr().out


def test_the_ratio_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [Row("x", *selftest._iterations(CPU, selftest.EngineConfig(forward="fused", precision="fp8")))]
    assert rows[0].passed and "ratio - 1: 0.0e+00" in rows[0].detail
    monkeypatch.setattr(selftest, "read_metrics", lambda metrics: ({"policy/ratio_deviation": 2e-6}, []))
    assert not selftest._iterations(CPU, selftest.EngineConfig())[0]


def test_backends_that_cannot_run_are_skipped_with_the_reason(quick) -> None:
    rows = {row.name: row for row in self_test(CPU)}
    assert rows["iteration compile, auto"].passed is None and "compilation" in rows["iteration compile, auto"].detail
    assert {name for name in rows if name.startswith("kernel ")} == {f"kernel {name}" for name in kernel_checks.CHECKS}
