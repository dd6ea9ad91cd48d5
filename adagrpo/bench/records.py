"""Records of measurements: ``<root>/<device>/<date>-<commit>-<case>.json``, with all that is needed to repeat them."""

from __future__ import annotations

import dataclasses
import datetime
import os
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ..disk.files import WriteError, write_json, writing
from ..errors import InputError
from ..recipe.keys import Config
from ..recipe.load import to_toml
from ..run.machine import describe_machine, processor, slug
from ..text.strict_json import from_json
from ..text.user_text import read_text
from .statistics import Series

SCHEMA = 1
LARGEST = 256 * 2**20
RESULTS = Path("bench/results")


@dataclasses.dataclass(frozen=True)
class Record:
    """One measurement.

    Attributes:
        case: what was measured, command first: ``budget-bench-tiny``.
        device: slug of the device, ``cpu-2-threads``.
        date: UTC, ISO 8601.
        argv: the command line after ``adagrpo``.
        recipe: the resolved recipe as TOML, '' where there is none.
        machine: versions, device, processor, threads, commit, and whether the checkout had changes (``dirty``).
        series: every quantity, round by round.
        facts: what has no rounds: counts, limits, explanations.
        note: what a reader must know, such as other work on the machine.
    """

    case: str
    device: str
    date: str
    argv: tuple[str, ...]
    recipe: str
    machine: dict[str, Any]
    series: dict[str, Series]
    facts: dict[str, Any]
    note: str = ""

    @property
    def name(self) -> str:
        """File name: date, first characters of the commit, case."""
        return f"{self.date[:10]}-{(self.machine.get('commit') or 'no-commit')[:9]}-{self.case}.json"

    def to_json(self) -> dict[str, Any]:
        """The file's content."""
        data = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {"schema": SCHEMA, **data, "series": {name: s.to_json() for name, s in self.series.items()}}

    def write(self, root: Path) -> Path:
        """Write the record below ``root`` in one piece; the same case of the same day and commit is replaced.

        Raises:
            InputError: the folder cannot be written.
            WriteError: the disk is full.
        """
        path = root / self.device / self.name
        try:
            with writing(path):
                path.parent.mkdir(parents=True, exist_ok=True)
            write_json(path, self.to_json())
        except WriteError as error:
            if error.disk:
                raise
            raise InputError(f"--out {root}: cannot be written: {error.reason}") from error
        return path


def new_record(
    case: str,
    device: torch.device,
    argv: tuple[str, ...],
    series: Mapping[str, Series],
    facts: Mapping[str, Any],
    config: Config | None = None,
    note: str = "",
) -> Record:
    """A record of now, on this machine."""
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    recipe = "" if config is None else to_toml(config)
    machine = describe_machine(device) | {"processor": processor(), "dirty": _dirty()}
    return Record(case, device_slug(device), now, argv, recipe, machine, dict(series), dict(facts), note)


def read_record(path: Path) -> Record:
    """Inverse of ``Record.write``.

    Raises:
        InputError: no such file, not JSON, or not a record of this schema.
    """
    if not os.path.exists(path):
        raise InputError(f"{path}: no such record")
    try:
        data = from_json(read_text(path, str(path), LARGEST))
    except InputError:
        raise
    except ValueError as error:
        raise InputError(f"{path}: not a record: broken JSON ({error})") from error
    found = data.get("schema") if isinstance(data, dict) else None
    if found != SCHEMA:
        raise InputError(f"{path}: not a record of `adagrpo bench` (schema {found!r}, expected {SCHEMA})")
    try:
        series = {str(name): Series.from_json(s) for name, s in data["series"].items()}
        values = {f.name: data[f.name] for f in dataclasses.fields(Record)}
        return Record(**{**values, "series": series, "argv": tuple(data["argv"])})
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(f"{path}: a damaged record ({type(error).__name__}: {error}); measure again") from error


def device_slug(device: torch.device) -> str:
    """Folder name of a device: ``cpu-2-threads``, ``nvidia-h100-80gb-hbm3``."""
    if device.type == "cuda":
        return slug(torch.cuda.get_device_name(device))
    return f"{device.type}-{torch.get_num_threads()}-threads" if device.type == "cpu" else device.type


def _dirty() -> bool | None:
    """Whether tracked files of the checkout this package runs from differ from its commit; None outside a checkout."""
    here = str(Path(__file__).resolve().parent)
    command = ["git", "-C", here, "status", "--porcelain", "--untracked-files=no"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return bool(done.stdout.strip()) if done.returncode == 0 else None
