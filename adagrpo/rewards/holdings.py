"""What a reward holds: modules and tensors, wherever in it they are."""

from __future__ import annotations

import functools
import types
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

_MOST = 10**5
_LEAVES = (str, bytes, bool, int, float, complex, type, types.ModuleType, torch.device, torch.dtype)


def reachable(owner: object) -> tuple[list[nn.Module], list[Tensor]]:
    """Outermost modules, and tensors outside of modules, that ``owner`` reaches, each once.

    Looked through are attributes, containers, closures, the globals that a function names, bound methods and partial functions.
    """
    modules: list[nn.Module] = []
    tensors: list[Tensor] = []
    seen: set[int] = set()
    waiting: list[object] = [owner]
    while waiting and len(seen) < _MOST:
        value = waiting.pop()
        if isinstance(value, _LEAVES) or value is None or id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, nn.Module):
            modules.append(value)
        elif isinstance(value, Tensor):
            tensors.append(value)
        else:
            waiting += _inside(value)
    inner = {id(part) for module in modules for part in module.modules() if part is not module}
    return [module for module in modules if id(module) not in inner], tensors


def _inside(value: Any) -> Iterator[object]:
    if isinstance(value, Mapping):
        yield from list(value.values())
    elif isinstance(value, list | tuple | set | frozenset):
        yield from value
    elif isinstance(value, functools.partial):
        yield from (value.func, *value.args, *value.keywords.values())
    elif isinstance(value, types.MethodType):
        yield value.__self__
    elif isinstance(value, types.FunctionType):
        yield from (value.__globals__[name] for name in value.__code__.co_names if name in value.__globals__)
        for cell in value.__closure__ or ():
            try:
                yield cell.cell_contents
            except ValueError:  # not assigned yet
                continue
    if not isinstance(value, types.FunctionType):
        yield from list(getattr(value, "__dict__", {}).values())


def weights_of(owner: object) -> list[Tensor]:
    """Parameters, buffers and other tensors that ``owner`` reaches, each once."""
    modules, tensors = reachable(owner)
    found = [t for module in modules for t in (*module.parameters(), *module.buffers())]
    return list({id(t): t for t in [*found, *tensors]}.values())


def placed_on(name: str, home: torch.device) -> torch.device:
    """The device that a recipe names; ``home``, the model's, where that is the same one: empty, or ``cuda`` for ``cuda:N``."""
    device = torch.device(name) if name else home
    same = device.type == home.type and device.index in (None, home.index or 0)
    return home if same else device


class Offloaded:
    """Weights that wait in the host's memory (pinned, for CUDA) and come to the device to work; they must not change.

    Args:
        owner: the weights are those of the modules that it reaches.
    """

    def __init__(self, owner: object) -> None:
        modules, _ = reachable(owner)
        tensors = {id(t): t for module in modules for t in (*module.parameters(), *module.buffers())}
        self._weights = [(t, t.data.cpu()) for t in tensors.values()]
        self.here: torch.device | None = None

    def bring(self, device: torch.device) -> None:
        """To ``device``, unless they are there; all of them, or none if its memory runs out."""
        if self.here == device:
            return
        if device.type == "cuda":
            self._weights = [(t, home if home.is_pinned() else home.pin_memory()) for t, home in self._weights]
        self.here = None
        try:
            for t, home in self._weights:
                t.data = home.to(device, non_blocking=True)
            self.here = device
        finally:
            if self.here is None:  # half of them would only be in the way of a second try
                self.leave()

    def leave(self) -> None:
        """Off the device; nothing is copied."""
        for t, home in self._weights:
            t.data = home
        self.here = None
