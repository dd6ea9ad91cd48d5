"""Checkpoints that are whole or absent.

``step-000050/`` holds a portable part that diffusers loads (``transformer/`` or ``pytorch_lora_weights.safetensors``),
``state/state.pt`` with everything that decides how the run goes on, ``state/records.json`` with what the run folder's other
files were, and ``checkpoint.json`` with size and SHA-256 of every file. It is written beside its place, flushed to disk and
renamed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import re
import shutil
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import torch

from ..disk.files import SEAL, flush, is_sealed, read_json, sealed, settle, writing
from ..errors import InputError
from ..text.strict_json import to_json

INDEX = "checkpoint.json"
STATE = Path("state") / "state.pt"
RECORDS = Path("state") / "records.json"
_WEIGHTS = frozenset({".safetensors", ".bin", ".pt"})
_NAME = re.compile(r"step-(\d+)")


class DamagedError(InputError):
    """A checkpoint that is not what was written."""


@dataclasses.dataclass(frozen=True)
class Index:
    """What ``checkpoint.json`` says.

    Attributes:
        files: path within the checkpoint → (bytes, SHA-256).
        held_out: held-out reward of these weights, if it was measured then.
        run: id of the run that wrote it; '' of a former version.
    """

    iteration: int
    held_out: float | None
    files: dict[str, tuple[int, str]]
    run: str = ""


@dataclasses.dataclass(frozen=True)
class Retention:
    """Which checkpoints stay: the newest ``last``, multiples of ``every`` (0 is none), and the ``best`` held-out reward."""

    last: int
    every: int = 0
    best: bool = False

    def removable(self, found: Sequence[Path]) -> list[Path]:
        """Those of ``found`` (oldest first) that need not stay; one that cannot be read takes nobody's place, and stays."""
        indices = {path: index for path in found if (index := _readable(path)) is not None}
        kept = set(list(indices)[-self.last :])
        if self.every:
            kept |= {path for path, index in indices.items() if index.iteration % self.every == 0}
        scored = {path: index.held_out for path, index in indices.items() if index.held_out is not None}
        if self.best and scored:
            kept.add(max(scored, key=lambda path: scored[path]))
        return [path for path in indices if path not in kept]


def save_checkpoint(
    folder: Path,
    iteration: int,
    state: dict[str, Any],
    save_portable: Callable[[Path], None],
    retention: Retention | None,
    held_out: float | None = None,
    records: dict[str, Any] | None = None,
    run: str = "",
) -> Path:
    """Write ``folder/step-<iteration>`` atomically, then remove what ``retention`` does not keep.

    Args:
        retention: None removes nothing.
        held_out: held-out reward of these weights, if it was measured now.
        records: what ``RunFolder.records`` gives.
        run: id of the run.

    Raises:
        WriteError: it cannot be written; earlier checkpoints are intact.
    """
    target = folder / f"step-{iteration:06d}"
    draft = folder / f".{target.name}.partial"
    shutil.rmtree(draft, ignore_errors=True)
    try:
        with writing(target):
            (draft / "state").mkdir(parents=True)
            save_portable(draft)
            with (draft / STATE).open("xb") as file:  # by path torch loses the system's reason for a failure
                torch.save(state, file)
            (draft / RECORDS).write_text(to_json(records), "utf-8")
            files = sorted(p for p in draft.rglob("*") if p.is_file())
            listed = {str(p.relative_to(draft)): {"bytes": p.stat().st_size, "sha256": _digest(p)} for p in files}
            index = sealed({"iteration": iteration, "held_out": held_out, "run": run, "files": listed})
            (draft / INDEX).write_text(to_json(index, indent=1), "utf-8")
            settle(draft)
            replaced = _set_aside(target)
            draft.rename(target)
            flush(folder)
            shutil.rmtree(replaced, ignore_errors=True)
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise
    with writing(folder):
        for old in retention.removable(checkpoints(folder)) if retention else ():
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
        if not home.exists() and _is_whole(leftover):
            leftover.rename(home)
    for leftover in folder.glob(".step-*"):
        shutil.rmtree(leftover, ignore_errors=True)


def abandon_later(folder: Path, checkpoint: Path, iteration: int, damaged: Collection[Path] = ()) -> list[str]:
    """Rename checkpoints after ``checkpoint``, of ``iteration``, so that none is taken for this run's newest, nor written over;
    another one of this very iteration too.

    Sound ones become ``abandoned-step-…``, those that cannot be read or are known as ``damaged`` become ``damaged-step-…``;
    returns a line on each.
    """
    lines = []
    for path in checkpoints(folder):
        if _number(path) < iteration or (_number(path) == iteration and path.samefile(checkpoint)):
            continue
        bad = path in damaged or _readable(path) is None
        word, why = ("damaged", "not sound") if bad else ("abandoned", "later than the checkpoint that the run goes on from")
        target = path.with_name(f"{word}-{path.name}")
        if target.is_dir():
            shutil.rmtree(target, ignore_errors=True)
        path.rename(target)
        lines.append(f"{path.name} is {why}: renamed to {target.name}")
    return lines


