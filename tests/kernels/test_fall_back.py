"""`auto` where Triton cannot run: said once, then the reference; an explicit `triton` is an error; nothing else is hidden.

The failures themselves are Triton's own, met in `falling_back.py` on its launch path; a run through them is met here.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from adagrpo_kernels import KernelError, _dispatch, reset_counts, telling
from toy import toy_config, toy_trainer

from adagrpo import cli
from adagrpo.recipe.keys import EngineConfig
from adagrpo.run.fit import Fit
from adagrpo.run.folder import RunFolder

NO_IMAGE, BAD_LAUNCH = "no kernel image is available", "invalid argument"


@pytest.fixture(scope="module")
def met() -> dict[str, dict]:
    """Scenario by scenario: result, notice, warnings, what an explicit `triton` says."""
    environment = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", _dispatch.VARIABLE)}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    command = [sys.executable, str(Path(__file__).with_name("falling_back.py"))]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_sound_launches_are_kernels(met: dict) -> None:
    found = met["sound"]
    assert found["first"] == found["explicit"] == "not written" and found["launches"] == 2
    assert found["fallback"] is None and found["warnings"] == [] and found["ran"] == {"philox_normal": "triton"}


@pytest.mark.parametrize(
    ("scenario", "reason"),
    [
        ("no driver", "0 active drivers"),
        ("no compiler", "Failed to find C compiler"),
        ("compiler fails", "ended with exit code 1"),
        ("load", NO_IMAGE),
        ("launch", BAD_LAUNCH),
    ],
)
def test_auto_says_why_once_and_takes_the_reference(met: dict, scenario: str, reason: str) -> None:
    found = met[scenario]
    assert found["first"] == "reference" and reason in found["fallback"]
    assert found["warnings"] == [found["fallback"]]
    assert set(found["ran"].values()) == {"reference"}
    assert found["explicit"].startswith("KernelError") and reason in found["explicit"]


def test_every_operator_falls_back_and_the_reason_is_told(met: dict) -> None:
    found = met["no driver"]
    assert found["next op"] and found["ran"] == {"philox_normal": "reference", "sde_step": "reference"}
    assert "0 active drivers" in found["problem"]


def test_a_failed_launch_is_not_counted(met: dict) -> None:
    assert met["load"]["counts"] == met["launch"]["counts"] == {} and met["sound"]["counts"] == {"philox": 1}


@pytest.mark.parametrize(
    ("scenario", "answer", "error"),
    [
        ("memory", "first", "OutOfMemoryError"),
        ("memory once", "first", "OutOfMemoryError"),
        ("sticky", "first", "RuntimeError: Triton Error [CUDA]: an illegal memory access"),
        ("capture", "first", "RuntimeError: operation not permitted when stream is capturing"),
        ("later launch", "second", f"RuntimeError: Triton Error [CUDA]: {BAD_LAUNCH}"),
    ],
)
def test_other_failures_are_not_swallowed(met: dict, scenario: str, answer: str, error: str) -> None:
    """Memory that ran out, a device that is broken already, a capture, a kernel that ran before."""
    found = met[scenario]
    assert found[answer].startswith(error) and found["fallback"] is None and found["warnings"] == []
    assert found.get("explicit", error).startswith(error)


def test_a_load_without_memory_can_be_tried_again(met: dict) -> None:
    """Triton keeps the kernel that it could not load; it must not launch it without code."""
    assert met["memory once"]["second"] == "not written" and met["memory once"]["loaded"] == [True]


def test_a_backward_that_cannot_launch_takes_the_reference(met: dict) -> None:
    """Gradient of float32 inputs against float64: the sums of 64 elements and 5 members."""
    found = met["backward"]
    assert found["error"] < 64 * 2.0**-24 and found["dtype"] == "torch.float32"
    assert NO_IMAGE in found["fallback"] and found["ran"] == {"group_log_prob": "reference+triton"}


def test_arguments_that_a_kernel_does_not_take_are_no_failure(met: dict) -> None:
    assert met["other arguments"]["first"] == "not written" and met["other arguments"]["fallback"] is None


class Unlaunchable:
    """A jitted function whose every launch fails before the device runs it."""

    def __getitem__(self, grid):
        def fail(**arguments):
            raise RuntimeError(f"Triton Error [CUDA]: {NO_IMAGE}")

        return fail


@pytest.fixture
def unlaunchable(monkeypatch: pytest.MonkeyPatch):
    """The interpreter stands for a GPU; the step's kernel cannot be launched."""
    from adagrpo_kernels._triton import sde_step

    monkeypatch.delenv(_dispatch.VARIABLE, raising=False)
    monkeypatch.setattr(_dispatch, "launchable", {"cuda", "cpu"})
    monkeypatch.setattr(sde_step, "sde_step_kernel", Unlaunchable())
    _dispatch.reset_fallback()
    reset_counts()
    yield
    _dispatch.reset_fallback()
    reset_counts()


