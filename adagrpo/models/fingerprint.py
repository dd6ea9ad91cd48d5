"""Which weights a run began from, in a few values of every tensor: adapters and checkpoints mean nothing on others."""

from __future__ import annotations

import hashlib
import operator
import re
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

VALUES = 64  # per tensor
_ADAPTER = re.compile(r"\.lora_\w+\.|\.lora_magnitude_vector")

LEVELS = "noise levels"
_CLOSE = 2e-6  # what another processor may round levels by, and their text

Fingerprint = dict[str, dict[str, str]]
"""Component -> tensor -> shape, and a hash of sampled values; under ``LEVELS`` a rollout's size and steps -> its levels."""


def base_components(model: Any) -> dict[str, nn.Module]:
    """The modules of a ``FlowModel`` by name: its ``components`` if it has them, else the transformer."""
    return dict(getattr(model, "components", None) or {"transformer": model.transformer})


@torch.no_grad()
def fingerprint(components: Mapping[str, nn.Module]) -> Fingerprint:
    """Of every tensor that is no adapter's: shape, and a hash of 64 values at fixed places (all, if it has fewer).

    Values are of the dtype they were loaded in, so that neither device nor the files' layout matters. Each component's are
    gathered on its device and copied to the host at once. Modules on the meta device have none.
    """
    return {part: _of_module(module) for part, module in components.items()}


def difference(recorded: Fingerprint, found: Fingerprint, carried: Mapping[str, Collection[str]]) -> str | None:
    """What two bases differ in: component, tensor and how; None if they are the same.

    Args:
        carried: per component the tensors that a checkpoint brings along, whose base is of no matter.
    """
    for part, tensors in recorded.items():
        ours, skipped = found.get(part, {}), carried.get(part, ())
        same = _same_levels if part == LEVELS else operator.eq
        differing = [name for name, value in tensors.items() if name not in skipped and not same(value, ours.get(name))]
        if differing and part == LEVELS:
            name = differing[0]
            return f"{part} of {name}: {tensors[name]} there, {ours.get(name, 'none')} here"
        if differing:
            name = differing[0]
            more = f" and {len(differing) - 1} more tensors" if len(differing) > 1 else ""
            return f"{part}: {name}{more}: {_how(tensors[name], ours.get(name))}"
    return None


def levels_print(levels: Mapping[str, Tensor]) -> Fingerprint:
    """Of noise levels that a run takes from its model, by what samples at them; nothing of none."""
    told = {name: " ".join(f"{level:.6f}" for level in found.tolist()) for name, found in levels.items()}
    return {LEVELS: told} if told else {}


def trained_names(model: Any) -> dict[str, set[str]]:
    """Per component the tensors of the base that a ``FlowModel`` trains: a fully tuned transformer's, none under adapters."""
    return {"transformer": {_plain(name) for name, _ in model.trainable() if not _ADAPTER.search(name)}}


def _of_module(module: nn.Module) -> dict[str, str]:
    tensors = {name: t for name, t in module.state_dict().items() if isinstance(t, Tensor) and not _ADAPTER.search(name)}
    tensors = {name: t.detach() for name, t in tensors.items() if not t.is_meta}
    by_dtype: dict[torch.dtype, list[str]] = {}
    for name, t in tensors.items():
        by_dtype.setdefault(t.dtype, []).append(name)
    found = {}
    for names in by_dtype.values():
        samples = [_samples(tensors[name]) for name in names]
        values = torch.cat(samples).cpu().split([len(s) for s in samples])
        for name, sample in zip(names, values, strict=True):
            digest = hashlib.sha256(sample.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()[:16]
            found[name] = f"{'x'.join(map(str, tensors[name].shape)) or 'scalar'} {digest}"
    return {_plain(name): found[name] for name in tensors}


def _samples(tensor: Tensor) -> Tensor:
    """Up to 64 values spread over a tensor; an odd step, so that they do not all fall into one column."""
    flat = tensor.reshape(-1)
    step = max(1, (flat.numel() - 1) // (VALUES - 1))
    return flat[:: step - (step % 2 == 0)][:VALUES]


def _same_levels(recorded: str, found: str | None) -> bool:
    """Whether they are equal to rounding."""
    try:
        one, other = ([float(level) for level in text.split()] for text in (recorded, found or ""))
    except (ValueError, AttributeError):  # a damaged record
        return False
    return len(one) == len(other) and all(abs(a - b) <= _CLOSE for a, b in zip(one, other, strict=True))


def _plain(name: str) -> str:
    """The name without what adapters put around it."""
    return name.replace(".base_layer.", ".")


def _how(recorded: str, found: str | None) -> str:
    if found is None:
        return "missing here"
    shapes = recorded.split(" ")[0], found.split(" ")[0]
    return "other values" if shapes[0] == shapes[1] else f"{shapes[0]} there, {shapes[1]} here"
