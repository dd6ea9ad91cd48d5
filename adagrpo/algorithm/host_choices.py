"""Choices drawn on the host: the order of prompts, the trained steps, the picture size of an iteration."""

from __future__ import annotations

import torch

WINDOW = 1 << 62
"""Purpose of draws of stochastic steps, a window's or a prompt's own: apart from those that share their numbers."""


def host_generator(seed: int, number: int, purpose: int = 0) -> torch.Generator:
    """A generator of its own for each ``number`` (an epoch, an iteration, a draw) under ``seed``; a function of both alone."""
    return torch.Generator().manual_seed(seed * 1_000_003 + number + purpose)
