"""The run folder: resolved recipe, manifest, metrics."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import platform
import re
import subprocess
import uuid
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from ..config import Config
from ..errors import InputError
from ..recipe import load_recipe, to_toml
from ..strict_json import from_json, to_json
from .checkpoint import checkpoints, tidy
from .lock import OwnerLock, is_unused

PACKAGES = ("adagrpo", "torch", "triton", "diffusers", "transformers", "peft", "torchao", "safetensors", "numpy")


class RunFolder:
    """Paths and records of one run.

    Layout: ``config.toml``, ``manifest.json``, ``metrics.jsonl``, ``events.jsonl``, ``samples/``, ``checkpoints/``,
    ``traces/``, ``base.json``, ``memory.json``, ``result.json``, ``report.html``.

    Args:
        lock: of the process that writes there.
    """

    def __init__(self, path: Path, lock: OwnerLock | None = None) -> None:
        self.path, self.lock = path, lock
        self.metrics_file = path / "metrics.jsonl"
        self.checkpoints = path / "checkpoints"
        self.samples = path / "samples"

    @classmethod
    def fresh(cls, path: Path, lock: OwnerLock | None = None) -> RunFolder:
        """A folder for a new run, created by ``write_start``.

        Raises:
            InputError: it holds a run already, or something else, or cannot be written.
        """
        cls.check_fresh(path)
        return cls(path, lock)

    @staticmethod
    def check_fresh(path: Path) -> None:
        """Raise what ``fresh`` would raise, without creating anything."""
        if (path / "config.toml").exists():
            raise InputError(f"--out {path}: holds a run already; continue it with --resume latest, or name another folder")
        RunFolder.check_place(path)

    @staticmethod
    def check_place(path: Path) -> None:
        """Refuse a folder in which something else than a run lies, or that cannot be written.

        Raises:
            InputError: naming it.
        """
        if not (path / "config.toml").exists() and not is_unused(path):
            raise InputError(f"--out {path}: not an empty folder; name another one")
        parent = next(p for p in [path, *path.absolute().parents] if p.exists())
        if not parent.is_dir() or not os.access(parent, os.W_OK):
            raise InputError(f"--out {path}: cannot be created: {parent} is not a writable folder")

    @classmethod
    def existing(cls, path: Path, config: Config, lock: OwnerLock | None = None) -> RunFolder:
        """The folder of a run to continue, with the same recipe.

        Raises:
            InputError: no run there, or another recipe; the message shows the difference.
        """
        file = path / "config.toml"
        if not file.is_file():
            raise InputError(f"--out {path}: no run to resume there (config.toml is missing)")
        changed = changed_keys(load_recipe(file), config)
        if changed:
            difference = "; ".join(f"{key} = {before} there, {now} here" for key, (before, now) in changed.items())
            raise InputError(
                f"--out {path}: holds a run of another recipe: {difference}; drop the change or name another --out"
            )
        tidy(path / "checkpoints")
        return cls(path, lock)

    def check_prompts(self, digest: str) -> None:
        """Refuse to continue on other prompts than the run began with.

        Raises:
            InputError: the digest differs from the manifest's.
        """
        manifest = self.read_json("manifest.json") or {}
        if manifest.get("prompts_sha256", digest) != digest:
            raise InputError(f"--out {self.path}: the prompts changed since this run began; restore them or name another --out")

    def name(self) -> str:
        """The folder's name and the run's own id, for dashboards."""
        return f"{self.path.name}-{self.identity()}".rstrip("-")

    def identity(self) -> str:
        """The run's own id, which copies of the folder share; empty where the manifest has none."""
        return str((self.read_json("manifest.json") or {}).get("id", ""))

    def write_start(self, config: Config, device: torch.device, extra: dict[str, Any]) -> None:
        """Create the folder; record the resolved recipe and the machine.

        Raises:
            InputError: it cannot be created.
        """
        try:
            for folder in (self.path, self.checkpoints, self.samples):
                folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"--out {self.path}: cannot be created: {error.strerror}") from error
        (self.path / "config.toml").write_text(to_toml(config), "utf-8")
        self.write_json("manifest.json", {"id": uuid.uuid4().hex[:8], **describe_machine(device), **extra})

    def write_json(self, name: str, value: Any) -> None:
        """Write ``name`` in one piece."""
        write_json(self.path / name, value)

    def read_json(self, name: str) -> Any:
        """Inverse of ``write_json``; None when the file does not exist."""
        file = self.path / name
        return from_json(file.read_text("utf-8")) if file.exists() else None

    def log(self, record: dict[str, Any]) -> None:
        """Append one line to ``metrics.jsonl``; non-finite numbers become null."""
        if self.lock is not None:
            self.lock.require()
        with self.metrics_file.open("a", encoding="utf-8") as file:
            file.write(to_json(record) + "\n")

    def event(self, iteration: int, kind: str, message: str) -> None:
        """Append one line to ``events.jsonl``."""
        with (self.path / "events.jsonl").open("a", encoding="utf-8") as file:
            file.write(to_json({"iteration": iteration, "kind": kind, "message": message}) + "\n")

    def truncate_metrics(self, iteration: int) -> None:
        """Drop the lines of iterations after ``iteration``: the resumed run will write them again."""
        if not self.metrics_file.exists():
            return
        lines = self.metrics_file.read_text("utf-8").splitlines()
        kept = [line for line in lines if _iteration(line) <= iteration]
        draft = self.metrics_file.with_suffix(".partial")
        draft.write_text("".join(line + "\n" for line in kept), "utf-8")
        draft.rename(self.metrics_file)

    def latest_checkpoint(self) -> Path | None:
        """The newest complete checkpoint."""
        found = checkpoints(self.checkpoints)
        return found[-1] if found else None


