"""Rewards to advantages: the recipe's function, what it did, and the control that deals advantages to the wrong samples."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from ..algorithm.advantages import (
    PAPER_SCALE,
    Scale,
    advantage_statistics,
    groups_with_signal,
    reward_advantage,
    reward_statistics,
)
from ..algorithm.host_choices import host_generator
from ..algorithm.selection import CapabilityState

Fuse = Callable[[Tensor, CapabilityState, Tensor], Tensor]


@dataclasses.dataclass(frozen=True)
class Fusion:
    """Cross-level advantages of groups (AdaGRPO, section 3), or a user's.

    Attributes:
        names, weights: of the M rewards; weights [M].
        clip, weight, calibration: as in ``reward_advantage``.
        scale: of the local part.
        impl: implementation of the operator.
        function: a user's, ``(rewards [M, groups, G], level, weights) -> [groups, G]``; None for the recipe's own.
        shuffle_seed: deal the advantages of each group to the wrong samples by it; None deals them rightly.
    """

    names: tuple[str, ...]
    weights: Tensor
    clip: float = 5.0
    weight: float = 1.0
    calibration: str = "mass"
    scale: Scale = PAPER_SCALE
    impl: str | None = None
    function: Fuse | None = None
    shuffle_seed: int | None = None

    def __call__(self, rewards: Tensor, level: CapabilityState, draws: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Advantages [groups, G] of rewards [M, groups, G], and what to log of rewards and fusion.

        Args:
            draws: made so far; the control shuffles by them.
        """
        if self.function is not None:
            advantage = self.function(rewards, level, self.weights)
            found = [advantage_statistics(r, advantage, level[m]) | reward_statistics(r) for m, r in enumerate(rewards)]
        else:
            options = (self.clip, self.weight, self.calibration, self.impl, self.scale)
            advantage, found = reward_advantage(rewards, level, self.weights, *options)
        statistics = self._named(found)
        if len(self.names) > 1:  # what the guards watch: a sample fails with any of its rewards
            statistics["advantage/failed"] = (~rewards.isfinite().all(0)).double().mean()
            statistics["advantage/equal_groups"] = (~groups_with_signal(rewards)).double().mean()
        if self.shuffle_seed is not None:
            generator = host_generator(self.shuffle_seed, draws)
            order = torch.rand(advantage.shape, generator=generator).argsort(-1).to(advantage.device)
            advantage = advantage.gather(-1, order)
        return advantage, statistics

    def _named(self, found: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        """Metrics by name: the first reward's plain, the others' with number and name."""
        metrics: dict[str, Tensor] = {}
        for m, (name, values) in enumerate(zip(self.names, found, strict=True)):
            mean, spread = values.pop("reward_mean"), values.pop("group_std")
            metrics |= {f"reward/train_{m}_{name}": mean} if m else {"reward/train": mean, "reward/group_std": spread}
            prefix = f"advantage/{m}_{name}_" if m else "advantage/"
            metrics |= {prefix + key: value for key, value in values.items()}
        return metrics
