"""Groups of samples with what they were drawn from: what the advantage and the update work on."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from ..algorithm.advantages import groups_with_signal
from ..models.base import Conditioning
from ..rewards import PromptRows
from .sampling import Samples, merge_slots
from .share import Share


@dataclasses.dataclass(frozen=True)
class Groups:
    """Groups drawn for P slots; but for ``conditioning`` and ``samples`` those of all ranks.

    Attributes:
        share: which slots are this rank's.
        prompts: the candidates' texts and the row picked for each slot.
        conditioning: of the picked prompts of this rank's slots.
        scores: [M, P, B], what candidates were judged by; None where nothing reads them.
        picks: int64 [P], rows among the candidates P*B; -1 where there is none with a score.
        samples: final latents and stored transitions of this rank's slots.
        rewards: [M, groups, G]; NaN where a sample failed.
    """

    share: Share

    prompts: PromptRows
    conditioning: Conditioning
    scores: Tensor | None
    picks: Tensor
    samples: Samples
    rewards: Tensor

    @property
    def slots(self) -> int:
        """P."""
        return self.picks.shape[0]

    def without_signal(self) -> Tensor:
        """Slots whose groups all lack spread, int64 vector; read on the host."""
        signal = groups_with_signal(self.rewards).reshape(self.slots, -1).any(1)
        return torch.nonzero(~signal).flatten()

    def trained(self, skip_equal: bool) -> Tensor:
        """bool [groups, G]: samples that the update counts; ``skip_equal`` leaves out groups whose rewards are all equal."""
        valid = self.rewards.isfinite().all(0)
        return valid & groups_with_signal(self.rewards).unsqueeze(-1) if skip_equal else valid

    def with_slots(self, slots: Tensor, other: Groups, candidates: int) -> Groups:
        """With the slots ``slots`` (int64 vector) taken from ``other``, in order, each by the rank that has it.

        Args:
            candidates: B, among which both chose.
        """
        mine = self.share.local(slots, 1)
        mine = mine[mine >= 0] if self.share.ranks.size > 1 else mine
        text = other.conditioning.rows(torch.arange(len(mine), device=mine.device))
        texts = [*self.prompts.texts, *other.prompts.texts]
        shifted = other.prompts.text_index + len(self.prompts.texts)
        rewards = self.rewards.unflatten(1, (self.slots, -1))
        fresh = other.rewards.unflatten(1, (other.slots, -1))
        within = torch.where(other.picks >= 0, other.picks % candidates, -1)
        moved = torch.where(within >= 0, slots * candidates + within, -1)
        scores = self.scores
        if scores is not None and other.scores is not None:
            scores = scores.index_copy(1, slots, other.scores)
        return Groups(
            share=self.share,
            prompts=PromptRows(texts, self.prompts.text_index.index_copy(0, slots, shifted)),
            conditioning=self.conditioning.replaced(mine, text),
            scores=scores,
            picks=self.picks.index_copy(0, slots, moved),
            samples=merge_slots(self.samples, other.samples, mine, self.share.each),
            rewards=rewards.index_copy(1, slots, fresh).flatten(1, 2),
        )
