"""Which implementation runs: by argument, by environment, by device; what is recorded; what is refused."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from adagrpo_kernels import _dispatch as dispatch
from adagrpo_kernels import (
    capability_step,
    fused_advantage,
    group_log_prob,
    implementations,
    launch_counts,
    multi_reward_advantage,
    philox_normal,
    reset_counts,
    sde_step,
)
from triton_cases import TABLE, step_inputs

ROWS = torch.arange(2)


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(dispatch.VARIABLE, raising=False)
    reset_counts()


def noise(impl: str | None = None) -> torch.Tensor:
    return philox_normal(0, ROWS, 4, 0, 0, impl=impl)


def test_auto_on_a_cpu_is_the_reference() -> None:
    noise()
    noise("auto")
    assert implementations() == {"philox_normal": "reference"} and launch_counts() == {}


def test_explicit_triton_is_launched_and_counted() -> None:
    noise("triton")
    noise("reference")
    assert implementations() == {"philox_normal": "reference+triton"} and launch_counts() == {"philox": 1}


def test_environment_is_the_default_and_an_argument_overrides_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(dispatch.VARIABLE, "triton")
    noise()
    assert implementations() == {"philox_normal": "triton"}
    reset_counts()
    noise("reference")
    assert implementations() == {"philox_normal": "reference"}
    monkeypatch.setenv(dispatch.VARIABLE, "fast")
    with pytest.raises(ValueError, match="auto, triton, reference"):
        noise()


def test_explicit_triton_that_cannot_run_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    wide = torch.zeros(1, 2, 3, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="float64"):
        sde_step(wide, wide, TABLE, torch.zeros(1, dtype=torch.int64), impl="triton")
    with pytest.raises(RuntimeError, match="float64"):
        group_log_prob(wide, wide, wide.unsqueeze(1), TABLE, torch.zeros(1, dtype=torch.int64), "triton")
    with pytest.raises(RuntimeError, match="float16"):
        fused_advantage(torch.zeros(1, 4, dtype=torch.float16), 0.0, 1.0, impl="triton")
    with pytest.raises(RuntimeError, match=r"cpu, meta"):
        sde_step(wide.float(), wide.to("meta"), TABLE, torch.zeros(1, dtype=torch.int64), impl="triton")
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET=1"):
        noise("triton")


def test_a_kernels_exception_is_not_swallowed(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_args, **_keywords):
        raise MemoryError("planted")

    from adagrpo_kernels._triton import philox

    monkeypatch.setattr(philox, "launch", broken)
    with pytest.raises(MemoryError, match="planted"):
        noise("triton")
    assert implementations() == {}


def test_meta_tensors_are_planned_without_a_launch() -> None:
    """Shapes and dtypes as the reference's, every launcher free of host round trips, launches counted."""
    arguments, keywords = step_inputs(3, (7, 9), torch.bfloat16, "drawn", True, "meta")
    step = sde_step(*arguments, **keywords, impl="triton")
    assert step.next.shape == (3, 7, 9) and step.next.dtype is torch.bfloat16 and step.logp.shape == (3,)
    x, index = torch.empty(2, 7, 9, device="meta"), torch.empty(2, dtype=torch.int64, device="meta")
    v = torch.empty(2, 7, 9, device="meta", requires_grad=True)
    logp = group_log_prob(x, v, torch.empty(2, 5, 7, 9, device="meta"), TABLE.to("meta"), index, "triton")
    logp.sum().backward()
    assert logp.shape == (2, 5) and v.grad is not None and v.grad.shape == v.shape
    state = [torch.empty(2, dtype=d, device="meta") for d in (torch.float64, torch.float64, torch.int64)]
    weights = torch.empty(2, device="meta")
    scores = torch.empty(2, 3, 5, dtype=torch.float64, device="meta")
    assert capability_step(scores, *state, 0.8, "closest", weights, impl="triton").picks.shape == (3,)
    assert multi_reward_advantage(scores, *state, weights, impl="triton").statistics.shape == (2, 8)
    philox_normal(1, torch.empty(3, dtype=torch.int64, device="meta"), 9, 4, 0, 2, impl="triton")
    assert launch_counts() == {
        "sde_step": 1, "group_log_prob": 1, "group_log_prob_backward": 1, "capability_step": 1, "fused_advantage": 1,
        "philox": 1,
    }  # fmt: skip


def test_triton_is_imported_only_when_a_kernel_runs() -> None:
    code = (
        "import sys, torch, adagrpo_kernels as k; k.philox_normal(0, torch.arange(2), 4, 0, 0); "
        "sys.exit('triton was imported' if 'triton' in sys.modules else 0)"
    )
    path = os.pathsep.join(sys.path)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path})
    assert done.returncode == 0, done.stderr
