"""Which implementation runs, and a record of what did.

``impl`` of every public operator:

- ``None``: the environment variable ``ADAGRPO_IMPL``, else ``auto``
- ``auto``: Triton where the tensors are on CUDA and the kernel takes their dtypes, the reference elsewhere. Where Triton cannot
  drive the GPU (no C compiler, no driver) or the first launch of a kernel fails, the reference runs instead, for the rest of
  the process and for every operator; that is said once (``telling``, else a warning)
- ``triton``: the kernel, or ``KernelError`` that says why not. On CPU tensors it needs Triton's interpreter
  (``TRITON_INTERPRET=1`` before triton is imported); on meta tensors nothing is launched, only shapes are made and the launch
  is counted
- ``reference``: plain PyTorch

No other exception of a kernel is swallowed: not out of memory, not what an earlier kernel did to the device, not the failure of
a kernel that has been launched before.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import subprocess
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn, TypeVar

import torch
from torch import Tensor

IMPLS = ("auto", "triton", "reference")
VARIABLE = "ADAGRPO_IMPL"
T = TypeVar("T")

launchable = {"cuda"}  # device types whose tensors go to Triton's driver

_launches: Counter[str] = Counter()
_ran: dict[str, set[str]] = {}
_observers: list[Callable[[str, Any, dict[str, Any]], object]] = []
_sound: set[str] = set()  # kernels that were launched once
_tellers: list[Callable[[str], object]] = []
_fallback: str | None = None  # why ``auto`` is the reference for the rest of the process


class KernelError(RuntimeError):
    """A kernel cannot run here; the message says which and why."""


def run(
    op: str,
    impl: str | None,
    tensors: Sequence[Tensor | None],
    kernel: Callable[[], T],
    reference: Callable[[], T],
    problem: str | None = None,
) -> T:
    """``op`` by the implementation that ``impl`` names; what ran is recorded.

    Args:
        op: name of the operator.
        impl: see the module docstring.
        tensors: all tensor arguments; None entries are skipped.
        kernel, reference: the two implementations.
        problem: why the kernel cannot take these arguments, or None.

    Raises:
        ValueError: unknown ``impl``.
        KernelError: ``impl="triton"`` that cannot run.
    """
    name = named(impl)
    devices = {t.device.type for t in tensors if t is not None}
    if name == "triton":
        problem = problem or device_problem(devices)
        if problem:
            raise KernelError(f"impl='triton' cannot run {op}: {problem}")
    elif name == "reference" or problem or not _drivable(devices):
        return recorded(op, "reference", reference)
    return attempt(op, name == "auto", kernel, reference)


def named(impl: str | None) -> str:
    """``impl``, or what the environment says where it is None.

    Raises:
        ValueError: it is unknown.
    """
    name = os.environ.get(VARIABLE, "auto") if impl is None else impl
    if name not in IMPLS:
        raise ValueError(f"unknown implementation {name!r}: one of {', '.join(IMPLS)}")
    return name


def attempt(op: str, fall_back: bool, kernel: Callable[[], T], reference: Callable[[], T]) -> T:
    """``kernel()``, or ``reference()`` from now on if the kernel cannot be launched and ``fall_back`` allows it."""
    try:
        return recorded(op, "triton", kernel)
    except KernelError as error:
        if not fall_back:
            raise
        _fall_back(str(error))
    return recorded(op, "reference", reference)


def recorded(op: str, name: str, implementation: Callable[[], T]) -> T:
    """Run ``implementation`` of ``op`` and remember its ``name`` once it has."""
    result = implementation()
    _ran.setdefault(op, set()).add(name)
    return result


def launch(name: str, kernel: Any, grid: tuple[int, ...], arguments: dict[str, Any], num_warps: int) -> None:
    """Launch ``kernel`` on its tensors' device and count it; an empty grid and meta tensors launch nothing.

    Floating-point contraction is off: products and sums round as they do in eager PyTorch.

    Raises:
        KernelError: the first launch of the kernel failed before the device ran it.
        torch.OutOfMemoryError: of the device, whoever noticed it.
    """
    if 0 in grid:
        return
    device = next(value.device for value in arguments.values() if isinstance(value, Tensor))
    if device.type != "meta":
        try:
            with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
                kernel[grid](**arguments, num_warps=num_warps, enable_fp_fusion=False)
        except Exception as error:
            raise_failure(name, error)
        _sound.add(name)
    _launches[name] += 1
    for observer in _observers:
        observer(name, kernel, arguments)


def raise_failure(name: str, error: Exception) -> NoReturn:
    """Raise what a failed launch means: see ``launch``; anything else is raised as it is."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        raise error
    if "out of memory" in str(error):
        raise torch.OutOfMemoryError(f"launching {name}: {error}") from error
    if name in _sound or not _device_is_sound():
        raise error
    raise KernelError(f"the first launch of kernel {name} failed: {_brief(error)}") from error


def _device_is_sound() -> bool:
    """Whether the device still answers and is not capturing a graph, so that the failure was the launch's own."""
    try:
        import triton

        device = triton.runtime.driver.active.get_device_interface()
    except Exception:
        return True  # without a driver nothing reached the device
    try:
        if device.is_current_stream_capturing():
            return False
        device.synchronize()
    except Exception:
        return False
    return True


def _drivable(devices: set[str]) -> bool:
    """Whether ``auto`` takes the kernel for tensors on ``devices``."""
    if _fallback is not None or len(devices) != 1 or not devices <= launchable:
        return False
    problem = driver_problem()
    if problem:
        _fall_back(problem)
    return problem is None


def driver_problem() -> str | None:
    """Why Triton cannot drive this machine's GPU; None if it can. At its first use Triton compiles its driver, in C."""
    if "triton" not in sys.modules and importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if os.environ.get("TRITON_INTERPRET") == "1":
        return None
    try:
        import triton

        triton.runtime.driver.active  # noqa: B018
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        return (
            f"triton cannot drive the GPU: {_brief(error)} (its driver is built once, with a C compiler and Python's headers)"
        )
    return None


def _brief(error: Exception) -> str:
    if isinstance(error, subprocess.CalledProcessError):
        return f"{error.cmd[0]} ended with exit code {error.returncode}"
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def _fall_back(reason: str) -> None:
    """Take the references for the rest of the process, and say so."""
    global _fallback
    if _fallback is not None:
        return
    _fallback = f"kernels are off, the references run instead: {reason}"
    for tell in _tellers:
        tell(_fallback)
    if not _tellers:
        warnings.warn(_fallback, RuntimeWarning, stacklevel=2)


@contextlib.contextmanager
def telling(tell: Callable[[str], object]) -> Iterator[None]:
    """Within it ``tell`` hears, once, that ``auto`` has become the reference and why; at once if it already has."""
    if _fallback is not None:
        tell(_fallback)
    _tellers.append(tell)
    try:
        yield
    finally:
        _tellers.remove(tell)


def reset_fallback() -> None:
    """Try the kernels again: for tests, and once what was missing has been installed."""
    global _fallback
    _fallback = None
    _sound.clear()


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
    if devices == {"meta"}:
        return None
    if len(devices) == 1 and devices <= launchable:
        return driver_problem()
    if devices != {"cpu"}:
        return f"its tensors are on {', '.join(sorted(devices))}"
    if os.environ.get("TRITON_INTERPRET") != "1":
        return "its tensors are on the CPU; set TRITON_INTERPRET=1 before triton is imported, or use CUDA tensors"
    return None
