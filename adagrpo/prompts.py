"""Prompt sources and the endless seeded stream that feeds training."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from .errors import InputError


def load_prompts(source: str) -> list[str]:
    """Prompts of a source, in order.

    Args:
        source: ``tiny:even``, ``tiny:wide``, ``tiny:held_out``, or a UTF-8 text file with one prompt per line; blank lines
            are ignored.

    Raises:
        InputError: unknown source; file missing, empty or not UTF-8.
    """
    if source.startswith("tiny:"):
        from .tiny.prompts import held_out_prompts, training_prompts

        mix = source.removeprefix("tiny:")
        if mix not in ("even", "wide", "held_out"):
            raise InputError(f"data: unknown prompt source {source!r}: tiny:even, tiny:wide or tiny:held_out")
        return held_out_prompts() if mix == "held_out" else training_prompts(mix)
    path = Path(source)
    try:
        lines = path.read_text("utf-8").splitlines()
    except FileNotFoundError as error:
        raise InputError(f"data: prompt file {source} does not exist") from error
    except UnicodeDecodeError as error:
        raise InputError(f"data: prompt file {source} is not UTF-8 text (byte {error.start}); convert it") from error
    except OSError as error:
        raise InputError(f"data: prompt file {source} cannot be read: {error.strerror}") from error
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise InputError(f"data: prompt file {source} holds no prompt; write one per line")
    return prompts


class PromptStream:
    """An endless stream over a list of prompts, shuffled anew each epoch; a function of seed and position alone.

    Attributes:
        position: prompts taken so far; setting it rewinds or forwards the stream.
    """

    def __init__(self, prompts: Sequence[str], seed: int, position: int = 0) -> None:
        self.prompts, self.seed, self.position = list(prompts), seed, position
        self._epoch, self._order = -1, torch.empty(0, dtype=torch.int64)

    def take(self, count: int) -> list[str]:
        """The next ``count`` prompts."""
        taken = [self._at(self.position + i) for i in range(count)]
        self.position += count
        return taken

    def _at(self, position: int) -> str:
        epoch, offset = divmod(position, len(self.prompts))
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            self._epoch, self._order = epoch, torch.randperm(len(self.prompts), generator=generator)
        return self.prompts[int(self._order[offset])]
