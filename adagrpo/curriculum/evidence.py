"""What judges that do not sample every candidate to the end remember."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from ..algorithm.posterior import PromptPosterior, expected_distance
from ..algorithm.rivals import Record, Visits, success
from ..algorithm.selection import CapabilityState


@dataclasses.dataclass(frozen=True)
class Evidence:
    """Immutable, so that a draw that ran out of memory is repeated from the same state.

    Attributes:
        candidates: B.
        half_life, noise_share, group_evidence: as the recipe's ``selection`` keys.
        levels: EMA of the judging scores, one per stage: of short probes, of each preview of a race; of others none.
        posterior: of every prompt's mean reward; None without memory.
        recent: [n, M, P*B], scores of the last B draws' uniform candidates, at a race's previews from the second on, then in
            full length; NaN before there are any; n is 0 where nothing reads them.
        record: of every prompt's success; None but for rivals.
        success_range: rewards of an image that failed and of one that succeeded, for them.
    """

    candidates: int
    half_life: float
    noise_share: float
    group_evidence: float
    levels: tuple[CapabilityState, ...]
    posterior: PromptPosterior | None
    recent: Tensor
    record: Record | None = None
    success_range: tuple[float, float] = (0.0, 1.0)

    @classmethod
    def empty(
        cls,
        rewards: int,
        slots: int,
        candidates: int,
        device: torch.device,
        stages: int = 0,
        remembered: int = 0,
        half_life: float = 100.0,
        noise_share: float = 0.56,
        group_evidence: float = 2.0,
    ) -> Evidence:
        """Nothing seen yet; candidates are judged at ``stages``, and ``remembered`` prompts have a posterior (0: none)."""
        recent = torch.full((max(stages, 1), rewards, slots * candidates), torch.nan, dtype=torch.float64, device=device)
        posterior = PromptPosterior.empty(rewards, remembered, device) if remembered else None
        levels = tuple(CapabilityState.for_rewards(rewards, device) for _ in range(stages))
        return cls(candidates, half_life, noise_share, group_evidence, levels, posterior, recent)

    def judged(self, numbers: Tensor, capability: CapabilityState, weights: Tensor, draw: int) -> tuple[Tensor, Tensor]:
        """What the posterior says of candidates ``numbers`` (int64 [P, K], their prompts): mean [M, P, K], and their expected
        distance to the EMA [P, K]; all candidates are equally far while there is no EMA yet."""
        assert self.posterior is not None
        now = torch.full((), draw, dtype=torch.int64, device=numbers.device)
        level = (capability.mean, capability.var)
        expected, variance = self.posterior.predict(numbers, *level, self.noise_share, now, self.half_life)
        distance = expected_distance(expected, variance, *level, weights)
        return expected, torch.where(capability.count[0] > 0, distance, 1.0)

    def with_level(self, stage: int, level: CapabilityState) -> Evidence:
        """With another EMA of the scores that judge at ``stage``."""
        return dataclasses.replace(self, levels=(*self.levels[:stage], level, *self.levels[stage + 1 :]))

    def with_recent(self, stage: int, scores: Tensor, draw: int) -> Evidence:
        """With the scores [M, P] of the uniformly drawn candidates at ``stage``; -1 is the full length."""
        slots = scores.shape[1]
        first = draw % self.candidates * slots
        recent = self.recent.clone()
        recent[stage, :, first : first + slots] = scores
        return dataclasses.replace(self, recent=recent)

    def with_images(self, numbers: Tensor, scores: Tensor, draw: int) -> Evidence:
        """With the full-length scores [M, K] of one image of each of the prompts ``numbers`` [K]."""
        return dataclasses.replace(self, posterior=self._observed(numbers, scores, 1.0, draw))

    def with_groups(self, numbers: Tensor, rewards: Tensor, draw: int) -> Evidence:
        """With the rewards [M, groups, G] of the picked prompts ``numbers`` [P]; rivals go by the first reward."""
        if self.record is not None:
            succeeded = success(rewards[0], *self.success_range).unflatten(0, (len(numbers), -1))
            return dataclasses.replace(self, record=self.record.after(Visits.of(numbers, succeeded, self.record.prompts)))
        per_slot = rewards.reshape(rewards.shape[0], numbers.shape[0], -1).double().nanmean(-1)
        return dataclasses.replace(self, posterior=self._observed(numbers, per_slot, self.group_evidence, draw))

    def _observed(self, numbers: Tensor, rewards: Tensor, weight: float, draw: int) -> PromptPosterior | None:
        if self.posterior is None:
            return None
        now = torch.full((), draw, dtype=torch.int64, device=numbers.device)
        return self.posterior.observed(numbers, rewards, weight, now, self.half_life)

    def state_dict(self) -> dict[str, Any]:
        """Everything that decides the next pick."""
        posterior = None if self.posterior is None else self.posterior.state_dict()
        record = {} if self.record is None else {"record": self.record.state_dict()}
        return {"levels": [each.state_dict() for each in self.levels], "posterior": posterior, "recent": self.recent} | record

    def loaded(self, state: dict[str, Any]) -> Evidence:
        """Inverse of ``state_dict``."""
        device = self.recent.device
        posterior = None if self.posterior is None else PromptPosterior.from_state_dict(state["posterior"], device)
        levels = tuple(CapabilityState.from_state_dict(level).to(device) for level in state["levels"])
        record = self.record and self.record.loaded(state["record"])
        recent = state["recent"].to(device)
        return dataclasses.replace(self, levels=levels, posterior=posterior, recent=recent, record=record)