def _set_aside(checkpoint: Path) -> Path:
    """Take a checkpoint out of the list in one step; returns where it lies now."""
    aside = checkpoint.with_name(f".{checkpoint.name}.removed")
    if checkpoint.exists():
        shutil.rmtree(aside, ignore_errors=True)
        checkpoint.rename(aside)
    return aside


def _is_whole(checkpoint: Path) -> bool:
    index = _readable(checkpoint)
    return index is not None and all((checkpoint / name).is_file() for name in index.files)


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
    """Everything that has a checkpoint's name, damaged or not, oldest first."""
    return sorted((p for p in folder.glob("step-*") if _NAME.fullmatch(p.name)), key=_number)


def newest_readable(folder: Path) -> Path | None:
    """The newest checkpoint whose index can be read; its files are not looked at."""
    return next((path for path in reversed(checkpoints(folder)) if _readable(path) is not None), None)


def newest_sound(folder: Path, run: str = "", before: int | None = None) -> tuple[Path | None, dict[Path, str]]:
    """The newest checkpoint that is what was written, and why newer ones are not; every file of it is read.

    Args:
        run: id of the run; checkpoints of another one are skipped, unless all are.
        before: only those of earlier iterations; None is all.
    """
    found = [path for path in reversed(checkpoints(folder)) if before is None or _number(path) < before]
    own = {path for path in found if (index := _readable(path)) is not None and index.run in ("", run)}
    skipped: dict[Path, str] = {}
    for path in found:
        try:
            if own and path not in own and _readable(path) is not None:
                raise DamagedError(f"{path}: of another run")
            verify(path)
        except (InputError, OSError) as error:
            skipped[path] = f"{path.name} is skipped: {str(error).removeprefix(str(path)).lstrip('/: ').partition('; ')[0]}"
            continue
        return path, skipped
    return None, skipped


def load_state(checkpoint: Path) -> dict[str, Any]:
    """The state of a (verified) checkpoint; mapped from disk, not read into memory."""
    return torch.load(checkpoint / STATE, map_location="cpu", mmap=True, weights_only=True)


def load_records(checkpoint: Path) -> dict[str, Any] | None:
    """What the run folder's files were when a (verified) checkpoint was written; None for one of a former version."""
    return read_json(checkpoint / RECORDS)


def verify(checkpoint: Path, state: bool = True) -> Index:
    """Check size and SHA-256 of every file, and that no other weights lie among them.

    Args:
        state: of ``state/`` too, which only a resumed run needs.

    Raises:
        DamagedError: missing, truncated or altered files.
    """
    index = read_index(checkpoint)
    for name, (size, digest) in index.files.items():
        path = checkpoint / name
        if not state and Path(name).parts[0] == STATE.parent.name:
            continue
        if not path.is_file() or path.stat().st_size != size or _digest(path) != digest:
            raise DamagedError(
                f"{path}: missing, truncated or altered; resume from an older checkpoint with --resume PATH, "
                "or from the newest sound one with --resume latest"
            )
    for path in checkpoint.rglob("*"):
        if path.suffix in _WEIGHTS and str(path.relative_to(checkpoint)) not in index.files:
            raise DamagedError(f"{path}: weights that this checkpoint was not written with; remove them")
    return index


def read_index(checkpoint: Path) -> Index:
    """What ``checkpoint.json`` says.

    Raises:
        DamagedError: it is missing or damaged.
    """
    problem = "missing or damaged"
    with contextlib.suppress(ValueError, KeyError, TypeError, AttributeError):
        value = read_json(checkpoint / INDEX)
        files = {name: (entry["bytes"], entry["sha256"]) for name, entry in value["files"].items()}
        index = Index(value["iteration"], value.get("held_out"), files, value.get("run", ""))
        if problem := _problem(checkpoint, value, index):
            raise ValueError(problem)
        return index
    raise DamagedError(f"{checkpoint}: not a complete checkpoint ({INDEX} is {problem})")


def _problem(checkpoint: Path, value: dict[str, Any], index: Index) -> str:
    """What is wrong with an index, or ''."""
    numbers = type(index.iteration) is int and index.iteration >= 0 and type(index.held_out) in (type(None), float, int)
    entries = all(type(size) is int and type(digest) is str for size, digest in index.files.values())
    if not numbers or not entries or str(STATE) not in index.files or type(index.run) is not str:
        return "damaged"
    if (SEAL in value or str(RECORDS) in index.files) and not is_sealed(value):
        return "altered"
    named = re.fullmatch(r"(?:\w+-)?step-(\d+)", checkpoint.name)
    return "of another iteration" if named and int(named[1]) != index.iteration else ""


def _readable(checkpoint: Path) -> Index | None:
    try:
        return read_index(checkpoint)
    except (InputError, OSError):
        return None


def _number(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step-"))


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
