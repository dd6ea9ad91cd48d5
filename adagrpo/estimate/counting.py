"""What a computation costs, counted instead of timed: operators, bytes they move, copies to the device, peak memory.

On meta tensors all of this runs at full size in seconds, without the memory and without the device.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_FROM_HOST_DATA = (torch.tensor, torch.as_tensor)


def module_tensors(module: torch.nn.Module) -> Iterator[Tensor]:
    """Parameters and buffers of a module, shared ones once."""
    yield from module.parameters()
    yield from module.buffers()


def tensor_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the elements of ``tensors``."""
    return sum(t.numel() * t.element_size() for t in tensors)


class OpCounter(TorchDispatchMode):
    """Counts the aten operators run under it that do work on a device, and the copies that feed it from the host.

    Views, operators that only rewrap an input's storage, and bare allocations are not counted. Operators are those of
    the dispatcher: what one operator launches on a device is the backend's affair.

    Attributes:
        ops: number of calls by name, e.g. ``aten.addmm``.
        transfers: host-to-device copies by the operator that made them; ``meta`` counts as a device. Copies in the other
            direction raise on the meta device by themselves.
        traffic: bytes the counted operators read and wrote, by name, each operand once per operator.
    """

    def __init__(self) -> None:
        super().__init__()
        self.ops: Counter[str] = Counter()
        self.transfers: Counter[str] = Counter()
        self.traffic: Counter[str] = Counter()
        self._factories = _Factories(self)

    def __enter__(self) -> OpCounter:
        self._factories.__enter__()
        return super().__enter__()

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        self._factories.__exit__(*exception)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        inputs, outputs = _tensors((args, kwargs)), _tensors(result)
        if _does_work(func, inputs, outputs):
            name = str(func.overloadpacket)
            self.ops[name] += 1
            self.traffic[name] += sum(map(_touched, inputs)) + sum(map(_touched, outputs))
            if not self._factories.inside:
                self.transfers.update([name] * _from_host(name, inputs, outputs))
        return result


class _Factories(TorchFunctionMode):
    """Tells a counter of tensors built from Python data on a device: their copy happens below the dispatcher."""

    def __init__(self, counter: OpCounter) -> None:
        super().__init__()
        self.counter, self.inside = counter, False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func not in _FROM_HOST_DATA:
            return func(*args, **(kwargs or {}))
        self.inside = True
        try:
            made = func(*args, **(kwargs or {}))
        finally:
            self.inside = False
        source = args[0] if args else (kwargs or {}).get("data")
        on_host = not isinstance(source, Tensor) or source.device.type == "cpu"
        if made.device.type != "cpu" and on_host:
            self.counter.transfers[f"torch.{func.__name__}"] += 1
        return made


class PeakMemory(TorchDispatchMode):
    """Live bytes of the storages created under it on one kind of device; what existed before does not count.

    Only tensors that operators return are seen, not an operator's own workspace, nor an allocator's rounding.

    Args:
        device: e.g. ``meta`` or ``cpu``.

    Attributes:
        live, peak: bytes now, and at most.
    """

    def __init__(self, device: torch.device | str) -> None:
        super().__init__()
        self.device_type = torch.device(device).type
        self.live = self.peak = 0
        self._storages: dict[int, weakref.ref] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {t.untyped_storage()._cdata for t in _tensors((args, kwargs))}
        for t in _tensors(result):
            if t.device.type == self.device_type and t.untyped_storage()._cdata not in given:
                self._hold(t.untyped_storage())
        return result

    def _hold(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._storages:
            return
        self._storages[key] = weakref.ref(storage, self._release(key, size))
        self.live += size
        self.peak = max(self.peak, self.live)

    def _release(self, key: int, size: int) -> Callable[[object], None]:
        def released(_: object) -> None:
            self._storages.pop(key, None)
            self.live -= size

        return released


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _does_work(func: Any, inputs: list[Tensor], outputs: list[Tensor]) -> bool:
    name = func._schema.name.split("::")[-1]
    if func.is_view or name.startswith(("empty", "new_empty")):
        return False
    if func._schema.is_mutable or not outputs:
        return bool(inputs)
    given = {t.untyped_storage()._cdata for t in inputs}
    return any(t.untyped_storage()._cdata not in given for t in outputs)


def _touched(t: Tensor) -> int:
    """Bytes of a tensor that can be touched: an expanded one has fewer than elements."""
    return min(t.numel() * t.element_size(), t.untyped_storage().nbytes())


def _from_host(name: str, inputs: list[Tensor], outputs: list[Tensor]) -> int:
    """Host tensors an operator on a device read; 0-dim ones travel as kernel arguments unless they are copied."""
    if all(t.device.type == "cpu" for t in [*inputs, *outputs]):
        return 0
    copies = name in ("aten._to_copy", "aten.copy_")
    return sum(t.device.type == "cpu" and (copies or t.ndim > 0) for t in inputs)
