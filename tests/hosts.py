"""Numbers that the released code of other host algorithms computed: random inputs, and what its own functions and loss lines
made of them in float64. The metadata of each file of ``tests/assets/hosts`` says whose, at which commit, with what settings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

ASSETS = Path(__file__).parent / "assets" / "hosts"
CLOSE = {torch.float64: 1e-6, torch.float32: 1e-4}


class Released:
    """One host's numbers."""

    def __init__(self, name: str) -> None:
        with safe_open(ASSETS / f"{name}.safetensors", "pt") as file:
            self.tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            self._settings = file.metadata()

    def given(self, name: str, dtype: torch.dtype = torch.float64) -> Tensor:
        """An input; they were drawn in float32."""
        tensor = self.tensors[f"in.{name}"]
        return tensor.to(dtype) if tensor.is_floating_point() else tensor

    def found(self, name: str) -> Tensor:
        """What the released code found in float64."""
        return self.tensors[f"f64.{name}"]

    def setting(self, name: str) -> Any:
        return json.loads(self._settings[name])


def distance(found: Tensor, truth: Tensor) -> float:
    """Relative, in the Euclidean norm."""
    return float((found.double() - truth.double()).norm() / truth.double().norm())
