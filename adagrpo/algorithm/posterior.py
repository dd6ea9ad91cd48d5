"""What is known of each prompt's mean reward: a Gaussian posterior per prompt, with forgetting.

A probe is one image, and much of its reward's variance is the noise draw, not the prompt (56 % on the built-in world). Rewards
of earlier iterations, which were paid for anyway, can say more about a prompt than a fresh probe does. With prior
N(mu, (1 - s)*var) and noise variance s*var (mu, var: the capability EMA; s: noise share), n observations with sum S give

    precision = n/(s*var) + 1/((1 - s)*var)      mean = (S/(s*var) + mu/((1 - s)*var)) / precision

Evidence fades by half every ``half_life`` draws, because the policy moves.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor


@dataclasses.dataclass(frozen=True)
class PromptPosterior:
    """Evidence on the mean rewards of N prompts under M rewards.

    Attributes:
        count: float64 [N], observations, faded to the prompt's last one.
        total: float64 [M, N], their sum.
        seen: int64 [N], the draw of the last one.
    """

    count: Tensor
    total: Tensor
    seen: Tensor

    @classmethod
    def empty(cls, rewards: int, prompts: int, device: torch.device | str = "cpu") -> PromptPosterior:
        """Nothing known."""
        count = torch.zeros(prompts, dtype=torch.float64, device=device)
        return cls(count, count.repeat(rewards, 1), torch.zeros(prompts, dtype=torch.int64, device=device))

    def observed(self, prompts: Tensor, rewards: Tensor, weight: float, draw: Tensor, half_life: float) -> PromptPosterior:
        """With one observation more for each of ``prompts`` (int64 [K], repeats allowed).

        Args:
            rewards: [M, K]; a column with a reward that is not finite is left out.
            weight: how many independent images an observation is worth.
            draw: int64 0-dim, the present one.
        """
        fade = self._fade(prompts, draw, half_life)
        known = rewards.isfinite().all(0)
        count = self.count.index_copy(0, prompts, self.count[prompts] * fade)
        total = self.total.index_copy(1, prompts, self.total[:, prompts] * fade)
        share = weight * known.double()
        values = rewards.double().masked_fill(~known, 0) * weight
        return PromptPosterior(
            count.index_add(0, prompts, share),
            total.index_add(1, prompts, values),
            self.seen.index_copy(0, prompts, draw.expand_as(prompts)),
        )

    def predict(
        self, prompts: Tensor, mean: Tensor, var: Tensor, noise_share: float, draw: Tensor, half_life: float
    ) -> tuple[Tensor, Tensor]:
        """Posterior mean and variance [M, ...] of the mean rewards of ``prompts`` (int64 [...]).

        Args:
            mean, var: [M], of the capability EMA.
            noise_share: of a single image's variance, in (0, 1).
        """
        flat = prompts.flatten()
        fade = self._fade(flat, draw, half_life)
        var = var.clamp_min(1e-8).unsqueeze(1)
        noise, prior = noise_share * var, (1 - noise_share) * var
        precision = self.count[flat] * fade / noise + 1 / prior
        expected = (self.total[:, flat] * fade / noise + mean.unsqueeze(1) / prior) / precision
        return expected.unflatten(1, prompts.shape), (1 / precision).unflatten(1, prompts.shape)

    def _fade(self, prompts: Tensor, draw: Tensor, half_life: float) -> Tensor:
        return 0.5 ** ((draw - self.seen[prompts]).double() / half_life)

    def state_dict(self) -> dict[str, Tensor]:
        """Tensors ``count, total, seen``."""
        return {"count": self.count, "total": self.total, "seen": self.seen}

    @classmethod
    def from_state_dict(cls, state: dict[str, Tensor], device: torch.device | str) -> PromptPosterior:
        """Inverse of ``state_dict``."""
        return cls(*(state[name].to(device) for name in ("count", "total", "seen")))


def expected_distance(expected: Tensor, variance: Tensor, mean: Tensor, var: Tensor, weights: Tensor) -> Tensor:
    """Expected squared distance to the EMA in its variance, ``sum_m weight_m*((expected - mean)**2 + variance)/var``: [P, B].

    A prompt that is known to be near beats one that might be.

    Args:
        expected, variance: [M, P, B].
        mean, var: [M], of the capability EMA.
        weights: [M].
    """
    column = lambda t: t.double().reshape(-1, 1, 1)  # noqa: E731
    distance = ((expected - column(mean)).square() + variance) / column(var.clamp_min(1e-8))
    return (column(weights) * distance).sum(0)
