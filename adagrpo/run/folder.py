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
from .changes import NO_CHANGES, permitted
from .checkpoint import checkpoints, tidy
from .lock import OwnerLock, is_unused

EARLIER = "earlier-start-"
PACKAGES = ("adagrpo", "torch", "triton", "diffusers", "transformers", "peft", "torchao", "safetensors", "numpy")


class RunFolder:
    """Paths and records of one run.

    Layout: ``config.toml``, ``manifest.json``, ``metrics.jsonl``, ``events.jsonl``, ``samples/``, ``checkpoints/``,
    ``traces/``, ``base.json``, ``memory.json``, ``result.json``, ``report.html``.

    Args:
        lock: of the process that writes there.

    Attributes:
        continued: whether the run there goes on, instead of a new one.
        changes: keys in which it departs from its recipe.
    """

    def __init__(self, path: Path, lock: OwnerLock | None = None) -> None:
        self.path, self.lock, self.changes, self.continued = path, lock, NO_CHANGES, False
        self.metrics_file = path / "metrics.jsonl"
        self.checkpoints = path / "checkpoints"
        self.samples = path / "samples"

    @classmethod
    def fresh(cls, path: Path, lock: OwnerLock | None = None) -> RunFolder:
        """A folder for a new run, created by ``write_start``. An earlier start there that came to no checkpoint is no run.

        Raises:
            InputError: it holds a run already, or something else, or cannot be written.
        """
        cls.check_fresh(path)
        return cls(path, lock)

    @staticmethod
    def check_fresh(path: Path) -> None:
        """Raise what ``fresh`` would raise, without creating anything."""
        if not RunFolder.never_saved(path):
            raise InputError(f"--out {path}: holds a run already; continue it with --resume latest, or name another folder")
        RunFolder.check_place(path)

    @staticmethod
    def never_saved(path: Path) -> bool:
        """Whether no checkpoint was ever finished there."""
        folder = path / "checkpoints"
        return not folder.is_dir() or all(_is_draft(entry) for entry in folder.iterdir())

    @staticmethod
    def check_place(path: Path) -> None:
        """Refuse a folder in which something else than a run lies, or that cannot be written.

        Raises:
            InputError: naming it.
        """
        if not is_unused(path) and not (path / "config.toml").exists() and not _is_aborted(path):
            raise InputError(f"--out {path}: not an empty folder; name another one")
        parent = next(p for p in [path, *path.absolute().parents] if p.exists())
        if not parent.is_dir() or not os.access(parent, os.W_OK):
            raise InputError(f"--out {path}: cannot be created: {parent} is not a writable folder")

    @classmethod
    def existing(cls, path: Path, config: Config, lock: OwnerLock | None = None) -> RunFolder:
        """The folder of a run to continue, with the same recipe but for keys that cannot change its result.

        Raises:
            InputError: no run there, or another recipe; the message shows the difference.
        """
        file = path / "config.toml"
        if not file.is_file():
            raise InputError(f"--out {path}: no run to resume there (config.toml is missing)")
        before = load_recipe(file)
        changes = permitted(before, config, changed_keys(before, config), f"--out {path}")
        tidy(path / "checkpoints")
        run = cls(path, lock)
        run.changes, run.continued = changes, True
        return run

    def record_changes(self, config: Config, iteration: int) -> str:
        """Put the recipe of the resumed run in the place of the former one; the manifest keeps what changed when.

        Args:
            iteration: the last one under the former recipe.

        Returns:
            What to tell the user; empty if nothing changed.
        """
        if not self.changes.keys:
            return ""
        manifest = self.read_json("manifest.json") or {}
        entries = [*manifest.get("changes", []), self.changes.entry(iteration)]
        self.write_json("manifest.json", manifest | {"changes": entries})
        draft = self.path / ".config.toml.partial"
        draft.write_text(to_toml(config), "utf-8")
        draft.rename(self.path / "config.toml")
        notice, self.changes = self.changes.notice(iteration), NO_CHANGES
        return notice

    def check_prompts(self, digest: str) -> None:
        """Refuse to continue on other prompts than the run began with.

        Raises:
            InputError: the digest differs from the manifest's.
        """
        manifest = self.read_json("manifest.json") or {}
        if manifest.get("prompts_sha256", digest) != digest:
            raise InputError(f"--out {self.path}: the prompts changed since this run began; restore them or name another --out")

    def began_with(self, digest: str) -> bool:
        """Whether the run is known to have begun with these prompts."""
        try:
            return (self.read_json("manifest.json") or {}).get("prompts_sha256") == digest
        except (ValueError, AttributeError):
            return False

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


def _is_aborted(path: Path) -> bool:
    """Whether nothing lies there but what a start leaves that is killed before it wrote its recipe."""
    if not path.is_dir():
        return False
    empty = {entry for entry in path.iterdir() if entry.name in ("checkpoints", "samples") and entry.is_dir()}
    rest = {*path.iterdir(), *(inner for entry in empty for inner in entry.iterdir())} - empty
    return all(_is_draft(entry) or entry.name.startswith((".owner.", EARLIER)) for entry in rest)


def _is_draft(path: Path) -> bool:
    """Whether a file or folder was being written."""
    return path.name.startswith(".partial-") or (path.name.startswith(".") and path.name.endswith(".partial"))


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
