"""Latents to rewards, on the device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import RunError
from ..rewards import PromptRows, Reward
from .executor import RolloutExecutor


class Scorer:
    """Decodes and scores in the batches the executor allows; images leave memory chunk by chunk and never leave the device.

    Args:
        executor: its model decodes.
        rewards: M of them.
        names: of each, for errors.
    """

    def __init__(self, executor: RolloutExecutor, rewards: Sequence[Reward], names: Sequence[str]) -> None:
        self.executor, self.rewards = executor, list(rewards)
        self.names = [f"rewards.{m} ({name})" for m, name in enumerate(names)]

    def __call__(self, latents: Tensor, prompts: PromptRows) -> Tensor:
        """Scores [M, R], float64, of clean latents [R, L, C].

        Raises:
            RunError: a reward fails, or does not return one number per image.
        """
        parts = []
        for part in self.executor.decode_chunks(latents.shape[0]):
            with self.executor.phase("decode"):
                images = self.executor.model.decode(latents[part])
            with self.executor.phase("reward"):
                parts.append(self.score_images(images, prompts[part]))
        return torch.cat(parts, 1)

    def score_images(self, images: Tensor, prompts: PromptRows) -> Tensor:
        """Scores [M, R] of images [R, 3, H, W] in [0, 1]."""
        return torch.stack([self._score(m, images, prompts) for m in range(len(self.rewards))])

    def _score(self, number: int, images: Tensor, prompts: PromptRows) -> Tensor:
        name = self.names[number]
        try:
            scores = self.rewards[number](images, prompts)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            raise RunError(f"{name} failed: {type(error).__name__}: {error}") from error
        if not isinstance(scores, Tensor) or scores.shape != (images.shape[0],):
            got = tuple(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
            raise RunError(f"{name} returned {got}; it must return a tensor of shape ({images.shape[0]},), a score per image")
        return scores.to(images.device, torch.float64)