def fitted(folder: Path, kernels: str) -> Fit:
    config = toy_config(train={"iterations": 2, "slots": 1}, evaluation={"every": 1, "prompts": 2, "final_prompts": 0})
    trainer = toy_trainer(dataclasses.replace(config, engine=EngineConfig(kernels=kernels)))
    run = RunFolder.fresh(folder)
    run.write_start(trainer.config, trainer.model.device, {})
    return Fit(trainer.config, trainer, run, ["a", "b"], say=lambda line: None)


def lines(folder: Path, name: str) -> list[dict]:
    return [json.loads(line) for line in (folder / name).read_text("utf-8").splitlines()]


def test_a_run_says_so_once_and_equals_the_references(unlaunchable, tmp_path: Path) -> None:
    """Named in its events, recorded in its manifest, and bit for bit the run on the references."""
    assert fitted(tmp_path / "auto", "auto")().exit_code == 0
    told = [e for e in lines(tmp_path / "auto", "events.jsonl") if "kernels are off" in e["message"]]
    assert (
        len(told) == 1 and told[0]["kind"] == "warning" and NO_IMAGE in told[0]["message"] and "sde_step" in told[0]["message"]
    )
    ran = json.loads((tmp_path / "auto" / "manifest.json").read_text("utf-8"))["kernels"]
    assert ran["sde_step"] == ran["fused_advantage"] == ran["capability_step"] == ran["group_log_prob"] == "reference"
    assert fitted(tmp_path / "reference", "reference")().exit_code == 0
    metrics = [
        [{k: v for k, v in line.items() if not k.startswith("perf/")} for line in lines(tmp_path / name, "metrics.jsonl")]
        for name in ("auto", "reference")
    ]
    assert metrics[0] == metrics[1] and len(metrics[0]) == 2


def test_who_listens_later_hears_it_too(unlaunchable) -> None:
    heard: list[str] = []
    with pytest.warns(RuntimeWarning, match="kernels are off"):
        _dispatch.attempt("step", True, lambda: raise_kernel_error(), lambda: None)
    with telling(heard.append):
        _dispatch.attempt("step", True, lambda: raise_kernel_error(), lambda: None)
    assert len(heard) == 1 and "cannot" in heard[0]


def raise_kernel_error() -> None:
    raise KernelError("it cannot")


def test_explicit_triton_ends_the_run_with_one_line(unlaunchable, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(cli, "_dispatch", lambda argv: fitted(tmp_path / "run", "triton")().exit_code)
    assert cli.main([]) == cli.EXIT_FAILED
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1 and NO_IMAGE in said[0] and "engine.kernels = auto" in said[0]


def test_explicit_triton_without_a_driver_is_refused_before_any_work(unlaunchable, monkeypatch) -> None:
    from adagrpo.build import check_engine
    from adagrpo.doctor.command import automatic, backends
    from adagrpo.errors import InputError

    monkeypatch.setattr(_dispatch, "driver_problem", lambda: "no driver was found")
    config = toy_config(model={"device": "cpu"})
    with pytest.raises(InputError, match=r"engine\.kernels = triton: no driver was found; or use auto or reference"):
        check_engine(dataclasses.replace(config, engine=EngineConfig(kernels="triton")))
    assert [p for key, _, p in backends(torch.device("cpu")) if key == "kernels"] == ["no driver was found"]
    assert dict(automatic(torch.device("cuda")))["kernels"] == "reference, because no driver was found"
