"""Opening a run folder: alone in it, at its start or at a checkpoint."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from ..disk.lock import OwnerLock, holding, is_claimed, require_free
from ..engine.ranks import Ranks
from ..errors import InputError
from ..recipe.keys import Config
from .changes import NO_CHANGES
from .folder import EARLIER, RANKS, RunFolder
from .onlooker import Onlooker


@contextlib.contextmanager
def opened(
    config: Config, out: Path | None, resume: str | None, take_over: bool = False
) -> Iterator[tuple[RunFolder, Path | None]]:
    """The run folder, this process's alone while inside, and the checkpoint to continue from.

    Args:
        out: the folder; None is the next free one below ``runs/``.
        resume: None starts a run, ``latest`` continues one, ``auto`` does what is possible; else a checkpoint's path.
        take_over: see ``OwnerLock``.

    Raises:
        InputError: another process owns the folder, or it does not hold what is asked for. Nothing in it was touched.
    """
    if out is None:
        if resume is not None:
            raise InputError(f"--resume {resume}: name the run folder with --out")
        lock = next_free(Path("runs"), config.name)
        try:
            yield RunFolder.fresh(lock.folder, lock), None
        finally:
            lock.release()
        return
    _check_place(out, resume)
    with holding(OwnerLock(out, "train", f"--out {out}", take_over=take_over)) as lock:
        yield _entered(config, out, resume, lock)


@contextlib.contextmanager
def opened_together(
    ranks: Ranks, config: Config, out: Path | None, resume: str | None, take_over: bool = False
) -> Iterator[tuple[RunFolder, Path | None]]:
    """The folder that the first rank has ``opened``; the others read it, and write nothing into it.

    Raises:
        InputError: see ``opened``.
    """
    with contextlib.ExitStack() as opening:
        own: list[RunFolder] = []

        def enter() -> tuple[Path, bool, Path | None]:
            run, checkpoint = opening.enter_context(opened(config, out, resume, take_over))
            own.append(run)
            return run.path, run.continued, checkpoint and checkpoint.absolute()

        path, continued, checkpoint = ranks.told(enter, "the opening of the run folder")
        yield own[0] if own else Onlooker(path, continued), checkpoint


def _entered(config: Config, out: Path, resume: str | None, lock: OwnerLock) -> tuple[RunFolder, Path | None]:
    """See ``opened``; the folder is locked."""
    if resume is None or (resume == "auto" and not (out / "config.toml").exists()):
        return RunFolder.fresh(out, lock), None
    if resume in ("latest", "auto") and RunFolder.never_saved(out):
        if resume == "latest":
            raise _nothing_saved(out)
        try:
            return RunFolder.existing(out, config, lock), None
        except InputError:  # a start by another recipe, or killed while it was written down
            return RunFolder.fresh(out, lock), None
    run = RunFolder.existing(out, config, lock)
    if resume in ("latest", "auto"):
        if (found := run.sound_checkpoint()) is None:
            raise InputError(f"--resume {resume}: {run.checkpoints} holds no complete checkpoint")
        return run, found
    run.require_own(Path(resume))
    return run, Path(resume)


def begin(run: RunFolder, config: Config, device: torch.device, extra: dict[str, Any]) -> str:
    """Start a run in its folder; a start that came to no checkpoint there is moved into a folder of its own.

    Returns:
        What to tell the user; empty where nothing lay there.

    Raises:
        InputError: the folder cannot be written.
    """
    moved, run.changes = _set_aside(run.path), NO_CHANGES  # a new run, whatever the earlier start's recipe was
    run.write_start(config, device, extra)
    return f"an earlier start that came to no checkpoint was moved to {moved}" if moved else ""


def _set_aside(folder: Path) -> Path | None:
    """Move what an earlier start wrote; the recipe, by which a run is known, goes last."""
    names = {path.name for path in folder.iterdir() if not path.name.startswith((".", EARLIER))} - {"checkpoints", RANKS}
    if "config.toml" not in names:
        return None
    number = 1
    while (target := folder / f"{EARLIER}{number:03d}").exists():
        number += 1
    target.mkdir()
    for name in sorted(names, key=lambda name: (name == "config.toml", name)):
        (folder / name).rename(target / name)
    return target


def next_free(parent: Path, name: str) -> OwnerLock:
    """``parent/name-001``, or the first number not taken: made and held.

    Raises:
        InputError: it cannot be made.
    """
    number = 0
    while True:
        number += 1
        path = parent / f"{name}-{number:03d}"
        try:
            parent.mkdir(parents=True, exist_ok=True)
            path.mkdir()
        except FileExistsError:
            if not parent.is_dir():
                raise InputError(f"{parent}: not a folder; name another one with --out") from None
            continue
        except OSError as error:
            raise InputError(f"{path}: cannot be created: {error.strerror}; name another folder with --out") from error
        lock = OwnerLock(path, "train", str(path), made=[path])
        try:
            lock.acquire()
        except InputError:
            if path.exists():  # somebody who named it with --out was faster
                continue
            raise
        return lock


def check_opening(config: Config, out: Path, resume: str | None) -> None:
    """Refuse what ``opened`` would refuse, without touching anything; checkpoints are not read.

    Raises:
        InputError: another process owns the folder, or it does not hold what is asked for, or cannot be written.
    """
    _check_place(out, resume)
    with _naming(out):
        require_free(out, f"--out {out}")
        saved = not RunFolder.never_saved(out)
        if resume is None:
            RunFolder.check_fresh(out)
        elif saved or resume != "auto":
            RunFolder.changes_to(out, config)
            if resume == "latest" and not saved:
                raise _nothing_saved(out)


def _check_place(out: Path, resume: str | None) -> None:
    """Refuse what no run can live in, before a lock file is put there; where an owner signed, the lock tells more."""
    with _naming(out):
        if is_claimed(out):
            return
        if resume in (None, "auto"):
            RunFolder.check_place(out)
        elif not (out / "config.toml").is_file():
            raise InputError(f"--out {out}: no run to resume there (config.toml is missing)")


def _nothing_saved(out: Path) -> InputError:
    nothing = f"--resume latest: {out / 'checkpoints'} holds no complete checkpoint"
    return InputError(f"{nothing}; with --resume auto, or without --resume, the run starts anew")


@contextlib.contextmanager
def _naming(out: Path) -> Iterator[None]:
    """A path that the system refuses is bad input."""
    try:
        yield
    except OSError as error:
        raise InputError(f"--out {out}: cannot be used: {error.strerror}") from error
