"""Images on their way to the host: one copy per chunk, beside which the device goes on."""

from __future__ import annotations

import torch
from torch import Tensor

from .base import PromptRows


class HostImages:
    """Images as 8-bit numbers, and the prompts of each, in the host's memory.

    On CUDA everything travels in one copy, which is queued on the current stream; ``read`` waits for it.

    Args:
        images: [N, 3, H, W], floats in [0, 1]; rounded to the nearest of 255 steps, half to even.
        prompts: of the images.

    Attributes:
        bytes: that it holds.
    """

    def __init__(self, images: Tensor, prompts: PromptRows) -> None:
        self._texts, self._shape = prompts.texts, images.shape
        self._grouped = prompts.group_index is not None
        finite = images.isfinite().flatten(1).all(1)
        pixels = images.detach().float().nan_to_num().mul_(255).clamp_(0, 255).round_().to(torch.uint8)
        index = [prompts.text_index, *([] if prompts.group_index is None else [prompts.group_index])]
        words = [t.to(images.device).contiguous().view(torch.uint8) for t in index]
        flat = torch.cat([*words, finite.view(torch.uint8), pixels.flatten()])
        self.bytes = flat.numel()
        self._copied: torch.cuda.Event | None = None
        if flat.device.type == "cuda":
            self._flat = torch.empty(flat.shape, dtype=torch.uint8, pin_memory=True)
            self._flat.copy_(flat, non_blocking=True)
            self._copied = torch.cuda.Event(blocking=True)
            self._copied.record()
        else:
            self._flat = flat

    def __len__(self) -> int:
        return self._shape[0]

    def read(self, part: slice = slice(None)) -> tuple[Tensor, PromptRows, Tensor]:
        """The images of ``part``, a copy uint8 [n, 3, H, W]; their prompts; and which of them were finite, bool [n]."""
        if self._copied is not None:
            self._copied.synchronize()
        n, index = len(self), []
        for i in range(1 + self._grouped):
            index.append(self._flat[8 * n * i : 8 * n * (i + 1)].view(torch.int64)[part].clone())
        rest = self._flat[8 * n * len(index) :]
        finite, pixels = rest[:n].view(torch.bool)[part].clone(), rest[n:].view(self._shape)[part].clone()
        return pixels, PromptRows(self._texts, index[0], index[1] if self._grouped else None), finite
