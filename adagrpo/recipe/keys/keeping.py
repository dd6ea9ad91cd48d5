"""What a run keeps, watches and may cost."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class OutputConfig:
    """What the run folder receives, and how often (in iterations)."""

    grid_every: int = 20
    grid_prompts: int = 10
    checkpoint_every: int = 50
    keep_last: int = 2
    keep_every: int = 0
    """Checkpoints at multiples of this iteration number are never removed; 0 is none."""
    keep_best: bool = False
    """Keep the checkpoint with the highest held-out reward."""
    trace_at: int = 0
    """Record a profiler trace of this iteration into `traces/`, for Perfetto; 0 records none."""
    loggers: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ()
    """Also send the metrics there; needs `adagrpo[log]`."""


@dataclass(frozen=True)
class GuardConfig:
    """One guard: trips when its value exceeds `limit` in `patience` observations in a row; limit 0 is off."""

    limit: float = 0.0
    action: Literal["warn", "stop", "rollback"] = "warn"
    patience: int = 1


@dataclass(frozen=True)
class GuardsConfig:
    """Guards that act: warn, stop with exit code 3, or roll back to the last good checkpoint and go on with new prompts
    and noise."""

    reward_hacking: GuardConfig = GuardConfig(limit=0.05, patience=2)
    """Fall of the held-out reward below its best so far, while the trained reward is above its value at that time."""
    kl: GuardConfig = GuardConfig()
    """KL divergence to the initial policy; needs loss.kl_weight."""
    grad_norm: GuardConfig = GuardConfig()
    """Gradient norm before clipping."""
    ratio: GuardConfig = GuardConfig(limit=1e-3)
    """Largest deviation of the on-policy ratio from 1."""
    failed_rewards: GuardConfig = GuardConfig(limit=0.5, patience=3)
    """Share of samples without a finite reward."""
    equal_groups: GuardConfig = GuardConfig(limit=0.9, patience=5)
    """Share of groups whose rewards are all equal: the policy's samples no longer differ."""
    non_finite: GuardConfig = GuardConfig(limit=0.5, action="stop")
    """1 when loss or gradient norm is not finite; the weights of such an iteration are never saved."""
    max_rollbacks: int = 3
    """After this many rollbacks the next one stops the run."""


@dataclass(frozen=True)
class BudgetConfig:
    """What selection and fusion may cost per iteration, as shares of the identical recipe without them; `adagrpo bench budget`
    measures it and fails above."""

    evaluations: float = 0.25
    """Additional transformer evaluations, counted, with `selection.probe = full`."""
    time: float = 0.25
    """Additional seconds with `selection.probe = full`; held against a GPU's clock only."""
    cheap_evaluations: float = 0.05
    """As `evaluations`, with every other probe."""
    cheap_time: float = 0.05
    """As `time`, with every other probe."""
