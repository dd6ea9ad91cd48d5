"""Another processor's rounding, played: every velocity is off by a relative 1e-6 that depends on its value and its batch.

A processor with other instructions is deterministic too, but sums in another order: the same call gives the same velocity bit
for bit, the same row in a batch of another shape gives another. So the error is a hash of seed, shape, place and value.
Nothing of it is visible to PyTorch: no operator is dispatched, counted or recorded for the backward pass.
"""

from __future__ import annotations

import functools
import os
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor
from torch._subclasses import FakeTensor
from torch.utils._python_dispatch import _disable_current_modes

VARIABLE = "ADAGRPO_TESTS_ROUNDING"  # the seed; children of a test inherit it
RELATIVE = 1e-6
FLIPPED = 1 / 64  # share of a half precision's values that move to a neighbour: a smaller error would vanish in rounding
BITS = {torch.float64: np.int64, torch.float32: np.int32, torch.bfloat16: np.int16, torch.float16: np.int16}
Model = TypeVar("Model", bound=type)
calls = 0  # velocities disturbed in this process


def rounded_elsewhere(model: Model) -> Model:
    """The class, its ``velocity`` disturbed where the environment names a seed."""
    if VARIABLE in os.environ:
        velocity = model.velocity

        @functools.wraps(velocity)
        def disturbed(self, *args) -> Tensor:
            return disturb(velocity(self, *args), int(os.environ[VARIABLE]))

        model.velocity = disturbed
    return model


def disturb(v: Tensor, seed: int) -> Tensor:
    """``v`` itself, changed in place; on the meta device there is nothing to change."""
    global calls
    calls += 1
    if v.device.type == "cpu" and not isinstance(v, FakeTensor):
        with _disable_current_modes():
            _change(v.detach(), seed)
    return v


def _change(v: Tensor, seed: int) -> None:
    bits = v.view({np.int16: torch.int16, np.int32: torch.int32, np.int64: torch.int64}[BITS[v.dtype]]).numpy()
    hashed = _mix(bits.astype(np.uint64) ^ np.uint64(hash((seed, *v.shape)) & (2**63 - 1)))
    hashed = _mix(hashed + np.arange(v.numel(), dtype=np.uint64).reshape(v.shape))
    unit = (hashed >> np.uint64(11)).astype(np.float64) / 2**53  # [0, 1)
    if v.dtype in (torch.float32, torch.float64):
        values = v.numpy()
        values *= (1 + RELATIVE * (2 * unit - 1)).astype(values.dtype)
    else:  # next to zero in the bits is next to it in value
        up, down = unit < FLIPPED / 2, unit > 1 - FLIPPED / 2
        finite = np.abs(v.float().numpy()) < torch.finfo(v.dtype).max
        bits += np.where(finite & (bits & 0x7FFF != 0), up.astype(np.int16) - down.astype(np.int16), 0).astype(np.int16)


def _mix(x: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64 (Steele, Lea, Flood 2014)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
