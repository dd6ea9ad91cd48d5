"""What rewards hold and use: weights wherever in a reward they are, and the activations of the largest call."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..rewards.base import PromptRows
from ..rewards.holdings import placed_on, weights_of
from .counting import PeakMemory, tensor_bytes
from .memory import Entry
from .rehearsal import fused_attention

OFFLOADED = "rewards.N.offload = true"


@dataclasses.dataclass(frozen=True)
class ScorerDemand:
    """A reward as the memory plan sees it.

    Attributes:
        label: its name, unlike that of any other.
        reward: itself; instead of one that is not loaded the bytes of its weights, or None if they are not known.
        device: where it works, if that is not the model's device.
        rows: images per call.
        offload: its weights are on the device only while something is scored.
    """

    label: str
    reward: object
    device: str = ""
    rows: int = 1
    offload: bool = False


def scorer_entries(
    demands: Sequence[ScorerDemand], device: torch.device, chunk: int, size: tuple[int, int], overlapped: bool = False
) -> list[Entry]:
    """Entries of the plan: weights (shared ones once), and what the largest call of each reward holds beside them.

    Offloaded weights are there while pictures are decoded and scored.

    Args:
        device: of the model.
        chunk: pictures that are decoded, and handed to the rewards, at once.
        size: height and width of the largest pictures.
        overlapped: a chunk is scored while the next one is sampled.
    """
    entries: list[Entry] = []
    seen: dict[int, str] = {}
    away: list[Entry] = []
    for demand in demands:
        place = "" if placed_on(demand.device, device) == device else demand.device
        weights = dataclasses.replace(_weights(demand, seen, torch.device(place or device)), device=place)
        if demand.offload and not place and device.type != "cpu":
            away.append(weights)
        else:
            entries.append(weights)
        peak = activations(demand.reward, demand.rows, size)
        if isinstance(peak, str):
            words = f"; {peak}" if peak else ""
            known = away if weights in away else entries
            known[-1] = dataclasses.replace(weights, why=weights.why + words)
            continue
        pictures = 4 * 3 * size[0] * size[1]
        why = f"{demand.rows} pictures and what is worked out of them, run on meta tensors; {chunk} decoded"
        remedy = "rewards.N.rows or engine.decode_rows"
        phase = "" if place else f"reward {demand.label}"
        entries.append(Entry("activations", peak + pictures * chunk, why, phase, 0, remedy, place))
    scoring = [entry for entry in entries if entry.phase]
    if overlapped and scoring:
        most = max(scoring, key=lambda entry: entry.bytes)
        why = "of the chunk before (engine.overlap)"
        entries.append(dataclasses.replace(most, name=f"{most.phase} meanwhile", why=why, phase="rollout"))
    phases = ["decode", *(entry.phase for entry in scoring), *["rollout"] * overlapped]
    for entry in away:
        why = f"{entry.why}; offloaded"
        entries += [dataclasses.replace(entry, phase=phase, loaded=0, remedy="", why=why) for phase in phases]
    return entries


def _weights(demand: ScorerDemand, seen: dict[int, str], device: torch.device) -> Entry:
    reward, name = demand.reward, f"reward {demand.label}"
    if reward is None or isinstance(reward, int):
        size = reward or 0
        why = (
            "its published size; not loaded here, and its activations not counted"
            if reward
            else "not loaded here: size not known"
        )
        return Entry(name, size, why, remedy=OFFLOADED if size else "")
    tensors = weights_of(reward)
    fresh = [t for t in tensors if id(t) not in seen]
    others = dict.fromkeys(seen[id(t)] for t in tensors if id(t) in seen)
    seen |= {id(t): demand.label for t in fresh}
    why = "weights" if fresh else "no weights of its own" if others else "no weights"
    why += f"; shared with {', '.join(others)}" if others else ""
    loaded = tensor_bytes(t for t in fresh if t.device.type == device.type)
    return Entry(name, tensor_bytes(fresh), why, "", loaded, OFFLOADED if fresh else "")


def activations(reward: object, rows: int, size: tuple[int, int]) -> int | str:
    """Bytes that a call with ``rows`` images needs at most beside weights and images; or why they are not known, empty where
    there is nothing on the device to know.

    A reward may tell them (``activation_bytes(rows, height, width)``), or be ``rehearsable``: a copy of it whose tensors are on
    the meta device can be called there.
    """
    if reward is None or isinstance(reward, int) or getattr(reward, "host", False):
        return ""
    told = getattr(reward, "activation_bytes", None)
    if callable(told):
        return int(told(rows, *size))
    if not weights_of(reward):
        return ""
    if not getattr(reward, "rehearsable", False):
        return "its activations are not known"
    try:
        shadow: Any = _on_meta(reward)
        images = torch.empty(rows, 3, *size, device="meta")
        prompts = PromptRows(["a picture"], torch.zeros(rows, dtype=torch.int64, device="meta"))
        with torch.no_grad(), fused_attention(), PeakMemory("meta") as memory:
            shadow(images, prompts)
    except Exception as error:
        return f"its activations are not known ({type(error).__name__} on meta tensors)"
    return memory.peak


def _on_meta(reward: object) -> object:
    """A copy whose tensors, wherever they are, are on the meta device."""
    memo: dict[int, Any] = {}
    kept: list[Tensor] = weights_of(reward)
    for t in kept:
        shadow = torch.empty_like(t, device="meta")
        memo[id(t)] = nn.Parameter(shadow, t.requires_grad) if isinstance(t, nn.Parameter) else shadow
    return copy.deepcopy(reward, memo)
