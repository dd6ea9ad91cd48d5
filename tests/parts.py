"""Parts a recipe can name by import path in tests."""

import functools

import torch
from toy import PROMPTS, ToyModel, half_bright


def model(path: str, dtype: torch.dtype, device: torch.device, height: int, width: int) -> ToyModel:
    return ToyModel(dtype, device=str(device))


def prompts() -> list[str]:
    return PROMPTS


def held_out() -> list[str]:
    return [f"unseen {i}" for i in range(20)]


def reward():
    told = functools.partial(half_bright)
    told.provenance = {"made_from": "nothing"}
    return told


def broken():
    """A reward that fails in training, not when it is tried."""
    calls = []

    def score(images, prompts):
        calls.append(1)
        if len(calls) > 3:
            raise RuntimeError("no disk")
        return half_bright(images, prompts)

    return score
