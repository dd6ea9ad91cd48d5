"""A second verifiable reward of the built-in world, which pulls against the first: little colour."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_DARK, _COLOURED = 0.15, 0.75  # brightest channel of what is surely background, and of what surely is not


class SmallArea:
    """Share of a picture that is left dark, [N] in [0, 1]; ignores the prompts.

    A pixel counts as coloured by its brightest channel: not at all up to 0.15, wholly from 0.75 on (the background is
    0.08, every colour of the palette reaches 0.8), in proportion between the two. A picture with a non-finite pixel scores NaN.
    """

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Images [N, 3, H, W] float in [0, 1] -> scores [N] float32."""
        brightest = images.float().amax(1)
        coloured = ((brightest - _DARK) / (_COLOURED - _DARK)).clamp(0, 1).mean((1, 2))
        return torch.where(images.isfinite().flatten(1).all(1), 1 - coloured, torch.nan)
