"""Run by `test_fall_back.py` in a process without TRITON_INTERPRET: what each failure of Triton does, as JSON by scenario."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator

import adagrpo_kernels as ops
import torch
import triton
from adagrpo_kernels import _dispatch, stub
from adagrpo_kernels._triton.philox import philox_normal_kernel
from triton.backends import backends
from triton.backends.nvidia.driver import CudaDriver
from triton_cases import TABLE, randn

ROWS = torch.arange(3)
X, V, INDEX = randn(3, 4, 16, seed=1), randn(3, 4, 16, seed=2), torch.tensor([18, 20, 24])
SUCCESSORS, UPSTREAM = randn(3, 5, 4, 16, seed=3), randn(3, 5, seed=4)


def noise(impl: str | None = None) -> torch.Tensor:
    return ops.philox_normal(7, ROWS, 64, 1, 2, 3, impl=impl)


def outcome(call: Callable[[], object]) -> str:
    """``reference`` where the result is that of the reference, ``not written`` of a stub's launch, or the exception."""
    truth = ops.philox_normal_reference(7, ROWS, 64, 1, 2, 3)
    try:
        result = call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "reference" if torch.equal(result, truth) else "not written"


def report(first: str, **more: object) -> dict[str, object]:
    return {"first": first, "fallback": _dispatch._fallback, "ran": ops.implementations(), **more}


@contextlib.contextmanager
def broken_at(part: str, message: str, times: int = 99) -> Iterator[stub.StubDriver]:
    """A stub driver that fails ``times`` times at ``part``, and says then whether the device still answers."""
    left = {part: times}

    def fault(now: str) -> None:
        if left.get(now, 0) > 0:
            left[now] -= 1
            raise RuntimeError(message)
        if now == "synchronize" and "illegal" in message:
            raise RuntimeError(message)

    with stub.installed(stub.StubDriver(fault=fault)) as driver:
        yield driver


@contextlib.contextmanager
def without_stub(**environment: str) -> Iterator[None]:
    """Triton looks for its own driver, as on a CUDA machine, in this environment."""
    config, before = triton.runtime.driver, dict(os.environ)
    kept = config._active, config._default
    config._active = config._default = None
    _dispatch.launchable.add("cpu")
    os.environ.pop("CC", None)
    os.environ.update(environment)
    try:
        yield
    finally:
        _dispatch.launchable.discard("cpu")
        config._active, config._default = kept
        os.environ.clear()
        os.environ.update(before)


def no_driver() -> dict[str, object]:
    kept = dict(backends)
    backends.clear()
    try:
        with without_stub():
            found = report(outcome(noise), explicit=outcome(lambda: noise("triton")))
            found["problem"] = _dispatch.device_problem({"cpu"})
            step = ops.sde_step(X, V, TABLE, INDEX)
            found["next op"] = torch.equal(step.next, ops.sde_step_reference(X, V, TABLE, INDEX).next)
            return found | {"ran": ops.implementations()}
    finally:
        backends.update(kept)


def compiler(**environment: str) -> dict[str, object]:
    """The CUDA driver itself, which compiles a C file that has not been compiled yet."""
    kept, CudaDriver.is_active = CudaDriver.is_active, staticmethod(lambda: True)
    try:
        with tempfile.TemporaryDirectory() as empty:
            where = {"PATH": empty, "TRITON_CACHE_DIR": empty, "TRITON_LIBCUDA_PATH": empty}
            with without_stub(**where, **environment):
                return report(outcome(noise), explicit=outcome(lambda: noise("triton")))
    finally:
        CudaDriver.is_active = kept


def first_launch(part: str, message: str, **state: bool) -> dict[str, object]:
    with broken_at(part, message) as driver:
        driver.capturing = state.get("capturing", False)
        found = report(outcome(noise), counts=ops.launch_counts())
        return found | {"explicit": outcome(lambda: noise("triton")), "launches": len(driver.launches)}


def later_launch() -> dict[str, object]:
    with stub.installed():
        first = outcome(noise)
    with broken_at("launch", "Triton Error [CUDA]: invalid argument"):
        return report(first, second=outcome(noise))


def memory_once() -> dict[str, object]:
    """The first load finds no memory; the caller makes room and tries again."""
    with broken_at("load", "Triton Error [CUDA]: out of memory", times=1) as driver:
        first = outcome(noise)
        found = report(first, second=outcome(noise))
        return found | {"loaded": [bool(launch.cubin) for launch in driver.launches]}


def backward() -> dict[str, object]:
    """The forward kernel is launched, the backward one is not."""
    v = V.clone().requires_grad_()
    with stub.installed():
        logp = ops.group_log_prob(X, v, SUCCESSORS, TABLE, INDEX)
    with broken_at("load", "Triton Error [CUDA]: no kernel image is available"):
        (grad,) = torch.autograd.grad(logp, v, UPSTREAM)
    wide = V.double().requires_grad_()
    arguments = (X.double(), wide, SUCCESSORS.double(), TABLE.to(dtype=torch.float64), INDEX)
    (truth,) = torch.autograd.grad(ops.group_log_prob_reference(*arguments), wide, UPSTREAM.double())
    error = float((grad - truth).abs().max() / truth.abs().max())
    return report("", error=error, dtype=str(grad.dtype))


def other_arguments() -> dict[str, object]:
    """What the kernel does not take is no failure."""
    with stub.installed():
        ops.philox_normal(7, ROWS, 64, 1, 2, 3, torch.float64)
        return report(outcome(noise))


SCENARIOS: dict[str, Callable[[], dict[str, object]]] = {
    "sound": lambda: first_launch("never", ""),
    "no driver": no_driver,
    "no compiler": compiler,
    "compiler fails": lambda: compiler(CC=sys.executable),
    "load": lambda: first_launch("load", "Triton Error [CUDA]: no kernel image is available"),
    "launch": lambda: first_launch("launch", "Triton Error [CUDA]: invalid argument"),
    "memory": lambda: first_launch("launch", "Triton Error [CUDA]: out of memory"),
    "memory once": memory_once,
    "sticky": lambda: first_launch("launch", "Triton Error [CUDA]: an illegal memory access was encountered"),
    "capture": lambda: first_launch("load", "operation not permitted when stream is capturing", capturing=True),
    "later launch": later_launch,
    "backward": backward,
    "other arguments": other_arguments,
}


def main() -> None:
    found = {}
    for name, scenario in SCENARIOS.items():
        ops.reset_counts()
        _dispatch.reset_fallback()
        philox_normal_kernel.device_caches.clear()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            found[name] = scenario() | {"warnings": [str(w.message) for w in caught if w.category is RuntimeWarning]}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
