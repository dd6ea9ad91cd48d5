"""What computes the velocities of a rollout: the policy itself, or a faster copy of it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Protocol

import torch
from torch import Tensor, nn

from ..algorithm.tables import RolloutTable
from ..models.base import Conditioning, FlowModel
from .compiling import Compilation, Say
from .projection import Projection, choose_quantise, fits_fp8, linear_layers
from .rollout_copy import RolloutCopy

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(q, k, v [R, L, H, D]) -> [R, L, H, D]."""


class Forward(Protocol):
    """A no-grad velocity.

    Attributes:
        lossy: not the policy's arithmetic up to rounding in its own precision: its velocities may move a reward, never
            enter a log-probability.
        own_bytes: memory held beside the policy.
    """

    lossy: bool
    own_bytes: int

    def refresh(self) -> None:
        """Follow the policy's weights, in place."""

    def prepare(self, conditioning: Conditioning) -> Conditioning:
        """What the calls of one rollout share, computed once: tensors whose first dimension is the prompt."""

    def velocity(self, x: Tensor, index: Tensor, prepared: Conditioning, slot: Tensor) -> Tensor:
        """Velocity [R, L, C] at latents [R, L, C], table rows ``index`` [R], for prompts ``slot`` [R] of ``prepared``."""


class PolicyForward:
    """The policy's own weights, precision and kernels: what the update differentiates."""

    lossy, own_bytes = False, 0

    def __init__(self, model: FlowModel, table: RolloutTable) -> None:
        self.model, self.table = model, table

    def refresh(self) -> None:
        """Nothing to follow."""

    def prepare(self, conditioning: Conditioning) -> Conditioning:
        """The embeddings as they are."""
        return conditioning

    def velocity(self, x: Tensor, index: Tensor, prepared: Conditioning, slot: Tensor) -> Tensor:
        """See ``Forward``."""
        return self.model.velocity(x, self.table.steps.sigma.index_select(0, index), prepared.rows(slot))


class CopyForward(PolicyForward):
    """The library's forward over a rollout copy, optionally FP8, optionally compiled block by block.

    Args:
        model: the policy, which can put itself ``around`` another transformer.
        dtype: of the copy.
        scaling: of FP8, ``rowwise`` or ``tensorwise``; None keeps ``dtype``.
        compiled: torch.compile of every block, in place in the copy.
        compiler: torch.compile's backend.
        impl: of the quantisation kernel.
        say: told when the blocks cannot be compiled, which then run uncompiled; None makes that an error.
    """

    def __init__(
        self,
        model: FlowModel,
        table: RolloutTable,
        dtype: torch.dtype,
        scaling: str | None = None,
        compiled: bool = False,
        compiler: str = "inductor",
        impl: str | None = None,
        say: Say | None = None,
    ) -> None:
        projections: Mapping[str, Projection] = {}
        if scaling is not None:
            quantise = choose_quantise(scaling, compiled, impl)
            projections = {
                name: Projection([layer], dtype, quantise, scaling)
                for name, layer in linear_layers(model.transformer)
                if is_quantised(name) and fits_fp8(layer)
            }
        self.copy = RolloutCopy(model.transformer, dtype, projections)
        for name, projection in projections.items():
            self.copy.transformer.set_submodule(name, projection)
        super().__init__(model.around(self.copy.transformer), table)
        self.lossy = scaling is not None or dtype is not model.dtype
        self.own_bytes = self.copy.own_bytes
        self._compilation: Compilation | None = None
        if compiled:  # the blocks of a kind share one graph per shape, and a break is an error
            self.copy.transformer.compile_repeated_blocks(fullgraph=True, dynamic=False, backend=compiler)
            undo = functools.partial(_plain_blocks, self.copy.transformer)
            self._compilation = Compilation("engine.forward = compile: the blocks", undo, say)

    def refresh(self) -> None:
        """Follow the policy's weights, in place."""
        self.copy.refresh()

    def velocity(self, x: Tensor, index: Tensor, prepared: Conditioning, slot: Tensor) -> Tensor:
        """See ``Forward``.

        Raises:
            RunError: a block cannot be compiled, and nobody is to be told.
        """
        run = functools.partial(super().velocity, x, index, prepared, slot)
        return run() if self._compilation is None else self._compilation(run)


def is_quantised(name: str) -> bool:
    """Whether FP8 takes the linear layer of this name: those inside repeated blocks, without their modulations.

    Biases, norms, embedders, modulation and the final projection stay in the model's precision: they are little work and
    carry what is most sensitive.
    """
    parts = name.split(".")
    return any(part.endswith("blocks") for part in parts) and not any(part.startswith("norm") for part in parts)


def _plain_blocks(transformer: nn.Module) -> None:
    """Undo ``compile_repeated_blocks``."""
    for module in transformer.modules():
        module._compiled_call_impl = None