def describe_machine(device: torch.device) -> dict[str, Any]:
    """Versions, device and commit, for the manifest."""
    versions: dict[str, str | None] = {}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    described: dict[str, Any] = {"versions": versions, "python": platform.python_version()}
    described |= {"device": str(device), "commit": _commit()}
    if device.type == "cuda":
        described["gpu"] = torch.cuda.get_device_name(device)
        described["cuda"] = torch.version.cuda
    else:
        described["threads"] = torch.get_num_threads()
    return described


def _commit() -> str | None:
    """Commit of the checkout this package runs from; None for an installed wheel."""
    here = Path(__file__).resolve().parent
    command = ["git", "-C", str(here), "rev-parse", "HEAD"]
    try:
        tracked = subprocess.run([*command[:3], "ls-files", "--error-unmatch", __file__], capture_output=True, timeout=10)
        found = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return found.stdout.strip() if tracked.returncode == 0 and found.returncode == 0 else None


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file in one piece; non-finite numbers become null."""
    draft = path.with_name(f".{path.name}.partial")
    draft.write_text(to_json(value, indent=1) + "\n", "utf-8")
    draft.rename(path)


def prompts_digest(*lists: Sequence[str]) -> str:
    """SHA-256 of prompt lists, for the manifest."""
    return hashlib.sha256(json.dumps(lists, ensure_ascii=False).encode()).hexdigest()


def processor() -> str:
    """The host's processor by the name Linux gives it; elsewhere its architecture."""
    try:
        found = re.search(r"^model name\s*: (.+)$", Path("/proc/cpuinfo").read_text("utf-8"), re.MULTILINE)
    except OSError:
        found = None
    return found[1].strip() if found else platform.machine()


def slug(text: str) -> str:
    """Lower-case letters and digits joined by dashes."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def changed_keys(before: Config, now: Config) -> dict[str, tuple[Any, Any]]:
    """Keys in which two recipes differ, as ``section.key``, with both values; None where a key is missing."""
    one, other = (_flat(dataclasses.asdict(config)) for config in (before, now))
    return {key: (one.get(key), other.get(key)) for key in {**one, **other} if one.get(key) != other.get(key)}


def _flat(table: Any, prefix: str = "") -> dict[str, Any]:
    """``{"section.key": value}`` of nested tables and lists of tables."""
    items = table.items() if isinstance(table, dict) else enumerate(table)
    flat: dict[str, Any] = {}
    for key, value in items:
        nested = isinstance(value, dict) or (isinstance(value, list | tuple) and any(isinstance(v, dict) for v in value))
        flat |= _flat(value, f"{prefix}{key}.") if nested and value else {f"{prefix}{key}": value}
    return flat


def _iteration(line: str) -> float:
    try:
        return from_json(line)["iteration"]
    except (ValueError, KeyError):
        return math.inf
