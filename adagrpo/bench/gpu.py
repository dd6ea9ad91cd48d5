"""``adagrpo bench gpu``: what a GPU has to show first, in parts of at most eight minutes that can each be called alone.

- ``kernels``: every kernel against its reference; rates of matrix products and attention; the kernels beside eager and compiled
  references, all inside CUDA graphs with a cold L2. Needs neither diffusers nor transformers.
- ``forward``: the transformer's forwards at the rows of the official schedule, few blocks first, then FLUX.1-dev's.
- ``iteration``: iterations of recipe ``bench-flux1-dev`` by phase.

One record per part, rewritten as it goes. A failing check flags its figures and stops nothing.
"""

from __future__ import annotations

import functools
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from ..errors import InputError
from .findings import Findings
from .timers import Deadline

SOFT, HARD = 420.0, 480.0  # seconds after which a part begins nothing new, and after which it is ended
FLAGGED = 1


def gpu_command(part: str | None, out: Path, note: str, argv: tuple[str, ...]) -> int:
    """Run ``part``, or each in a process of its own; exit code 1 if anything was flagged or not measured.

    Raises:
        InputError: no CUDA device.
    """
    if not torch.cuda.is_available():
        raise InputError("bench gpu: no CUDA device here, nothing was measured")
    if part is None:
        return max([alone(name, out, note) for name in PARTS])
    device = torch.device("cuda", torch.cuda.current_device())
    findings = Findings(part, device, out, Deadline(SOFT), argv, note)
    PARTS[part](findings)
    path = findings.write()
    print(
        f"{'sound' if findings.sound else 'FLAGGED: see checks, flags and what was not measured in the record'}\nrecord: {path}"
    )
    return 0 if findings.sound else FLAGGED


def alone(part: str, out: Path, note: str, limit: float = HARD) -> int:
    """One part in a process of its own, ended after ``limit`` seconds; what it had found is in its record."""
    command = [sys.executable, "-m", "adagrpo", "bench", "gpu", "--part", part, "--out", str(out), "--note", note]
    print(f"== {part}", flush=True)
    try:
        return subprocess.run(command, timeout=limit).returncode
    except subprocess.TimeoutExpired:
        print(f"{part}: ended after {limit:.0f} s; its record holds what it had found")
        return FLAGGED


def kernels_part(findings: Findings) -> None:
    """See the module docstring."""
    from .ceilings import attention_part, gemm_part
    from .gpu_kernels import check_kernels, time_kernels
    from .kernels import CASES, driver, on_cuda

    findings.facts["driver"] = driver()
    check_kernels(findings)
    bench = on_cuda(findings.device)
    findings.section("products", lambda: gemm_part(findings, bench))
    findings.section("attention", lambda: attention_part(findings, bench))
    for op in CASES:
        findings.section(op, functools.partial(time_kernels, findings, bench, op))


def forward_part(findings: Findings) -> None:
    """See the module docstring."""
    from .gpu_forward import FULL, SMALL, time_forwards
    from .kernels import driver
    from .timers import EventTimer, GraphTimer

    findings.facts["driver"] = driver()
    timers = EventTimer(), GraphTimer(findings.device)
    for architecture in (SMALL, FULL):
        blocks = f"forward, {architecture['num_layers']} double blocks"
        findings.section(blocks, functools.partial(time_forwards, findings, architecture, *timers))


def iteration_part(findings: Findings) -> None:
    """See the module docstring."""
    from ..recipe.load import load_recipe
    from .gpu_forward import time_iterations
    from .kernels import driver

    findings.facts["driver"] = driver()
    time_iterations(findings, load_recipe("bench-flux1-dev"))


PARTS: dict[str, Callable[[Findings], None]] = {
    "kernels": kernels_part,
    "forward": forward_part,
    "iteration": iteration_part,
}
