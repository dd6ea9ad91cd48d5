"""Latents to rewards, on the device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..parts.isolation import Part, call_part
from ..parts.plugins import checked
from ..rewards import PromptRows, Reward
from .executor import RolloutExecutor
from .overlap import Overlap


class Scorer:
    """Decodes and scores in the batches the executor allows; images leave memory chunk by chunk and never leave the device.

    Args:
        executor: its model decodes.
        rewards: M of them.
        names: of each, for errors.
        timeouts: of each, seconds per call; 0, and None, waits for ever.

    Attributes:
        decoded: images so far.
        stream: a second CUDA stream, on which ``overlapped`` works; None is the current one.
    """

    def __init__(
        self,
        executor: RolloutExecutor,
        rewards: Sequence[Reward],
        names: Sequence[str],
        timeouts: Sequence[float] | None = None,
    ) -> None:
        self.executor, self.rewards, self.decoded = executor, list(rewards), 0
        self.stream: torch.cuda.Stream | None = None
        limits = timeouts or [0.0] * len(names)
        self.parts = [
            Part(f"rewards.{m} ({name})", timeout=limit, timeout_key=f"rewards.{m}.timeout")
            for m, (name, limit) in enumerate(zip(names, limits, strict=True))
        ]

    def __call__(self, latents: Tensor, prompts: PromptRows) -> Tensor:
        """Scores [M, R], float64, of clean latents [R, L, C].

        Raises:
            RunError: a reward fails, or does not return one number per image.
        """
        parts = []
        for part in self.executor.limit.decode_chunks(latents.shape[0]):
            self.decoded += part.stop - part.start
            with self.executor.phase("decode"):
                images = self.executor.model.decode(latents[part])
            with self.executor.phase("reward"):
                parts.append(self.score_images(images, prompts[part], kept=False))
        return torch.cat(parts, 1)

    def overlapped(self, prompts: PromptRows) -> Overlap:
        """Scores the rows of a rollout, whose prompts these are, chunk by chunk beside the next chunk's rollout."""

        def work(latents: Tensor, rows: Tensor) -> Tensor:
            return self(latents, prompts.rows(rows))

        return Overlap(work, self.stream)

    def score_images(self, images: Tensor, prompts: PromptRows, kept: bool = True) -> Tensor:
        """Scores [M, R], float64, of images [R, 3, H, W] in [0, 1]; not ``kept``: the last reward may write into them."""
        last = len(self.rewards) - 1
        return torch.stack([self._score(m, images, prompts, kept or m < last) for m in range(last + 1)])

    def _score(self, number: int, images: Tensor, prompts: PromptRows, kept: bool) -> Tensor:
        part = self.parts[number]
        scores = call_part(part, self.rewards[number], images.clone() if kept else images, prompts.copied(), copied=False)
        return checked(scores, images.shape[:1], part.name, "a score per image").to(images.device, torch.float64)
