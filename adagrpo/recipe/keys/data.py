"""Prompts, rewards and evaluation."""

from __future__ import annotations

from dataclasses import dataclass, field

from .kwargs import KwargValue


@dataclass(frozen=True)
class DataConfig:
    """Prompts. Sources: `tiny:even`, `tiny:wide`, `tiny:held_out`, a UTF-8 text file with one prompt per line, or
    package.module:attribute of a callable (**kwargs) -> sequence of prompts."""

    prompts: str = "tiny:wide"
    held_out: str = "tiny:held_out"
    allow_duplicates: bool = False
    """Accept repeated lines in prompt files."""
    allow_overlap: bool = False
    """Accept held-out prompts that also train: the held-out reward is then not one on unseen prompts."""
    kwargs: dict[str, KwargValue] = field(default_factory=dict)
    """Arguments of prompt sources named by import path."""


@dataclass(frozen=True)
class RewardConfig:
    """One reward: a built-in name, its weight, its arguments, and its time."""

    name: str = "tiny"
    weight: float = 1.0
    kwargs: dict[str, KwargValue] = field(default_factory=dict)
    timeout: float = 600.0
    """Seconds that it may take for one batch of images; 0 waits for ever, and calls it in the trainer's own thread. A reward
    that takes longer ends the run, after saving it."""


@dataclass(frozen=True)
class EvaluationConfig:
    """Held-out evaluation by the deterministic sampler."""

    every: int = 20
    """Iterations between evaluations with fixed noise; 0 is never."""
    prompts: int = 50
    noises: int = 1
    final_prompts: int = 150
    """Prompts of the paired comparison before → after; 0 skips it."""
    final_noises: int = 3
    """Noises per prompt of that comparison, seen nowhere else in the run."""
    guidance: float = 0.0
    """Classifier-free guidance of all evaluation, of sample grids and of `adagrpo sample` and `export`, apart from that of the
    training: 0 is model.guidance, 1 is none."""
