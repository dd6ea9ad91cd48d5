"""Parts a recipe can name by import path in tests."""

import torch
from toy import PROMPTS, ToyModel, half_bright


def model(path: str, dtype: torch.dtype, device: torch.device, height: int, width: int) -> ToyModel:
    return ToyModel(dtype, device=str(device))


def prompts() -> list[str]:
    return PROMPTS


def reward():
    return half_bright
