"""The rollout copy: the policy's weights once more, in static storage, in the precision rollouts use."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import RunError
from .projection import Projection

BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


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
        self._policy, self._named, self._proven = transformer, projections, False
        self._replaced = tuple(f"{name}." for name in projections)
        memo: dict[int, object] = {}
        sources: list[tuple[Tensor, nn.Parameter]] = []
        self.own_bytes = sum(p.own_bytes for p in self.projections)
        for name, p in transformer.named_parameters():
            same = p.dtype is dtype
            if name.startswith(self._replaced):
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
        self._kept = {name: t for name, t in _tensors(self.transformer) if not name.startswith(self._replaced)}
        self._sources: list[Tensor] = [p for p, _ in sources]
        self._twins: list[Tensor] = [twin for _, twin in sources]

    def refresh(self) -> None:
        """Follow the policy: what training changes is rewritten in place, addresses stay.

        The first time that a weight of the policy has moved, the copy must then be, bit for bit, what would be built anew:
        rollouts of a copy that does not follow look like a policy that does not learn. Until then the device is read once
        at each call (two of a run's iterations, as a rule), and never after.

        Raises:
            RunError: it is not, naming a tensor.
        """
        if self._proven or next(self._policy.parameters()).is_meta:
            self._follow()
            return
        moved = self._differing()
        self._follow()
        stale = self._differing()
        flags = torch.stack([*moved.values(), *stale.values()]).tolist()
        wrong = [name for name, differs in zip(stale, flags[len(moved) :], strict=True) if differs]
        if wrong:
            raise RunError(
                f"the rollout copy does not follow the policy: {wrong[0]}{f' and {len(wrong) - 1} more' if wrong[1:] else ''} "
                "differ from a copy built anew; use engine.forward = eager with engine.precision = auto, and report this"
            )
        self._proven = any(flags)

    @torch.no_grad()
    def _follow(self) -> None:
        if self._twins:
            torch._foreach_copy_(self._twins, self._sources)
        for projection in self.projections:
            projection.refresh()

    @torch.no_grad()
    def _differing(self) -> dict[str, Tensor]:
        """By name, 0-dim bool: whether a tensor is not what a copy built now would hold; one at a time, to take no memory."""
        found: dict[str, Tensor] = {}
        for name, t in _tensors(self._policy):
            if not name.startswith(self._replaced):
                mine = self._kept.get(name)
                found[name] = _unequal(mine, t if mine is None or mine.dtype is t.dtype else t.to(mine.dtype))
        for projection in self.projections:
            layers = "+".join(name for name, p in self._named.items() if p is projection)
            held = dict(projection.named_buffers())
            found |= {f"{layers}: {name}": _unequal(held.get(name), t) for name, t in projection.rebuilt().named_buffers()}
        return found


def _tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters()
    yield from module.named_buffers()


def _unequal(a: Tensor | None, b: Tensor) -> Tensor:
    """0-dim bool: whether any bit differs; NaN is equal to itself."""
    if a is None or a.shape != b.shape or a.dtype is not b.dtype:
        return torch.ones((), dtype=torch.bool, device=b.device)
    if a.data_ptr() == b.data_ptr() and a.stride() == b.stride():
        return torch.zeros((), dtype=torch.bool, device=b.device)
    bits = BITS[a.element_size()]
    return (a.detach().view(bits) != b.detach().view(bits)).any()
