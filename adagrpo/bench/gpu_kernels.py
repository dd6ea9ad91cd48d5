"""The kernels of ``adagrpo bench gpu``: each checked against its reference, then timed; what fails its check is flagged."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable

import torch
from adagrpo_kernels import selftest

from .findings import Findings
from .kernels import CASES, Bench, measure

CHECKED_AS = {"philox": "philox_normal"}  # operators whose checks bear another name


def check_kernels(findings: Findings, names: Iterable[str] = tuple(selftest.CHECKS)) -> None:
    """Every kernel against its reference on the findings' device."""
    for name in names:
        findings.check(name, functools.partial(_problem, name, findings.device))


def _problem(name: str, device: torch.device) -> str:
    found = selftest.CHECKS[name](device)
    return "" if found.passed else f"error {found.error:.1e}, bound {found.bound:.1e}"


def time_kernels(findings: Findings, bench: Bench, op: str) -> None:
    """Every case of ``op`` beside eager and compiled references."""
    if "copy" not in findings.rows:
        size = {"case": "copy", "shape": f"{bench.sizes.copied} float32"}
        findings.row("copy", size, lambda: {"GB/s": bench.copy_bandwidth() / 1e9})
    copied = findings.rows.get("copy", [{}])[0].get("GB/s", math.nan)
    flag = findings.flags(name for name in findings.checks if name.split(",")[0] == CHECKED_AS.get(op, op))
    for case in CASES[op](bench):
        name = {"case": case.case, "shape": case.shape, "dtype": case.dtype}
        findings.row(op, name, functools.partial(measure, case, bench, 1e9 * copied), flag)
