"""A Triton driver without a GPU: everything up to the device's own part of a launch is real.

Within ``installed()`` the operators send CPU tensors through Triton's launch path for sm_90: keyword binding, specialisation on
values and alignment, compilation by ptxas. Loading and launching do nothing, so results are not written. Only in a process
without ``TRITON_INTERPRET``; importing this module imports triton.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase

from ._dispatch import launchable

SHARED_BYTES, THREADS = 232_448, 1024  # of one block of sm_90


class Launched(NamedTuple):
    """A launch that reached the device's part: metadata and machine code of the compiled kernel, its grid and arguments."""

    metadata: Any
    cubin: bytes
    grid: tuple[int, int, int]
    arguments: tuple[Any, ...]


class StubDriver(DriverBase):
    """What Triton asks a driver for, on a device of ``target`` that does nothing.

    Args:
        target: architecture compiled for.
        fault: called with ``load``, ``launch`` and ``synchronize`` as each happens; what it raises is that part's failure.

    Attributes:
        launches: every launch so far.
        capturing: what the device says when asked whether the current stream is captured.
    """

    def __init__(self, target: tuple[str, int, int] = ("cuda", 90, 32), fault: Callable[[str], object] = lambda part: None):
        super().__init__()
        self.target, self.fault = GPUTarget(*target), fault
        self.launches: list[Launched] = []
        self.capturing = False
        self.utils = self
        self.launcher_cls = self._launcher

    @classmethod
    def is_active(cls) -> bool:
        return True

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_device_interface(self) -> StubDriver:
        return self

    def get_active_torch_device(self) -> Any:
        raise NotImplementedError("the stub driver has no torch device")

    def get_benchmarker(self) -> Any:
        raise NotImplementedError("the stub driver runs nothing, so it times nothing")

    def map_python_to_cpp_type(self, ty: str) -> str:
        raise NotImplementedError("the stub driver builds no launcher in C")

    def is_current_stream_capturing(self) -> bool:
        return self.capturing

    def synchronize(self) -> None:
        self.fault("synchronize")

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": SHARED_BYTES, "multiprocessor_count": 132, "warpSize": 32}

    def load_binary(self, name: str, cubin: bytes, shared: int, device: int) -> tuple[Any, Any, int, int, int]:
        """Module, function, registers, spills and threads, as Triton unpacks them; the code stands for the function."""
        self.fault("load")
        return (), cubin, 0, 0, THREADS

    def _launcher(self, source: Any, metadata: Any) -> Callable[..., None]:
        def launch(x: int, y: int, z: int, stream: int, cubin: bytes, packed: Any, info: Any, enter: Any, leave: Any,
                   *arguments: Any) -> None:  # fmt: skip
            active = triton.runtime.driver.active  # Triton keeps launchers; a later stub's launches are its own
            active.fault("launch")
            active.launches.append(Launched(metadata, cubin, (x, y, z), arguments))

        return launch


@contextlib.contextmanager
def installed(driver: StubDriver | None = None) -> Iterator[StubDriver]:
    """Within it Triton uses ``driver``, and operators with ``impl="triton"`` or ``"auto"`` take CPU tensors for it.

    Raises:
        RuntimeError: Triton's interpreter is on.
    """
    if triton.knobs.runtime.interpret:
        raise RuntimeError("TRITON_INTERPRET=1 is set: the interpreter has no driver; unset it before triton is imported")
    config, driver = triton.runtime.driver, driver or StubDriver()
    before = config._active
    config.set_active(driver)
    launchable.add("cpu")
    try:
        yield driver
    finally:
        launchable.discard("cpu")
        config._active = before
