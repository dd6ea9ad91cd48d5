"""Power and energy of a GPU by NVML, sampled beside the work."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import itertools
import threading
import time
from collections.abc import Callable
from typing import Any

import torch

INTERVAL = 0.05


@dataclasses.dataclass(frozen=True)
class Energy:
    """What was drawn between the first and the last sample: the trapezoids under the samples."""

    seconds: float
    joules: float
    samples: int

    @property
    def watts(self) -> float:
        return self.joules / self.seconds


class PowerMeter:
    """Samples the board's power in a thread within ``with``.

    Args:
        device: of the work.
        interval: seconds between samples.
        clock: seconds.

    Attributes:
        problem: why nothing can be read; None if it can.
    """

    def __init__(
        self, device: torch.device, interval: float = INTERVAL, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self.interval, self.clock = interval, clock
        self.problem: str | None = None
        self._samples: list[tuple[float, float]] = []
        self._stop, self._thread = threading.Event(), threading.Thread(target=self._watch, daemon=True)
        self._nvml: Any = None
        self._handle: Any = None
        if device.type != "cuda":
            self.problem = "no GPU"
            return
        try:
            self._nvml = importlib.import_module("pynvml")
        except ImportError:
            self.problem = "nvidia-ml-py is not installed: pip install 'adagrpo[cuda]'"
            return
        try:
            self._nvml.nvmlInit()
            self._handle = self._nvml.nvmlDeviceGetHandleByUUID(gpu_uuid(device))
        except self._nvml.NVMLError as error:
            self.problem = f"NVML: {error}"

    def __enter__(self) -> PowerMeter:
        if self.problem is None:
            self.sample()
            self._thread.start()
        return self

    def __exit__(self, *exception: Any) -> None:
        if self._thread.is_alive():
            self._stop.set()
            self._thread.join()
            self.sample()
        if self._nvml is not None:
            with contextlib.suppress(self._nvml.NVMLError):
                self._nvml.nvmlShutdown()

    def sample(self) -> None:
        """Read the power now; a failure ends the sampling."""
        if self.problem is not None:
            return
        try:
            watts = self._nvml.nvmlDeviceGetPowerUsage(self._handle) / 1000
        except self._nvml.NVMLError as error:
            self.problem = f"NVML: {error}"
            return
        self._samples.append((self.clock(), watts))

    def energy(self) -> Energy | None:
        """What was drawn; None with a ``problem``."""
        if self.problem is None and len(self._samples) < 2:
            self.problem = "fewer than two samples"
        if self.problem is not None:
            return None
        joules = sum((t1 - t0) * (w0 + w1) / 2 for (t0, w0), (t1, w1) in itertools.pairwise(self._samples))
        return Energy(self._samples[-1][0] - self._samples[0][0], joules, len(self._samples))

    def _watch(self) -> None:
        while not self._stop.wait(self.interval):
            self.sample()


def gpu_uuid(device: torch.device) -> str:
    """The GPU's name for NVML, whatever CUDA_VISIBLE_DEVICES makes of its number."""
    return f"GPU-{torch.cuda.get_device_properties(device).uuid}"
