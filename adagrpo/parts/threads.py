"""How many threads torch should have in a process that is one of several on its machine."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path

VARIABLE = "OMP_NUM_THREADS"


def threads_per_rank(environment: Mapping[str, str] = os.environ, proc: Path = Path("/proc")) -> int | None:
    """Cores of this process's machine over its ranks, at least 1; None where torch's own choice should stay.

    It stays in a process that is alone on its machine, and where the user set ``OMP_NUM_THREADS``. torchrun sets it to 1 where
    nobody did, which would leave most cores idle; whether somebody did, the environment says that torchrun was started with.

    Args:
        environment: of this process. proc: the kernel's files.
    """
    ranks = environment.get("LOCAL_WORLD_SIZE", "1").strip()
    if not ranks.isdigit() or int(ranks) < 2:
        return None
    if VARIABLE in environment and not (environment[VARIABLE] == "1" and _left_unset(os.getppid(), proc)):
        return None
    return max(1, usable_cores(Path("/sys/fs/cgroup")) // int(ranks))


def usable_cores(groups: Path) -> int:
    """Cores that this process may use: those it is bound to, or fewer where its container's time is limited.

    Args:
        groups: folder of the control group that this process is in, as it sees it.
    """
    bound = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = (groups / "cpu.max").read_text("ascii").split()
        return min(bound, max(1, math.ceil(int(quota) / int(period))))
    except (OSError, ValueError):  # no file, or no limit: "max"
        return bound


def _left_unset(parent: int, proc: Path) -> bool:
    """Whether the parent, which is torchrun, was started without the variable."""
    try:
        begun = (proc / str(parent) / "environ").read_bytes().split(b"\0")
    except OSError:
        return False
    return not any(entry.startswith(f"{VARIABLE}=".encode()) for entry in begun)
