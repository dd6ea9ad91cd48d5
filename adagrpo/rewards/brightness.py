"""The simplest reward there is: mean brightness. For plumbing, benchmarks and examples, never for a real run."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor


class Brightness:
    """Mean of all pixels, [N] in [0, 1]; ignores the prompts."""

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return images.float().mean((1, 2, 3))
