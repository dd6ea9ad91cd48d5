"""Checkpoints that are whole or absent.

``step-000050/`` holds a portable part that diffusers loads (``transformer/`` or ``pytorch_lora_weights.safetensors``),
``state/state.pt`` with everything else, and ``checkpoint.json`` with size and SHA-256 of every file. It is written beside
its place, flushed to disk and renamed.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from ..errors import InputError
from ..strict_json import from_json, to_json

INDEX = "checkpoint.json"
STATE = Path("state") / "state.pt"


@dataclasses.dataclass(frozen=True)
class Retention:
    """Which checkpoints stay: the newest ``last``, multiples of ``every`` (0 is none), and the ``best`` held-out reward."""

    last: int
    every: int = 0
    best: bool = False

    def removable(self, found: Sequence[Path]) -> list[Path]:
        """Those of ``found`` (oldest first) that need not stay."""
        kept = set(found[-self.last :])
        if self.every:
            kept |= {path for path in found if _index(path)["iteration"] % self.every == 0}
        scored = [path for path in found if _index(path).get("held_out") is not None]
        if self.best and scored:
            kept.add(max(scored, key=lambda path: _index(path)["held_out"]))
        return [path for path in found if path not in kept]


def save_checkpoint(
    folder: Path,
    iteration: int,
    state: dict[str, Any],
    save_portable: Callable[[Path], None],
    retention: Retention,
    held_out: float | None = None,
) -> Path:
    """Write ``folder/step-<iteration>`` atomically, then remove what ``retention`` does not keep.

    Args:
        held_out: held-out reward of these weights, if it was measured now.
    """
    target = folder / f"step-{iteration:06d}"
    draft = folder / f".{target.name}.partial"
    shutil.rmtree(draft, ignore_errors=True)
    (draft / "state").mkdir(parents=True)
    try:
        save_portable(draft)
        torch.save(state, draft / STATE)
        files = sorted(p for p in draft.rglob("*") if p.is_file())
        index = {str(p.relative_to(draft)): {"bytes": p.stat().st_size, "sha256": _digest(p)} for p in files}
        (draft / INDEX).write_text(to_json({"iteration": iteration, "held_out": held_out, "files": index}, indent=1))
        for path in [*files, draft / INDEX, *{p.parent for p in files}, draft]:
            _flush(path)
        replaced = _set_aside(target)
        draft.rename(target)
        _flush(folder)
        shutil.rmtree(replaced, ignore_errors=True)
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise
    for old in retention.removable(checkpoints(folder)):
        if old != target:
            remove(old)
    return target


def remove(checkpoint: Path) -> None:
    """Delete a checkpoint; killed half-way it is gone, not damaged."""
    shutil.rmtree(_set_aside(checkpoint), ignore_errors=True)


def tidy(folder: Path) -> None:
    """Clear up after a killed run: drafts and half-deleted checkpoints go, a checkpoint set aside but not replaced returns."""
    for leftover in folder.glob(".step-*.removed"):
        home = folder / leftover.name.removeprefix(".").removesuffix(".removed")
        if not home.exists() and (leftover / INDEX).is_file() and _is_whole(leftover):
            leftover.rename(home)
    for leftover in folder.glob(".step-*"):
        shutil.rmtree(leftover, ignore_errors=True)


def abandon_later(folder: Path, iteration: int) -> list[Path]:
    """Rename checkpoints after ``iteration`` to ``abandoned-step-…``, so that none is taken for this run's newest."""
    later = [path for path in checkpoints(folder) if _index(path)["iteration"] > iteration]
    for path in later:
        target = path.with_name(f"abandoned-{path.name}")
        shutil.rmtree(target, ignore_errors=True)
        path.rename(target)
    return later


def _set_aside(checkpoint: Path) -> Path:
    """Take a checkpoint out of the list in one step; returns where it lies now."""
    aside = checkpoint.with_name(f".{checkpoint.name}.removed")
    if checkpoint.exists():
        shutil.rmtree(aside, ignore_errors=True)
        checkpoint.rename(aside)
    return aside


def _is_whole(checkpoint: Path) -> bool:
    return all((checkpoint / name).is_file() for name in _index(checkpoint)["files"])


def require_space(folder: Path, checkpoint_bytes: int, kept: int) -> None:
    """Refuse to start where the checkpoints would not fit: ``kept`` of them and the one being written.

    Raises:
        InputError: naming the folder, what is needed and what is free.
    """
    free = shutil.disk_usage(folder).free
    missing = max(1, kept + 1 - len(checkpoints(folder)))
    if missing * checkpoint_bytes > free:
        needed = f"{missing} more checkpoints of {checkpoint_bytes / 1e9:.1f} GB do not fit into {free / 1e9:.1f} GB"
        raise InputError(f"{folder}: {needed}; name another --out or lower output.keep_last")


def checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    return sorted(p.parent for p in folder.glob(f"step-*/{INDEX}"))


def load_state(checkpoint: Path) -> dict[str, Any]:
    """The state of a checkpoint, after checking size and SHA-256 of every file; mapped from disk, not read into memory.

    Raises:
        InputError: missing, truncated or altered files.
    """
    verify(checkpoint)
    return torch.load(checkpoint / STATE, map_location="cpu", mmap=True, weights_only=True)


def verify(checkpoint: Path) -> None:
    """Check size and SHA-256 of every file.

    Raises:
        InputError: missing, truncated or altered files.
    """
    for name, expected in _index(checkpoint)["files"].items():
        path = checkpoint / name
        if not path.is_file() or path.stat().st_size != expected["bytes"] or _digest(path) != expected["sha256"]:
            raise InputError(f"{path}: missing, truncated or altered; resume from an older checkpoint with --resume PATH")


def _index(checkpoint: Path) -> dict[str, Any]:
    try:
        index = from_json((checkpoint / INDEX).read_text())
        return {"files": index["files"], "iteration": index["iteration"], "held_out": index.get("held_out")}
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"{checkpoint}: not a complete checkpoint ({INDEX} is missing or damaged)") from error


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
