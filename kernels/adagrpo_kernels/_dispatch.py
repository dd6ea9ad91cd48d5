"""Which implementation runs, and a record of what did.

``impl`` of every public operator:

- ``None``: the environment variable ``ADAGRPO_IMPL``, else ``auto``
- ``auto``: Triton where the tensors are on CUDA and the kernel takes their dtypes, the reference elsewhere
- ``triton``: the kernel, or an error that says why not. On CPU tensors it needs Triton's interpreter (``TRITON_INTERPRET=1``
  before triton is imported); on meta tensors nothing is launched, only shapes are made and the launch is counted
- ``reference``: plain PyTorch

An exception of a kernel is never swallowed.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

IMPLS = ("auto", "triton", "reference")
VARIABLE = "ADAGRPO_IMPL"

launchable = {"cuda"}  # device types whose tensors go to Triton's driver

_launches: Counter[str] = Counter()
_ran: dict[str, set[str]] = {}
_observers: list[Callable[[str, Any, dict[str, Any]], object]] = []


def use_triton(op: str, impl: str | None, tensors: Sequence[Tensor | None], problem: str | None = None) -> bool:
    """Whether ``op`` runs as a Triton kernel; the answer is recorded.

    Args:
        op: name of the operator.
        impl: see the module docstring.
        tensors: all tensor arguments; None entries are skipped.
        problem: why the kernel cannot take these arguments, or None.

    Raises:
        ValueError: unknown ``impl``.
        RuntimeError: ``impl="triton"`` that cannot run.
    """
    name = os.environ.get(VARIABLE, "auto") if impl is None else impl
    if name not in IMPLS:
        raise ValueError(f"unknown implementation {name!r}: one of {', '.join(IMPLS)}")
    devices = {t.device.type for t in tensors if t is not None}
    if name == "triton":
        problem = problem or device_problem(devices)
        if problem:
            raise RuntimeError(f"impl='triton' cannot run {op}: {problem}")
    there = devices <= launchable and bool(devices) and problem is None and importlib.util.find_spec("triton") is not None
    chosen = name == "triton" or (name == "auto" and there)
    _ran.setdefault(op, set()).add("triton" if chosen else "reference")
    return chosen


def launch(name: str, kernel: Any, grid: tuple[int, ...], arguments: dict[str, Any], num_warps: int) -> None:
    """Launch ``kernel`` on its tensors' device and count it; an empty grid and meta tensors launch nothing.

    Floating-point contraction is off: products and sums round as they do in eager PyTorch.
    """
    if 0 in grid:
        return
    _launches[name] += 1
    for observer in _observers:
        observer(name, kernel, arguments)
    device = next(value.device for value in arguments.values() if isinstance(value, Tensor))
    if device.type == "meta":
        return
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        kernel[grid](**arguments, num_warps=num_warps, enable_fp_fusion=False)


@contextlib.contextmanager
def observed(observer: Callable[[str, Any, dict[str, Any]], object]) -> Iterator[None]:
    """Within it ``observer`` is told name, kernel and arguments of every launch."""
    _observers.append(observer)
    try:
        yield
    finally:
        _observers.remove(observer)


def launch_counts() -> dict[str, int]:
    """Kernel launches by name since ``reset_counts``."""
    return dict(_launches)


def implementations() -> dict[str, str]:
    """What ran for each operator since ``reset_counts``: ``triton``, ``reference``, or both, joined by ``+``."""
    return {op: "+".join(sorted(names)) for op, names in sorted(_ran.items())}


def reset_counts() -> None:
    """Forget launches and implementations."""
    _launches.clear()
    _ran.clear()


def device_word(value: int | Tensor, like: Tensor) -> Tensor:
    """A 64-bit word as int64 tensor on the device of ``like``, made by a fill: a copy from the host would synchronise."""
    if isinstance(value, Tensor):
        return value.to(device=like.device, dtype=torch.int64)
    return torch.full((), value - (1 << 64) if value >= 1 << 63 else value, dtype=torch.int64, device=like.device)


def device_problem(devices: set[str]) -> str | None:
    """Why kernels cannot run on tensors of these device types; None when they can."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if devices == {"meta"} or (len(devices) == 1 and devices <= launchable):
        return None
    if devices != {"cpu"}:
        return f"its tensors are on {', '.join(sorted(devices))}"
    if os.environ.get("TRITON_INTERPRET") != "1":
        return "its tensors are on the CPU; set TRITON_INTERPRET=1 before triton is imported, or use CUDA tensors"
    return None
