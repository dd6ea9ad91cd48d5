"""The endless seeded stream that feeds training."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..algorithm.host_choices import host_generator


class PromptStream:
    """An endless stream over prompts, shuffled anew each epoch; a function of seed and position alone.

    Attributes:
        position: prompts taken so far; setting it rewinds or forwards the stream.
    """

    def __init__(self, prompts: Sequence[str], seed: int, position: int = 0) -> None:
        self.prompts, self.seed, self.position = prompts, seed, position
        self._epoch, self._order = -1, torch.empty(0, dtype=torch.int64)

    def take(self, count: int) -> list[str]:
        """The next ``count`` prompts."""
        return [self.prompts[i] for i in self.take_numbers(count)]

    def take_numbers(self, count: int) -> list[int]:
        """The next ``count`` prompts by their place in the list."""
        taken = [self._at(self.position + i) for i in range(count)]
        self.position += count
        return taken

    def _at(self, position: int) -> int:
        epoch, offset = divmod(position, len(self.prompts))
        if epoch != self._epoch:
            generator = host_generator(self.seed, epoch)
            self._epoch, self._order = epoch, torch.randperm(len(self.prompts), generator=generator)
        return int(self._order[offset])
