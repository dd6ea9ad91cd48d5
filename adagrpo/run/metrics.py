"""The metrics of an iteration as numbers, and what it took."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..rewards import PromptRows
from ..train import Trainer

WAITED = "ranks/waited_seconds"
"""Of one rank, before the records of all are one."""


def read_metrics(metrics: Mapping[str, Any]) -> tuple[dict[str, float], list[str]]:
    """Metrics that are tensors or numbers, as numbers, and the picked prompts: the one copy to the host of an iteration."""
    picked: PromptRows = metrics["selection/picked"]
    tensors = {name: value for name, value in metrics.items() if isinstance(value, Tensor)}
    values = [value.detach().double().reshape(1) for value in tensors.values()]
    read = torch.cat([*values, picked.text_index.double()]).tolist()
    numbers = {name: float(value) for name, value in metrics.items() if isinstance(value, int | float)}
    texts = [picked.texts[int(i)] for i in read[len(tensors) :]]
    return dict(zip(tensors, read, strict=False)) | numbers, texts


def performance(trainer: Trainer, seconds: float) -> dict[str, float]:
    """What the last iteration, of ``seconds``, took: time by phase, counted work, and on CUDA memory in bytes."""
    phases = trainer.phase.read()
    record = {"perf/seconds": seconds}
    record |= {f"perf/{phase}_seconds": spent for phase, spent in phases.items()}
    record["perf/other_seconds"] = max(0.0, seconds - sum(phases.values()))
    if trainer.ranks.size > 1:
        record[WAITED] = trainer.ranks.beat.read_waited()
    record |= trainer.score.seconds()
    for phase, count in trainer.executor.counts.items():
        record |= {f"perf/{phase}_evaluations": count.evaluations, f"perf/{phase}_calls": count.calls}
    if trainer.model.device.type == "cuda":
        if trainer.executor.graphs is not None:
            record["mem/graph_bytes"] = trainer.executor.graphs.pool_bytes
        record["mem/peak_bytes"] = torch.cuda.max_memory_allocated(trainer.model.device)
    return record


def of_all_ranks(records: Sequence[dict[str, float]]) -> dict[str, float]:
    """One record from those of all ranks: the first one's, with the work and the failures of all, and the most memory."""
    found = dict(records[0])
    for record in records[1:]:
        for name, value in record.items():
            if (name.startswith("perf/") and name.endswith("_evaluations")) or "/failed_" in name:
                found[name] = found.get(name, 0.0) + value
            elif name.startswith("mem/"):
                found[name] = max(found[name], value)
    found.pop(WAITED, None)
    return found | (_spread(records) if len(records) > 1 else {})


def _spread(records: Sequence[dict[str, float]]) -> dict[str, float]:
    """How far apart the seconds of the ranks lie by phase, and who the others waited for: the rank that waited least."""
    found: dict[str, float] = {}
    for name in sorted({name for record in records for name in record if name.endswith("_seconds")}):
        values = [record.get(name, 0.0) for record in records]
        of = f"ranks/{name.partition('/')[2]}"
        found |= {f"{of}_min": min(values), f"{of}_median": statistics.median(values), f"{of}_max": max(values)}
    waited = [record[WAITED] for record in records]
    return found | {"ranks/slowest": float(waited.index(min(waited)))}


def reward_words(record: Mapping[str, Any]) -> str:
    """Seconds and failures of each reward, for the console; empty where one reward scored every image."""
    prefix, suffix = "perf/reward/", "/seconds"
    names = [key.removeprefix(prefix).removesuffix(suffix) for key in record if key.startswith(prefix)]
    failed = {name: record.get(f"reward/{name}/failed", 0.0) for name in names}
    if len(names) < 2 and not any(failed.values()):
        return ""
    shares = {name: f", {share:.1%} failed" if share else "" for name, share in failed.items()}
    return "; " + "; ".join(f"{name} {record[f'{prefix}{name}{suffix}']:.2f} s{shares[name]}" for name in names)


def is_finite(record: Mapping[str, Any]) -> bool:
    """Whether the iteration left weights that can be gone on from."""
    return math.isfinite(record["policy/loss"]) and math.isfinite(record["policy/grad_norm"])
