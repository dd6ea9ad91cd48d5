"""What a plan produces: final latents, what was kept on the way, and the stored stochastic steps."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor


@dataclasses.dataclass(frozen=True)
class Transitions:
    """Stored stochastic steps: N latents with G successors each, after rounding to the storage dtype.

    Attributes:
        latent: [N, L, C], x_k.
        successors: [N, G, L, C].
        mean: [N, L, C], compute dtype.
        logp: [N, G], compute dtype.
        index: int64 [N], row of the step table.
        slot: int64 [N], row of the conditioning batch.
        sample: int64 [N, G], the rollout row (final image) each successor led to.
    """

    latent: Tensor
    successors: Tensor
    mean: Tensor
    logp: Tensor
    index: Tensor
    slot: Tensor
    sample: Tensor

    def rows(self, index: Tensor) -> Transitions:
        """The transitions ``index``, an int64 vector on their device."""
        fields = (f.name for f in dataclasses.fields(self))
        return Transitions(**{name: getattr(self, name).index_select(0, index) for name in fields})

    def with_logp(self, logp: Tensor) -> Transitions:
        """The same transitions with other stored log-probabilities."""
        return dataclasses.replace(self, logp=logp)


@dataclasses.dataclass(frozen=True)
class Rollout:
    """What a plan produced, in the plan's row order.

    Attributes:
        final: [R, L, C], latents after the last step.
        latents, velocities: [R, L, C] at each step of ``plan.keep``.
        transitions: steps of ``plan.record``, ordered (row, step); None without any.
    """

    final: Tensor
    latents: dict[int, Tensor]
    velocities: dict[int, Tensor]
    transitions: Transitions | None


def merged(parts: list[Rollout], rows: Tensor, recorded: int) -> Rollout:
    """Chunks of a rollout put together in the plan's order.

    Args:
        rows: int64 [R], the places of their rows in the plan.
        recorded: how many steps of each row are stored.
    """
    undo = torch.argsort(rows)
    order = lambda tensors: torch.cat(list(tensors)).index_select(0, undo)  # noqa: E731
    by_step = lambda kept: {k: order(getattr(part, kept)[k] for part in parts) for k in getattr(parts[0], kept)}  # noqa: E731
    transitions = None
    if parts[0].transitions is not None:
        steps = torch.arange(recorded, device=rows.device)
        moved = (undo.unsqueeze(1) * recorded + steps).flatten()
        fields = (f.name for f in dataclasses.fields(Transitions))
        transitions = Transitions(
            **{name: torch.cat([getattr(part.transitions, name) for part in parts]) for name in fields}
        ).rows(moved)
    return Rollout(order(part.final for part in parts), by_step("latents"), by_step("velocities"), transitions)
