"""Text to embeddings, for every family: a pipeline's own encoders behind a cache, random ones, and shapes alone."""

from __future__ import annotations

import math
import zlib
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..algorithm.sde import philox_normal
from .base import Conditioning

Shapes = Mapping[str, tuple[int, ...]]
"""Of one prompt's tensors, by their names in ``Conditioning``."""


class PipelineEncoder:
    """A pipeline's text encoders behind a bounded least-recently-used cache.

    Prompts are encoded one by one: an embedding then never depends on which prompts happened to share its batch, which a
    resumed run with an empty cache could not repeat.

    Args:
        embed: (pipeline, prompt, max_tokens) -> tensors whose first dimension is 1, in the order of ``keys``.
        capacity: prompts the cache holds.
    """

    def __init__(
        self,
        pipeline: Any,
        embed: Callable[[Any, str, int], Sequence[Tensor]],
        keys: Sequence[str],
        max_tokens: int,
        capacity: int,
    ) -> None:
        self.pipeline, self.embed, self.keys = pipeline, embed, keys
        self.max_tokens, self.capacity = max_tokens, capacity
        self._cache: OrderedDict[str, Sequence[Tensor]] = OrderedDict()

    @torch.no_grad()
    def __call__(self, prompts: Sequence[str]) -> Conditioning:
        found = [self._one(prompt) for prompt in prompts]
        return Conditioning({key: torch.cat(each) for key, each in zip(self.keys, zip(*found, strict=True), strict=True)})

    def forget(self) -> None:
        """Empty the cache."""
        self._cache.clear()

    def _one(self, prompt: str) -> Sequence[Tensor]:
        if prompt in self._cache:
            self._cache.move_to_end(prompt)
            return self._cache[prompt]
        found = self._cache[prompt] = self.embed(self.pipeline, prompt, self.max_tokens)
        if len(self._cache) > self.capacity:
            self._cache.popitem(last=False)
        return found


class RandomEncoder:
    """Embeddings drawn from the prompt's checksum: the same prompt always gives the same tensors."""

    def __init__(self, shapes: Shapes, dtype: torch.dtype, device: torch.device) -> None:
        self.shapes, self.dtype, self.device = shapes, dtype, device

    def __call__(self, prompts: Sequence[str]) -> Conditioning:
        seeds = [zlib.crc32(prompt.encode()) for prompt in prompts]
        found = {}
        for number, (key, shape) in enumerate(self.shapes.items()):
            rows = torch.arange(math.prod(shape[:-1]), device=self.device)
            draws = [philox_normal(seed, rows, shape[-1], number, 0) for seed in seeds]
            found[key] = torch.stack(draws).reshape(len(prompts), *shape).to(self.dtype)
        return Conditioning(found)


class ShapeEncoder:
    """Embeddings without content, on the meta device.

    Attributes:
        capacity: prompts the real encoder's cache holds.
    """

    def __init__(self, shapes: Shapes, dtype: torch.dtype, capacity: int) -> None:
        self.shapes, self.dtype, self.capacity = shapes, dtype, capacity

    def __call__(self, prompts: Sequence[str]) -> Conditioning:
        make = lambda shape: torch.empty(len(prompts), *shape, dtype=self.dtype, device="meta")  # noqa: E731
        return Conditioning({key: make(shape) for key, shape in self.shapes.items()})
