"""The rollout copy: the policy's weights once more, in static storage, in the precision rollouts use."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .projection import Projection


class RolloutCopy:
    """A transformer for no-grad use whose weights follow the policy's by ``refresh``, in place.

    What training changes is copied; what is frozen and in the same precision is shared. Checkpoint keys of the policy are
    untouched, and dropping the copy undoes everything.

    Args:
        transformer: the policy's.
        dtype: of the copy.
        projections: what stands for linear layers of the policy, by the name of each layer it stands for; their weights are
            not copied.

    Attributes:
        transformer: the copy; the layers in ``projections`` are empty and for the caller to fill.
    """

    def __init__(self, transformer: nn.Module, dtype: torch.dtype, projections: Mapping[str, Projection]) -> None:
        self.projections = list({id(p): p for p in projections.values()}.values())
        replaced = tuple(f"{name}." for name in projections)
        memo: dict[int, object] = {}
        sources: list[tuple[Tensor, nn.Parameter]] = []
        self.own_bytes = sum(p.own_bytes for p in self.projections)
        for name, p in transformer.named_parameters():
            same = p.dtype is dtype
            if name.startswith(replaced):
                memo[id(p)] = nn.Parameter(torch.empty_like(p, device="meta"), requires_grad=False)
            elif same and not p.requires_grad:
                memo[id(p)] = p
            else:
                twin = nn.Parameter(p.detach().to(dtype, copy=True), requires_grad=False)
                memo[id(p)] = twin
                self.own_bytes += twin.numel() * twin.element_size()
                if p.requires_grad:
                    sources.append((p, twin))
        for b in transformer.buffers():
            memo[id(b)] = b.to(dtype) if b.is_floating_point() and b.dtype is not dtype else b
        self.transformer: Any = copy.deepcopy(transformer, memo).eval()
        self._sources: list[Tensor] = [p for p, _ in sources]
        self._twins: list[Tensor] = [twin for _, twin in sources]

    @torch.no_grad()
    def refresh(self) -> None:
        """Follow the policy: what training changes is rewritten in place, addresses stay."""
        if self._twins:
            torch._foreach_copy_(self._twins, self._sources)
        for projection in self.projections:
            projection.refresh()
