"""Who writes into a folder: the process that says so in a record, and whether it is still there."""

from __future__ import annotations

import dataclasses
import datetime
import os
import socket
import uuid
from pathlib import Path
from typing import Literal

from ..text.strict_json import from_json, to_json

Life = Literal["alive", "gone", "unknown"]


@dataclasses.dataclass(frozen=True)
class Owner:
    """A process that holds a folder.

    Attributes:
        host, boot: the host's name, and what tells this boot of this machine from all others (empty where nothing does).
        namespace: of process ids; containers of one machine count them apart.
        pid, started: process id, and when the process began, in the kernel's own count; together they are never given twice.
        since: when it took the folder, ISO 8601.
        command: what it does, without its options, which may hold secrets.
        locked: whether the kernel's lock backs the record, or its heartbeat alone does.
        token: this holding of the folder and no other.
    """

    host: str
    boot: str
    namespace: str
    pid: int
    started: str
    since: str
    command: str
    locked: bool
    token: str

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host} (adagrpo {self.command}) since {self.since}"

    def to_json(self) -> str:
        """The record's text."""
        return to_json(dataclasses.asdict(self), indent=1) + "\n"

    def life(self) -> Life:
        """Whether the process runs; unknown on another host, or in a container that counts its processes apart."""
        if (self.host, self.boot, self.namespace) != (socket.gethostname(), boot_id(), pid_namespace()):
            return "unknown"
        return "alive" if _exists(self.pid) and self.started == start_of(self.pid) else "gone"


def this_process(command: str, locked: bool) -> Owner:
    """This process, as the owner of a folder from now on."""
    return Owner(
        host=socket.gethostname(),
        boot=boot_id(),
        namespace=pid_namespace(),
        pid=os.getpid(),
        started=start_of(os.getpid()),
        since=datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        command=command,
        locked=locked,
        token=uuid.uuid4().hex,
    )


def read_owner(record: Path) -> Owner | None:
    """The owner that a record names; None where there is none, or none that can be read."""
    try:
        known = from_json(record.read_text("utf-8"))
        owner = Owner(**{field.name: known[field.name] for field in dataclasses.fields(Owner)})
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return owner if isinstance(owner.pid, int) and owner.pid > 0 else None


def boot_id() -> str:
    """This boot of this machine; empty where the system has no name for it."""
    return _read(Path("/proc/sys/kernel/random/boot_id"))


def pid_namespace() -> str:
    """The namespace that this process's id belongs to; empty where the system knows none."""
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def start_of(pid: int) -> str:
    """When a process began, in clock ticks since boot; empty where that is not known. Source: proc(5), field 22 of stat."""
    fields = _stat(pid)
    return fields[19] if len(fields) > 19 else ""


def began_at(pid: int) -> float | None:
    """When a process began, in seconds since 1970; None where that is not known. Source: proc(5), btime of stat."""
    booted = [line.split()[1] for line in _read(Path("/proc/stat")).splitlines() if line.startswith("btime ")]
    ticks = start_of(pid)
    return int(booted[0]) + int(ticks) / os.sysconf("SC_CLK_TCK") if booted and ticks else None


def _stat(pid: int) -> list[str]:
    """The fields of proc(5)'s stat from the third, the state, on."""
    return _read(Path(f"/proc/{pid}/stat")).rpartition(")")[2].split()


def _exists(pid: int) -> bool:
    if _stat(pid)[:1] == ["Z"]:  # it ended; its parent has not asked yet
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:  # somebody else's
        return True
    return True


def _read(path: Path) -> str:
    try:
        return path.read_text("utf-8", "replace").strip()
    except OSError:
        return ""
