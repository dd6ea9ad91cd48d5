"""What the trainer needs of a model."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor


@dataclasses.dataclass(frozen=True)
class Conditioning:
    """Prompt embeddings of a batch: tensors whose first dimension is the prompt, by the adapter's names."""

    tensors: dict[str, Tensor]

    def rows(self, index: Tensor) -> Conditioning:
        """The prompts ``index`` (int64 vector on the same device), gathered on the device."""
        return Conditioning({name: t.index_select(0, index) for name, t in self.tensors.items()})

    def replaced(self, index: Tensor, other: Conditioning) -> Conditioning:
        """A copy whose prompts ``index`` (int64 vector) are those of ``other``."""
        return Conditioning({name: t.index_copy(0, index, other.tensors[name]) for name, t in self.tensors.items()})


@contextlib.contextmanager
def guided(model: Any, scale: float) -> Iterator[None]:
    """Within it, ``model`` itself guides by ``scale``, not those it made by ``around`` before; 0 changes nothing."""
    if not scale:
        yield
        return
    own, model.guidance = model.guidance, scale
    try:
        yield
    finally:
        model.guidance = own


class PromptEncoder(Protocol):
    """Text to embeddings."""

    def __call__(self, prompts: Sequence[str]) -> Conditioning:
        """Embeddings of N prompts, first dimension N."""


class FlowModel(Protocol):
    """A text-to-image flow model whose transformer is the policy.

    Attributes:
        transformer: the trained module; its trainable parameters require gradients.
        device, dtype: of the transformer.
        latent_shape: (L, C) of one packed latent.
        components: optional; modules by name, transformer included, whose weights a run under adapters stands on.
        start: optional; what its adapters began as, of ``models.starting``; None is zero.
        reference_adapters: optional; tensors by name that ``reference`` swaps in, which checkpoints keep.
        family: optional; its row of ``models.registry``, which says what rollouts may be computed with.
        guidance: optional; the scale at which ``velocity`` guides. Only needed for evaluation.guidance.
        rows_per_image: optional; rows of the transformer that one row of ``velocity`` takes, 2 under classifier-free guidance.
            Whatever counts rows or limits their number counts images.
        encoder: optional; what ``encode`` calls. The memory plan reads its ``capacity``, the prompts whose embeddings it keeps;
            measurements empty it by ``forget``.
    """

    transformer: torch.nn.Module

    @property
    def device(self) -> torch.device: ...
    @property
    def dtype(self) -> torch.dtype: ...
    @property
    def latent_shape(self) -> tuple[int, int]: ...

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """Embeddings of N prompts, first dimension N."""

    def resize(self, height: int, width: int) -> None:
        """Sample pictures of this size, in pixels, from now on; ``latent_shape`` follows. Only needed for model.buckets."""

    def schedule(self, steps: int, height: int, width: int) -> Tensor:
        """Noise levels [steps + 1], falling to 0, at which the model's own pipeline samples pictures of this size; host only.
        Only needed for rollout.shift = model."""

    def around(self, transformer: torch.nn.Module) -> FlowModel:
        """This model around another transformer of the same architecture. Only needed for engine.forward and precision."""

    def velocity(self, x: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        """Velocity (noise minus clean) [R, L, C] in the model's dtype at latents [R, L, C], noise levels [R]."""

    def decode(self, x: Tensor) -> Tensor:
        """Images [R, 3, H, W] in [0, 1] from clean latents [R, L, C]."""

    def keep_reference(self) -> None:
        """Remember the present weights for ``reference``."""

    def reference(self) -> AbstractContextManager[None]:
        """Within it, ``velocity`` is that of the weights ``keep_reference`` saw."""

    def save_portable(self, folder: Path) -> None:
        """Write the trained weights in the layout diffusers loads."""

    def load_portable(self, folder: Path) -> None:
        """Inverse of ``save_portable``, in place."""

    def trainable(self) -> Iterator[tuple[str, torch.nn.Parameter]]:
        """Named parameters the optimizer updates."""

    def export(self, folder: Path, shift: float | str, steps: int) -> str:
        """Write what stock diffusers needs to sample in ``steps`` with time shift ``shift``, or at the ``model``'s own noise
        levels; returns Python that does."""
