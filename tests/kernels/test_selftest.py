"""The self-test's checks pass with the kernels as they are, and fail once a kernel's result is off."""

from __future__ import annotations

import adagrpo_kernels
import pytest
import torch
from adagrpo_kernels.selftest import CHECKS, Finding
from torch import Tensor


def operator_of(check: str) -> str:
    name = check.split(",")[0]
    return "multi_reward_advantage" if name == "fused_advantage" else name


def run(check: str, device: str) -> Finding:
    return CHECKS[check](torch.device(device))


def nudged(result):
    """Every number 2 % off, every index one off, every e4m3 value its neighbour."""
    if not isinstance(result, Tensor):
        return type(result)(*(t if t is None else nudged(t) for t in result))
    if result.dtype is torch.float8_e4m3fn:
        return (result.view(torch.uint8) ^ 1).view(result.dtype)
    return result * 1.02 if result.is_floating_point() else result + 1


def one_off(part: str | None):
    """One element of a result, or of its field ``part``, off by one number of its dtype."""

    def change(result):
        if part is not None:
            return result._replace(**{part: one_off(None)(getattr(result, part))})
        flat = result.clone().flatten()
        flat[-1] = torch.nextafter(flat[-1].float(), torch.tensor(9.0)).to(flat.dtype) if flat.dtype is torch.float32 else 9.0
        return flat.view_as(result)

    return change


def broken(monkeypatch, name: str, change) -> None:
    kernel = getattr(adagrpo_kernels, name)
    monkeypatch.setattr(adagrpo_kernels, name, lambda *args, **keywords: change(kernel(*args, **keywords)))


@pytest.mark.parametrize("check", CHECKS)
def test_kernels_pass_and_nudged_ones_do_not(check: str, device: str, monkeypatch) -> None:
    found = run(check, device)
    assert found.passed, found
    broken(monkeypatch, operator_of(check), nudged)
    assert not run(check, device).passed


@pytest.mark.parametrize(
    ("check", "part"),
    [("philox_normal", None), ("sde_step", "next"), ("sde_step", "mean"), ("sde_step", "clean"), ("capability_step", "mean")],
)
def test_one_element_is_enough(check: str, part: str | None, device: str, monkeypatch) -> None:
    broken(monkeypatch, check, one_off(part))
    assert not run(check, device).passed


def test_nan_and_wrong_scales_never_pass(device: str, monkeypatch) -> None:
    assert not Finding(float("nan"), 1.0).passed
    broken(monkeypatch, "quantize_rowwise", lambda q: q._replace(scale=q.scale * 1.001))
    assert not run("quantize_rowwise", device).passed
    monkeypatch.undo()
    broken(monkeypatch, "quantize_rowwise", lambda q: q._replace(values=q.values.float().flip(-1).to(q.values.dtype)))
    assert not run("quantize_rowwise", device).passed
    monkeypatch.undo()
    broken(monkeypatch, "group_log_prob", lambda logp: logp * torch.nan)
    assert not run("group_log_prob", device).passed


def test_another_dtype_is_an_error(device: str, monkeypatch) -> None:
    broken(monkeypatch, "philox_normal", lambda noise: noise.double())
    with pytest.raises(ValueError, match="float64"):
        run("philox_normal", device)
