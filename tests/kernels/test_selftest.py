"""The self-test of the kernels passes on sound ones and fails on perturbed ones."""

from __future__ import annotations

import adagrpo_kernels
import pytest
import torch
from adagrpo_kernels import Quantized
from adagrpo_kernels.selftest import CHECKS
from torch import Tensor

PERTURBED = {
    "philox_normal": "philox_normal", "sde_step": "sde_step", "sde_step, log-probability": "sde_step",
    "group_log_prob": "group_log_prob", "group_log_prob, gradient": "group_log_prob",
    "fused_advantage": "multi_reward_advantage", "capability_step": "capability_step", "quantize_rowwise": "quantize_rowwise",
    "layer_norm_modulate": "layer_norm_modulate", "layer_norm_modulate, e4m3": "layer_norm_modulate",
    "gelu_join": "gelu_join", "gelu_join, e4m3": "gelu_join",
}  # fmt: skip


@pytest.mark.parametrize("name", CHECKS)
def test_sound_kernels_pass(device: str, name: str) -> None:
    found = CHECKS[name](torch.device(device))
    assert found.passed, found


def spoiled(result):
    """The result with every float a little larger."""
    if isinstance(result, Quantized):
        return Quantized(result.values, result.scale * 1.01)
    if isinstance(result, tuple):
        return type(result)(*(spoiled(part) for part in result))
    return result * 1.01 if isinstance(result, Tensor) and result.is_floating_point() else result


def test_every_operator_has_a_check() -> None:
    assert set(PERTURBED) == set(CHECKS)


@pytest.mark.parametrize("name", CHECKS)
def test_perturbed_kernels_fail(device: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    operator = getattr(adagrpo_kernels, PERTURBED[name])
    monkeypatch.setattr(adagrpo_kernels, PERTURBED[name], lambda *args, **keys: spoiled(operator(*args, **keys)))
    assert not CHECKS[name](torch.device(device)).passed
