"""The state of the filters that do not sample every candidate to the end (``selection.probe`` short and memory)."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from ..algorithm.posterior import PromptPosterior, pick_nearest
from ..algorithm.selection import CapabilityState


@dataclasses.dataclass(frozen=True)
class CheapFilter:
    """Immutable, so that a draw that ran out of memory is repeated from the same state.

    Attributes:
        candidates: B.
        half_life, noise_share, group_evidence: as the recipe's ``selection`` keys.
        level: EMA of the short probes' scores; empty without them.
        posterior: of every prompt's mean reward; None without memory.
        recent: [M, P*B], full-length scores of the last B draws' uniform candidates; NaN before there are any.
    """

    candidates: int
    half_life: float
    noise_share: float
    group_evidence: float
    level: CapabilityState
    posterior: PromptPosterior | None
    recent: Tensor

    @classmethod
    def empty(
        cls,
        rewards: int,
        slots: int,
        candidates: int,
        device: torch.device,
        remembered: int = 0,
        half_life: float = 100.0,
        noise_share: float = 0.56,
        group_evidence: float = 2.0,
    ) -> CheapFilter:
        """Nothing seen yet; ``remembered`` prompts have a posterior, 0 is none."""
        recent = torch.full((rewards, slots * candidates), torch.nan, dtype=torch.float64, device=device)
        posterior = PromptPosterior.empty(rewards, remembered, device) if remembered else None
        level = CapabilityState.for_rewards(rewards, device)
        return cls(candidates, half_life, noise_share, group_evidence, level, posterior, recent)

    def nearest(self, places: Tensor, capability: CapabilityState, weights: Tensor, fallback: Tensor, draw: int) -> Tensor:
        """Candidate per slot [P] nearest to the EMA by the posterior; ``fallback`` [P] while there is no EMA yet.

        Args:
            places: int64 [P, B], the candidates' prompts.
        """
        assert self.posterior is not None
        now = torch.full((), draw, dtype=torch.int64, device=places.device)
        level = (capability.mean, capability.var)
        expected, variance = self.posterior.predict(places, *level, self.noise_share, now, self.half_life)
        # Candidates that nothing tells apart are equally good: a draw among them, not always the first.
        jitter = torch.zeros_like(variance)
        jitter.scatter_(-1, fallback.reshape(1, -1, 1).expand(variance.shape[0], -1, 1), -1e-9)
        picks = pick_nearest(expected, variance + jitter, *level, weights)
        return torch.where(capability.count[0] > 0, picks, fallback)

    def with_uniform(self, places: Tensor, scores: Tensor, draw: int) -> CheapFilter:
        """With the full-length scores [M, P] of the uniformly drawn candidates, prompts ``places`` [P]."""
        slots = places.shape[0]
        first = draw % self.candidates * slots
        recent = self.recent.clone()
        recent[:, first : first + slots] = scores
        return dataclasses.replace(self, recent=recent, posterior=self._observed(places, scores, 1.0, draw))

    def with_groups(self, places: Tensor, rewards: Tensor, draw: int) -> CheapFilter:
        """With the rewards [M, groups, G] of the picked prompts ``places`` [P]."""
        per_slot = rewards.reshape(rewards.shape[0], places.shape[0], -1).double().nanmean(-1)
        return dataclasses.replace(self, posterior=self._observed(places, per_slot, self.group_evidence, draw))

    def _observed(self, places: Tensor, rewards: Tensor, weight: float, draw: int) -> PromptPosterior | None:
        if self.posterior is None:
            return None
        now = torch.full((), draw, dtype=torch.int64, device=places.device)
        return self.posterior.observed(places, rewards, weight, now, self.half_life)

    def state_dict(self) -> dict[str, Any]:
        """Everything that decides the next pick."""
        posterior = None if self.posterior is None else self.posterior.state_dict()
        return {"level": self.level.state_dict(), "posterior": posterior, "recent": self.recent}

    def loaded(self, state: dict[str, Any]) -> CheapFilter:
        """Inverse of ``state_dict``."""
        device = self.recent.device
        posterior = None if self.posterior is None else PromptPosterior.from_state_dict(state["posterior"], device)
        level = CapabilityState.from_state_dict(state["level"]).to(device)
        return dataclasses.replace(self, level=level, posterior=posterior, recent=state["recent"].to(device))
