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
        names, weights: of the M rewards; weights [M]. Where samples have several tails, of each reward under each of them.
        tails: images of each sample: its advantages under each are summed (G2RPO).
        seeds: anchors of a slot whose groups at a step are one group here (TempFlow-GRPO); 1 leaves them apart.
        steps: groups of each anchor.
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
    tails: int = 1
    seeds: int = 1
    steps: int = 1

    def __call__(self, rewards: Tensor, level: CapabilityState, draws: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Advantages [groups, G] of rewards [M, groups, G], and what to log of rewards and fusion.

        Args:
            draws: made so far; the control shuffles by them.
        """
        if self.tails > 1:
            level = CapabilityState(*(t.repeat_interleave(self.tails, -1) for t in (level.mean, level.var, level.count)))
        apart, rewards = rewards, self._pooled(rewards)
        advantage, found = self._of_slots(rewards, level) if level.slots else self._fused(rewards, level)
        advantage, rewards = self._pooled(advantage, undo=True), apart
        statistics = self._named(found)
        if len(self.names) > 1:  # what the guards watch: a sample fails with any of its rewards
            statistics["advantage/failed"] = (~rewards.isfinite().all(0)).double().mean()
            statistics["advantage/equal_groups"] = (~groups_with_signal(rewards)).double().mean()
        if self.shuffle_seed is not None:
            generator = host_generator(self.shuffle_seed, draws)
            order = torch.rand(advantage.shape, generator=generator).argsort(-1).to(advantage.device)
            advantage = advantage.gather(-1, order)
        return advantage, statistics

    def _fused(self, rewards: Tensor, level: CapabilityState) -> tuple[Tensor, list[dict[str, Tensor]]]:
        """Advantages of rewards against one level, and what is told of each reward."""
        if self.function is None:
            options = (self.clip, self.weight, self.calibration, self.impl, self.scale)
            return reward_advantage(rewards, level, self.weights, *options)
        advantage = self.function(rewards, level, self.weights)
        return advantage, [advantage_statistics(r, advantage, level[m]) | reward_statistics(r) for m, r in enumerate(rewards)]

    def _of_slots(self, rewards: Tensor, levels: CapabilityState) -> tuple[Tensor, list[dict[str, Tensor]]]:
        """Each slot's groups against its own level; what is told is the mean over slots."""
        parts = [self._fused(part, levels[p]) for p, part in enumerate(rewards.chunk(levels.slots, 1))]
        of_reward = zip(*(found for _, found in parts), strict=True)
        told = [{name: torch.stack([one[name] for one in ones]).nanmean() for name in ones[0]} for ones in of_reward]
        return torch.cat([advantage for advantage, _ in parts]), told

    def _pooled(self, values: Tensor, undo: bool = False) -> Tensor:
        """Groups [..., P*seeds*steps, G] put together over seeds, [..., P*steps, seeds*G], or the reverse."""
        if self.seeds == 1:
            return values
        if undo:
            return values.unflatten(-1, (self.seeds, -1)).unflatten(-3, (-1, self.steps)).movedim(-2, -3).flatten(-4, -2)
        return values.unflatten(-2, (-1, self.seeds, self.steps)).movedim(-2, -3).flatten(-2, -1).flatten(-3, -2)

    def _named(self, found: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        """Metrics by name: the first reward's plain, the others' with number and name."""
        metrics: dict[str, Tensor] = {}
        for m, (name, values) in enumerate(zip(self.names, found, strict=True)):
            mean, spread = values.pop("reward_mean"), values.pop("group_std")
            metrics |= {f"reward/train_{m}_{name}": mean} if m else {"reward/train": mean, "reward/group_std": spread}
            prefix = f"advantage/{m}_{name}_" if m else "advantage/"
            metrics |= {prefix + key: value for key, value in values.items()}
        return metrics
