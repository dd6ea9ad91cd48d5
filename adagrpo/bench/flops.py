"""FLOPs of an iteration, attention included, and the peak they are held against."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..engine.executor import RolloutExecutor

# Dense bf16 TFLOP/s with fp32 accumulation by NVIDIA's data sheets, by a part of the device's name.
PEAKS = {"H200": 989.5, "H100 PCIe": 756.5, "H100 NVL": 835.5, "H100": 989.5, "A100": 312.0, "L40S": 362.0}


@dataclasses.dataclass(frozen=True)
class ForwardFlops:
    """FLOPs of one image, a multiply-add counted as two: a forward without gradient, and forward and backward."""

    forward: int
    update: int

    def iteration(self, evaluations: Mapping[str, int]) -> int:
        """Of the transformer in one iteration, from its evaluations by phase."""
        return sum(count * (self.update if phase == "update" else self.forward) for phase, count in evaluations.items())


def count_flops(executor: RolloutExecutor) -> ForwardFlops:
    """Count the policy's FLOPs on one row; gradients are left as they were.

    Attention is computed from plain products while counting, because a counter knows few of torch's fused ones.
    """
    from torch.utils.flop_counter import FlopCounterMode  # imports triton, whose interpreter is chosen before

    model = executor.model
    x = torch.zeros(1, *model.latent_shape, dtype=executor.storage, device=model.device)
    conditioning = model.encode(["a red circle"])
    parameters = [p for _, p in model.trainable()]

    def velocity() -> Tensor:
        return model.velocity(x, executor.table.sigma[:1], conditioning)

    with sdpa_kernel(SDPBackend.MATH):
        with torch.no_grad(), FlopCounterMode(display=False) as forward:
            velocity()
        with FlopCounterMode(display=False) as update:
            torch.autograd.grad(velocity().float().sum(), parameters, allow_unused=True)
    return ForwardFlops(forward.get_total_flops(), update.get_total_flops())


def stated_peak(device: torch.device, given: float = 0.0) -> float | None:
    """Peak in TFLOP/s: what the caller states, else the data sheet's dense bf16; None where neither is known."""
    if given > 0:
        return given
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAKS.items() if part in name), None)
