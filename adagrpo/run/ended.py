"""How a run under torchrun ended: what ended on purpose is not to be started again.

torchrun starts all ranks anew whenever one of them ends with anything but 0, right after a fault, and wrong after bad input, a
guard or a signal. Those are written down in the run folder; a restarted attempt that finds this leaves at once.
"""

from __future__ import annotations

import datetime
import math
import os
from collections.abc import Mapping
from pathlib import Path

from ..disk.files import read_json, write_json
from ..disk.owner import began_at

ENDED = "ended.json"
ON_PURPOSE = {
    0: "finished", 2: "bad input", 3: "stopped by a guard", 129: "stopped by SIGHUP", 130: "stopped by SIGINT",
    138: "stopped by SIGUSR1", 143: "stopped by SIGTERM",
}  # fmt: skip
"""Exit codes that are no faults."""
TIMEOUT = "TORCH_ELASTIC_SHUTDOWN_TIMEOUT"


def note_end(folder: Path, code: int) -> None:
    """Write down that the run ends on purpose, if it does, and torchrun could start it again.

    Raises:
        WriteError: it cannot be written.
    """
    if code in ON_PURPOSE and "TORCHELASTIC_RUN_ID" in os.environ:
        at = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
        write_json(folder / ENDED, {"code": code, "why": ON_PURPOSE[code], "time": at})


def ended_before(out: Path | None) -> int | None:
    """The exit code with which an attempt that torchrun restarted is to leave at once; None is to train.

    The count of restarts is one node's own: another one, whose ranks are started again because of that, knows it by an end that
    was written while its torchrun was running.
    """
    if out is None:
        return None
    try:
        found = read_json(out / ENDED)
        code, at = found["code"], datetime.datetime.fromisoformat(found["time"]).timestamp()
    except (OSError, ValueError, TypeError, KeyError):
        return None
    again = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0").strip() not in ("", "0")
    again = again or ("TORCHELASTIC_RUN_ID" in os.environ and at > (began_at(os.getppid()) or math.inf))
    return code if again and code in ON_PURPOSE else None


def launch_notice(environment: Mapping[str, str] = os.environ, proc: Path = Path("/proc")) -> str:
    """What a start by torchrun lacks for a stop that saves; empty without torchrun, or where nothing is.

    Args:
        environment: of this process. proc: the kernel's files.
    """
    if "TORCHELASTIC_RUN_ID" not in environment or environment.get("TORCHELASTIC_RESTART_COUNT", "0") != "0":
        return ""
    lacking = []
    if "SIGUSR1" not in environment.get("TORCHELASTIC_SIGNALS_TO_HANDLE", ""):
        lacking.append("--signals-to-handle SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1: a SIGUSR1 ends it unsaved")
    if TIMEOUT not in environment and not _has_timeout(proc / str(os.getppid()) / "cmdline"):
        lacking.append("--shutdown-timeout SECONDS: 30 s after a signal what has not saved yet is killed")
    return f"torchrun was started without {'; and without '.join(lacking)}" if lacking else ""


def _has_timeout(command: Path) -> bool:
    """Whether the parent, which is torchrun, was started with the option; true where that cannot be read."""
    try:
        words = command.read_bytes().split(b"\0")
    except OSError:
        return True
    return any(word.partition(b"=")[0].replace(b"_", b"-") == b"--shutdown-timeout" for word in words)
