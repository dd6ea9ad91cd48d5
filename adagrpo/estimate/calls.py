"""The batched calls of an iteration, told by the objects that will run it."""

from __future__ import annotations

from collections.abc import Sequence

from ..curriculum.base import Leg
from ..engine.plans import chunk_sizes
from ..engine.sampling import Sampler, Tails
from ..engine.share import Share
from ..engine.update import Objective


def iteration_calls(
    legs: Sequence[Leg],
    sampler: Sampler,
    objective: Objective,
    slots: int,
    tails: Tails | None = None,
    max_rows: int = 0,
    decode_rows: int = 0,
    iteration: int | None = None,
) -> dict[str, list[int]]:
    """Rows of each call by phase: of the transformer, and of the decoder under ``decode``.

    Args:
        legs: of the judge (``Judge.legs``).
        tails: shortened ones, ``RolloutTable.tails``.
        max_rows, decode_rows: largest batches of the transformer and of the decoder; 0 is unlimited.
        iteration: counted from 0; None is one that runs as much as any.
    """
    calls = {"probe": [rows for leg in legs for rows in leg.plan().calls(max_rows)]} if legs else {}
    update = [batch.numel() for step in sampler.batches(slots, max_rows) for batch in step]
    if sampler.fresh_velocity:
        calls["prefix"] = update
    plan = sampler.plan(Share.alone(slots), tails, iteration)
    anchors = sampler.anchor_plan(slots)
    calls["rollout"] = [*(anchors.calls(max_rows) if anchors else ()), *plan.calls(max_rows)]
    calls["decode"] = decoded([*(rows for leg in legs for rows in leg.scored), plan.num_rows], max_rows, decode_rows)
    return calls | dict.fromkeys(objective.replays, update)


def decoded(rows: Sequence[int], max_rows: int, decode_rows: int) -> list[int]:
    """Sizes of the decoder's batches of ``rows`` latents each, which the transformer finishes in batches of its own."""
    return [n for each in rows for chunk in chunk_sizes(each, max_rows) for n in chunk_sizes(chunk, decode_rows)]
