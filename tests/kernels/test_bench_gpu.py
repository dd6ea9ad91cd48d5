"""`adagrpo bench gpu` as far as it needs no GPU: arguments, records, flags, time limits, and every row at small shapes."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from adagrpo_kernels.selftest import CHECKS, Finding
from toy import ToyModel, toy_config

from adagrpo.bench import gpu, gpu_forward, timers
from adagrpo.bench.ceilings import attention_part, gemm_part
from adagrpo.bench.findings import Findings
from adagrpo.bench.gpu_kernels import check_kernels, time_kernels
from adagrpo.bench.kernels import CASES, Bench, Sizes
from adagrpo.bench.readme import pages
from adagrpo.bench.records import read_record
from adagrpo.bench.timers import Deadline, quantiles
from adagrpo.cli import main

CPU = torch.device("cpu")
SMALL = Sizes(
    latent=(4, 8), steps=(3,), noise=(2,), groups=((2, 3),), advantages=((2, 1),), slots=(2,), tokens=((2, 5),), text=2,
    width=32, mlp=64, copied=64,
)  # fmt: skip


def once(run) -> list[float]:
    """A timer that runs the call and says 2 ms."""
    run()
    return [2e-3, 1e-3, 4e-3]


def small_bench() -> Bench:
    return Bench(CPU, once, lambda function: function, SMALL)


def findings(folder: Path, seconds: float = 1e9, part: str = "kernels") -> Findings:
    return Findings(part, CPU, folder, Deadline(seconds), ("bench", "gpu"))


def record_of(folder: Path):
    (path,) = folder.rglob("*.json")
    return read_record(path)


@pytest.mark.parametrize("part", [[], ["--part", "kernels"], ["--part", "forward"], ["--part", "iteration"]])
def test_without_a_device_one_message_and_nothing_written(part, tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["bench", "gpu", *part]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "no CUDA device" in err and not any(tmp_path.iterdir())


def test_an_unknown_part_is_refused(capsys) -> None:
    with pytest.raises(SystemExit) as left:
        main(["bench", "gpu", "--part", "kernel"])
    assert left.value.code == 2 and "'kernels', 'forward', 'iteration'" in capsys.readouterr().err


def test_the_kernels_part_imports_light_modules_only() -> None:
    code = (
        "import sys; from adagrpo.bench import ceilings, findings, gpu, gpu_kernels, kernels; "
        "sys.exit(', '.join({'diffusers', 'transformers', 'peft', 'scipy', 'PIL'} & set(sys.modules)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_every_kernel_is_timed_beside_its_references(tmp_path: Path) -> None:
    found = findings(tmp_path)
    for op in CASES:
        time_kernels(found, small_bench(), op)
    assert found.sound and set(found.rows) == {"copy", *CASES}
    for op in CASES:
        for row in found.rows[op]:
            assert row["us"] == [2000.0, 1000.0, 4000.0] and row["GB/s"] == round(row["bytes"] / 2e-3 / 1e9, 1)
            assert all(row[key] == 1.0 for key in row if key.startswith("x_"))
            assert row.get("max_error", 0.0) < 0.05
    compared = {op: {key for row in rows for key in row if key.startswith("x_")} for op, rows in found.rows.items()}
    assert all("x_eager" in keys for op, keys in compared.items() if op != "copy")
    record = record_of(tmp_path)
    assert record.case == "gpu-kernels" and len(record.series) == sum(len(found.rows[op]) for op in CASES)


def test_a_failing_check_flags_its_figures_and_stops_nothing(tmp_path: Path, monkeypatch) -> None:
    def crash(device: torch.device) -> Finding:
        raise RuntimeError("no such kernel\nsecond line")

    monkeypatch.setitem(CHECKS, "philox_normal", lambda device: Finding(0.5, 0.0))
    monkeypatch.setitem(CHECKS, "fused_advantage", crash)
    found = findings(tmp_path)
    check_kernels(found, ["philox_normal", "fused_advantage", "capability_step"])
    for op in ("philox", "fused_advantage", "capability_step"):
        time_kernels(found, small_bench(), op)
    wrong = {"philox_normal": "error 5.0e-01, bound 0.0e+00", "fused_advantage": "RuntimeError: no such kernel"}
    assert found.checks == wrong | {"capability_step": ""}
    assert all("philox_normal: error" in row["flag"] for row in found.rows["philox"])
    assert all("no such kernel" in row["flag"] for row in found.rows["fused_advantage"])
    assert found.rows["capability_step"] and not any("flag" in row for row in found.rows["capability_step"])
    assert not found.sound and {name.split(",")[0] for name in found.series()} == {"capability_step"}
    record = record_of(tmp_path)
    assert record.facts["rows"] == json.loads(json.dumps(found.rows)) and set(record.series) == set(found.series())


def test_a_row_that_cannot_be_measured_is_written_down(tmp_path: Path) -> None:
    def out_of_memory(run) -> list[float]:
        raise torch.OutOfMemoryError("no memory left")

    found = findings(tmp_path)
    time_kernels(found, dataclasses.replace(small_bench(), seconds=out_of_memory), "sde_step")
    assert len(found.rows["sde_step"]) == 4
    assert all(row["failed"] == "OutOfMemoryError: no memory left" for row in found.rows["sde_step"])
    found.row("other", {"case": "endless"}, lambda: {"us": [math.inf]})
    assert found.rows["other"][0]["flag"] == "not finite" and not found.series()
    found.section("broken", lambda: 1 / 0)
    assert found.not_measured == ["broken: ZeroDivisionError: division by zero"] and not found.sound


def test_after_the_deadline_nothing_is_begun_and_that_is_said(tmp_path: Path) -> None:
    now = [0.0]
    found = dataclasses.replace(findings(tmp_path), deadline=Deadline(10, lambda: now[0]))
    time_kernels(found, small_bench(), "capability_step")
    before, now[0] = len(found.rows["capability_step"]), 11.0
    time_kernels(found, dataclasses.replace(small_bench(), seconds=lambda run: pytest.fail("begun")), "fused_advantage")
    assert before and "fused_advantage" not in found.rows
    assert found.not_measured == ["fused_advantage, mass, with statistics, 2x1x4x12, fp64"]
    assert found.check("late", lambda: "") == "not checked: no time left" and not found.sound


def test_products_and_attention_beside_their_checks(tmp_path: Path) -> None:
    """Elsewhere than on CUDA there is no cuDNN: its check and its rows say so, the others are measured."""
    found = findings(tmp_path)
    gemm_part(found, small_bench(), (2,), {"image": (16, ((32, 48),))})
    attention_part(found, small_bench(), ((1, 16),), heads=2)
    assert [row["shape"] for row in found.rows["products"]] == ["32x32x48"] * 3
    assert {row["dtype"] for row in found.rows["products"]} == {"bf16", "fp8 rowwise", "fp8 tensorwise"}
    assert not any("flag" in row or "failed" in row for row in found.rows["products"])
    assert found.rows["products"][0]["TFLOP/s"] == round(2 * 32 * 32 * 48 / 2e-3 / 1e12, 2)
    cudnn, flash = found.rows["attention"]
    assert found.checks["attention, cudnn"] and "failed" in cudnn and cudnn["flag"]
    assert not found.checks["attention, flash"] and "failed" not in flash and flash["shape"] == "1x2x16x128"


def test_products_of_another_matrix_are_caught(tmp_path: Path, monkeypatch) -> None:
    from adagrpo.bench import ceilings

    monkeypatch.setattr(ceilings, "_scaled", lambda a, b: a.values.float() @ b.values.float().t())
    found = findings(tmp_path)
    gemm_part(found, small_bench(), (1,), {"text": (16, ((32, 16),))})
    assert [bool(row.get("flag")) for row in found.rows["products"]] == [False, True, True]


def test_forwards_are_checked_against_eager(tmp_path: Path) -> None:
    """Every variant of a small transformer at two numbers of rows; one that computes something else is flagged."""
    architecture = {**gpu_forward.SMALL, "num_layers": 1, "num_single_layers": 1, "attention_head_dim": 16,
                    "num_attention_heads": 2, "joint_attention_dim": 32, "pooled_projection_dim": 16,
                    "axes_dims_rope": (4, 6, 6)}  # fmt: skip

    def build(model, table, forward, precision):
        return gpu_forward.build_forward(model, table, "fused" if forward == "fused" else "eager", precision) or Doubled(
            model, table
        )

    class Doubled(gpu_forward.PolicyForward):
        def velocity(self, *inputs):
            return 2 * super().velocity(*inputs)

    found = findings(tmp_path, part="forward")
    gpu_forward.time_forwards(found, architecture, once, once, rows=(2, 1), build=build)
    rows = {(row["case"], row["shape"]): row for row in found.rows["forward"]}
    assert len(rows) == 10 and all(row["ms"] == [2.0, 1.0, 4.0] for row in rows.values())
    for variant in gpu_forward.VARIANTS:
        flagged = [bool(rows[variant, f"{n} rows, 1+1 blocks"].get("flag")) for n in (1, 2)]
        assert flagged == [variant == "compile"] * 2, (variant, found.checks)
    assert rows["fused", "2 rows, 1+1 blocks"]["x_eager"] == 1.0
    assert [row["case"] for row in found.rows["forward, from a graph"]] == list(gpu_forward.VARIANTS)


def test_two_iterations_by_phase(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(gpu_forward, "RECIPES", {"as the recipe": {}})
    config = toy_config(train={"slots": 1, "iterations": 4}, data={"prompts": "tiny:wide", "held_out": "tiny:held_out"})
    found = findings(tmp_path, part="iteration")
    gpu_forward.time_iterations(found, config, ToyModel)
    (row,) = found.rows["iteration"]
    assert found.sound, (found.checks, row)
    assert len(row["seconds"]) == 2 and set(row["phases"]) == set(gpu_forward.PHASES)
    # 3 probes of 6 steps, 2 velocities to fork with, groups of 4 from steps 0 and 2 to the end, 2 forwards of the update.
    assert row["evaluations"] == 3 * 6 + 2 + 4 * (5 + 3) + 2
    monkeypatch.setattr(gpu_forward, "RATIO_BOUND", -1.0)
    gpu_forward.time_iterations(found, config, ToyModel)
    assert "ratio deviates" in found.rows["iteration"][1]["flag"] and not found.sound
    assert "tiny:wide" in record_of(tmp_path).recipe


def test_parts_run_apart_and_one_that_hangs_is_ended(tmp_path: Path, monkeypatch, capsys) -> None:
    calls = []

    def run(command, timeout):
        calls.append((command[command.index("--part") + 1], timeout))
        if len(calls) == 1:
            raise subprocess.TimeoutExpired(command, timeout)
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu.subprocess, "run", run)
    assert gpu.gpu_command(None, tmp_path, "", ()) == gpu.FLAGGED
    assert calls == [(part, gpu.HARD) for part in ("kernels", "forward", "iteration")] and gpu.HARD <= 480
    assert "kernels: ended after 480 s" in capsys.readouterr().out


def test_records_are_shown_on_the_page_with_their_flags(tmp_path: Path) -> None:
    found = findings(tmp_path / "results")
    found.check("philox_normal", lambda: "off by one")
    found.row("philox", {"case": "noise", "shape": "2x32", "dtype": "bf16"}, lambda: {"us": [3.0, 2.0, 4.0]}, "off by one")
    found.row("products", {"case": "image", "shape": "1x2x3", "dtype": "bf16"}, lambda: {"us": [5.0, 5.0, 5.0], "TFLOP/s": 7.0})
    found.section("attention", lambda: 1 / 0)
    text = pages(tmp_path / "results")[tmp_path / "README.md"]
    assert "| philox | noise | 2x32 | bf16 | 3.00 µs |" in text and "| off by one |" in text
    assert "| products | image | 1x2x3 | bf16 | 5.00 µs | 7.0 |" in text
    assert "attention: ZeroDivisionError" in text and "not measured" in text


def test_quantiles_are_the_median_then_the_fifths() -> None:
    assert quantiles([5.0, 1.0, 3.0, 2.0, 4.0, 6.0]) == pytest.approx([3.5, 2.0, 5.0])


class Device:
    """A clock that only the device's work moves: overwriting the L2 takes 30 us and a little, calls what they say."""

    def __init__(self, monkeypatch) -> None:
        self.now, self.captured = 0.0, []
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(L2_cache_size=1))
        monkeypatch.setattr(timers, "warm_up", lambda run, device: [run() for _ in range(3)])
        monkeypatch.setattr(timers, "capture", self.capture)
        monkeypatch.setattr(timers, "events", self.events)
        self.timer = timers.GraphTimer(CPU)
        self.timer.cold = SimpleNamespace(zero_=lambda: self.work(30e-6 + 1e-9 * (len(self.captured) % 2)))

    def work(self, seconds: float) -> None:
        self.now += seconds

    def events(self, run) -> float:
        before = self.now
        run()
        return self.now - before

    def capture(self, run, number: int):
        self.captured.append(number)
        return SimpleNamespace(replay=lambda: [run() for _ in range(number)])


