"""The run folder: resolved recipe, manifest, metrics."""

from __future__ import annotations

import os
import uuid
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ..disk.files import SEAL, is_sealed, read_json, sealed, set_aside, sweep, write_error, write_json, write_text
from ..disk.lock import OwnerLock, is_unused
from ..errors import InputError
from ..recipe.keys import Config
from ..recipe.load import load_recipe, to_toml
from ..text.redaction import scrubbed
from .belonging import require_own
from .changes import NO_CHANGES, Changes, changed_keys, permitted
from .checkpoint import load_records, newest_readable, newest_sound, tidy
from .ended import ENDED
from .machine import describe_machine
from .records import Log

EARLIER = "earlier-start-"
MANIFEST = "manifest.json"
RANKS = "ranks"
"""Folder of what the ranks of a run say of themselves while they train, or did when one failed (``run.failing``)."""


class RunFolder:
    """Paths and records of one run.

    Layout: ``config.toml``, ``manifest.json``, ``metrics.jsonl``, ``events.jsonl``, ``samples/``, ``checkpoints/``,
    ``traces/``, ``base.json``, ``memory.json``, ``result.json``, ``report.html``; of several ranks
    ``ranks/``, and under torchrun ``ended.json``. What is damaged is renamed to ``NAME.damaged-N.EXT``.

    Args:
        lock: of the process that writes there.

    Attributes:
        continued: whether the run there goes on, instead of a new one.
        changes: keys in which it departs from its recipe.
        notices: what was found damaged or was skipped, for the user and the events.
        described: what a manifest says of the machine, should it have to be written anew.
        skipped: checkpoints found damaged.
    """

    def __init__(self, path: Path, lock: OwnerLock | None = None) -> None:
        path = path.absolute()  # a part may change the working directory
        self.path, self.lock, self.changes, self.continued = path, lock, NO_CHANGES, False
        self.metrics, self.events = Log(path / "metrics.jsonl"), Log(path / "events.jsonl")
        self.metrics_file = self.metrics.path
        self.checkpoints = path / "checkpoints"
        self.samples = path / "samples"
        self.notices: list[str] = []
        self.described: dict[str, Any] = {}
        self.skipped: set[Path] = set()
        self._pictures: dict[str, int] = {}

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
        run = cls(path, lock)
        run.changes, run.continued = cls.changes_to(path, config), True
        tidy(run.checkpoints)
        run.sweep()
        return run

    @staticmethod
    def changes_to(path: Path, config: Config) -> Changes:
        """What resuming the run with ``config`` would change, without touching anything.

        Raises:
            InputError: no run there, or another recipe.
        """
        file = path / "config.toml"
        if not file.is_file():
            raise InputError(f"--out {path}: no run to resume there (config.toml is missing)")
        before = load_recipe(file)
        return permitted(before, config, changed_keys(before, config), f"--out {path}")

    def sweep(self) -> None:
        """Remove the drafts that a killed process left."""
        for folder in (self.path, self.samples, self.path / "traces", self.checkpoints):
            sweep(folder)

    def record_changes(self, config: Config, iteration: int) -> str:
        """Put the recipe of the resumed run in the place of the former one; the manifest keeps what changed when.

        Args:
            iteration: the last one under the former recipe.

        Returns:
            What to tell the user; empty if nothing changed.
        """
        if not self.changes.keys:
            return ""
        manifest, _ = self._sound_manifest(None)
        entries = [*(manifest or {}).get("changes", []), self.changes.entry(iteration)]
        self.write_json(MANIFEST, (manifest or {}) | {"changes": entries})
        write_text(self.path / "config.toml", to_toml(config))
        notice, self.changes = self.changes.notice(iteration), NO_CHANGES
        return notice

    def check_prompts(self, digest: str, checkpoint: Path | None = None) -> None:
        """Refuse to continue on other prompts than the run began with.

        Args:
            checkpoint: that the run goes on from; it knows the digest where ``manifest.json`` is damaged.

        Raises:
            InputError: the digest differs from the manifest's.
        """
        manifest, _ = self._sound_manifest(_vouched(checkpoint).get("manifest"))
        if (manifest or {}).get("prompts_sha256", digest) != digest:
            raise InputError(f"--out {self.path}: the prompts changed since this run began; restore them or name another --out")

    def began_with(self, digests: Mapping[str, str]) -> bool:
        """Whether the run is known to have begun with what has these digests, by the manifest's names."""
        manifest, _ = self._sound_manifest(None)
        return digests.items() <= (manifest or {}).items()

    def name(self) -> str:
        """The folder's name and the run's own id, for dashboards."""
        return f"{self.path.name}-{self.identity()}".rstrip("-")

    def identity(self) -> str:
        """The run's own id, which copies of the folder share; empty where the manifest has none."""
        manifest, _ = self._sound_manifest(None)
        return str((manifest or {}).get("id", ""))

    def write_start(self, config: Config, device: torch.device, extra: dict[str, Any]) -> None:
        """Create the folder; record the resolved recipe, without secrets, and the machine.

        Raises:
            InputError: it cannot be created.
            WriteError: the disk is full.
        """
        try:
            for folder in (self.path, self.checkpoints, self.samples):
                folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            if (failure := write_error(self.path, error)).disk:
                raise failure from error
            raise InputError(f"--out {self.path}: cannot be created: {error.strerror}") from error
        self.sweep()
        write_text(self.path / "config.toml", to_toml(config))
        self.describe(device, extra)
        self.write_json(MANIFEST, {"id": uuid.uuid4().hex[:8], **self.described})

    def describe(self, device: torch.device, extra: dict[str, Any]) -> None:
        """Keep what a manifest says of the machine, should it have to be written anew."""
        self.described = {**describe_machine(device), **extra}

    def write_json(self, name: str, value: Any) -> None:
        """Write ``name`` in one piece.

        Raises:
            WriteError: it cannot be written.
        """
        write_json(self.path / name, sealed(value) if name == MANIFEST else value)

    def extend_manifest(self, entries: dict[str, Any]) -> None:
        """Add ``entries`` to the manifest, where there is one.

        Raises:
            WriteError: it cannot be written.
        """
        manifest, _ = self._sound_manifest(None)
        if manifest is not None:
            self.write_json(MANIFEST, manifest | entries)

    def retire(self, name: str) -> None:
        """Rename a file that is no longer true to ``NAME.earlier-N.EXT``.

        Raises:
            WriteError: it cannot be renamed.
        """
        if os.path.lexists(file := self.path / name):
            self.notices.append(f"{name} was of a later iteration: renamed to {set_aside(file, 'earlier').name}")

    def read_json(self, name: str) -> Any:
        """Inverse of ``write_json``; None when the file does not exist.

        Raises:
            InputError: it is damaged.
        """
        try:
            return read_json(self.path / name)
        except ValueError as error:
            raise InputError(f"{self.path / name}: damaged ({error}); move it away") from error

    def log(self, record: dict[str, Any]) -> None:
        """Append one line to ``metrics.jsonl``; non-finite numbers become null.

        Raises:
            WriteError: it cannot be written.
        """
        self.require_ownership()
        self.metrics.append(record)

    def require_ownership(self) -> None:
        """Go on only if nobody took the folder over.

        Raises:
            RunError: somebody did.
        """
        if self.lock is not None:
            self.lock.require()

    def event(self, iteration: int, kind: str, message: str) -> None:
        """Append one line to ``events.jsonl``.

        Raises:
            WriteError: it cannot be written.
        """
        self.events.append({"iteration": iteration, "kind": kind, "message": scrubbed(message)})

    def vouch(self, picture: Path) -> None:
        """Remember what a sample grid holds, for the next checkpoint."""
        self._pictures[picture.name] = zlib.crc32(picture.read_bytes())

    def records(self) -> dict[str, Any]:
        """What the folder's files are now, for a checkpoint; the logs are brought to disk first.

        Raises:
            WriteError: they cannot be.
        """
        manifest, _ = self._sound_manifest(None)
        logs = {"metrics": self.metrics.sync(), "events": self.events.sync()}
        return {"manifest": manifest, **logs, "samples": dict(self._pictures)}

    def restore(self, iteration: int, checkpoint: Path | None = None) -> None:
        """Bring the records to where they were after ``iteration``: later metrics go, damaged files are set aside.

        What was damaged is told in ``notices``.

        Args:
            checkpoint: a verified one, which vouches for the records; None starts over.

        Raises:
            WriteError: a file cannot be written or renamed.
        """
        known = _vouched(checkpoint)
        for name in ("base.json", "baseline.json", "memory.json", "result.json", "report.html"):
            if os.path.lexists(file := self.path / name) and not file.is_file():
                self.notices.append(f"{name} was no regular file: set aside as {set_aside(file).name}")
        manifest, problem = self._sound_manifest(known.get("manifest"))
        if problem:
            aside = f": set aside as {set_aside(file).name}" if os.path.lexists(file := self.path / MANIFEST) else ""
            source = "the checkpoint's copy" if manifest else "this machine, as it was not in the checkpoint"
            self.notices.append(f"{MANIFEST} is {problem}{aside}; written anew from {source}")
            self.write_json(MANIFEST, manifest or {"id": uuid.uuid4().hex[:8], **self.described})
        for log, vouched, keep_later in (
            (self.metrics, known.get("metrics"), False),
            (self.events, known.get("events"), True),
        ):
            if notice := log.restore(iteration, vouched, keep_later):
                self.notices.append(notice)
        self._pictures = self._sound_pictures(known.get("samples", {}))

    def _sound_pictures(self, vouched: dict[str, int]) -> dict[str, int]:
        sound = {}
        for name, checksum in vouched.items():
            file = self.samples / name
            if file.is_file() and zlib.crc32(file.read_bytes()) == checksum:
                sound[name] = checksum
            elif os.path.lexists(file):
                self.notices.append(f"samples/{name} is damaged: set aside as {set_aside(file).name}")
            else:
                self.notices.append(f"samples/{name} is missing")
        return sound

    def _sound_manifest(self, copy: dict[str, Any] | None) -> tuple[dict[str, Any] | None, str]:
        """The manifest, or else a checkpoint's ``copy``; and what is wrong with the file, or ''."""
        try:
            value = read_json(self.path / MANIFEST)
        except ValueError:
            return copy, "damaged"
        if value is None:
            return copy, "missing"
        if not isinstance(value, dict) or (SEAL in {**value, **(copy or {})} and not is_sealed(value)):
            return copy, "damaged"
        if copy is not None and copy.get("id") != value.get("id"):
            return copy, "another run's"
        return value, ""

    def latest_checkpoint(self) -> Path | None:
        """The newest checkpoint whose index can be read; its files are not looked at."""
        return newest_readable(self.checkpoints)

    def require_own(self, checkpoint: Path) -> None:
        """Refuse a checkpoint that is damaged, or that is not known to be this run's; see ``belonging``.

        Raises:
            InputError: it is.
        """
        manifest, _ = self._sound_manifest(None)
        recorded = {key for entry in (manifest or {}).get("changes", []) for key in entry["keys"]}
        require_own(checkpoint, self.path, self.identity(), recorded)

    def sound_checkpoint(self, before: int | None = None) -> Path | None:
        """The newest sound checkpoint, every file of it read; why newer ones are skipped is told in ``notices``.

        Args:
            before: only those of earlier iterations; None is all.

        Raises:
            InputError: there are checkpoints, and none is sound.
        """
        found, skipped = newest_sound(self.checkpoints, self.identity(), before)
        if found is None and skipped:
            remedy = "restore one from a copy, or start anew in another --out"
            raise InputError(f"{self.checkpoints}: no sound checkpoint: {'; '.join(skipped.values())}; {remedy}")
        self.notices += skipped.values()
        self.skipped |= set(skipped)
        return found


def _is_aborted(path: Path) -> bool:
    """Whether nothing lies there but what a start leaves that is killed before it wrote its recipe."""
    if not path.is_dir():
        return False
    empty = {entry for entry in path.iterdir() if entry.name in ("checkpoints", "samples") and entry.is_dir()}
    rest = {*path.iterdir(), *(inner for entry in empty for inner in entry.iterdir())} - empty
    return all(
        _is_draft(entry) or entry.name.startswith((".owner.", EARLIER)) or entry.name in (RANKS, ENDED) for entry in rest
    )


def _is_draft(path: Path) -> bool:
    """Whether a file or folder was being written."""
    return path.name.startswith(".partial-") or (path.name.startswith(".") and path.name.endswith(".partial"))


def _vouched(checkpoint: Path | None) -> dict[str, Any]:
    """What a verified checkpoint knows of the folder's files; {} of none, or of one of a former version."""
    return (load_records(checkpoint) if checkpoint is not None else None) or {}