@pytest.mark.parametrize(("seconds", "number"), [(7e-6, 50), (1.5e-3, 13), (0.3, 1)])
def test_the_graph_timer_leaves_overwriting_out(seconds: float, number: int, monkeypatch) -> None:
    device = Device(monkeypatch)
    assert device.timer(lambda: device.work(seconds)) == pytest.approx([seconds] * 3, rel=1e-3)
    device.timer(lambda: device.work(seconds))
    assert device.captured == [number] * 3  # the graph that overwrites alone is kept


def test_a_call_that_cannot_be_told_from_overwriting_has_no_time(monkeypatch) -> None:
    device = Device(monkeypatch)
    with pytest.raises(RuntimeError, match="shorter than"):
        device.timer(lambda: device.work(0.0))


STUBBED = """
import sys
from pathlib import Path
import torch
from adagrpo_kernels import stub
sys.path.insert(0, sys.argv[2])
from test_bench_gpu import findings, small_bench
from adagrpo.bench.gpu_kernels import check_kernels, time_kernels
found = findings(Path(sys.argv[1]))
with stub.installed() as driver:
    check_kernels(found, ["sde_step", "quantize_rowwise"])
    for op in ("sde_step", "quantize_rowwise"):
        time_kernels(found, small_bench(), op)
print(len(driver.launches))
"""


def test_on_the_stub_driver_everything_launches_and_every_figure_is_flagged(tmp_path: Path) -> None:
    """Real launches that write nothing: the checks see it, and the record holds all rows all the same."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    command = [sys.executable, "-c", STUBBED, str(tmp_path), str(Path(__file__).parent)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    record = record_of(tmp_path)
    assert all(record.facts["checks"].values()) and not record.series and int(done.stdout.split()[-1]) >= 10
    for op in ("sde_step", "quantize_rowwise"):
        assert record.facts["rows"][op] and all(row["flag"] and "failed" not in row for row in record.facts["rows"][op])
