"""Checkpoints that are whole or absent.

``step-000050/`` holds a portable part that diffusers loads (``transformer/`` or ``pytorch_lora_weights.safetensors``),
``state/state.pt`` with everything else, and ``checkpoint.json`` with size and SHA-256 of every file. It is written beside
its place, flushed to disk and renamed.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ..errors import InputError

INDEX = "checkpoint.json"
STATE = Path("state") / "state.pt"


def save_checkpoint(
    folder: Path, iteration: int, state: dict[str, Any], save_portable: Callable[[Path], None], keep_last: int
) -> Path:
    """Write ``folder/step-<iteration>`` atomically, then remove all but the newest ``keep_last``."""
    target = folder / f"step-{iteration:06d}"
    draft = folder / f".{target.name}.partial"
    shutil.rmtree(draft, ignore_errors=True)
    (draft / "state").mkdir(parents=True)
    try:
        save_portable(draft)
        torch.save(state, draft / STATE)
        files = sorted(p for p in draft.rglob("*") if p.is_file())
        index = {str(p.relative_to(draft)): {"bytes": p.stat().st_size, "sha256": _digest(p)} for p in files}
        (draft / INDEX).write_text(json.dumps({"iteration": iteration, "files": index}, indent=1))
        for path in [*files, draft / INDEX, *{p.parent for p in files}, draft]:
            _flush(path)
        shutil.rmtree(target, ignore_errors=True)
        draft.rename(target)
        _flush(folder)
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise
    for old in checkpoints(folder)[:-keep_last]:
        shutil.rmtree(old)
    return target


def checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    return sorted(p.parent for p in folder.glob(f"step-*/{INDEX}"))


def load_state(checkpoint: Path, device: torch.device | str = "cpu") -> dict[str, Any]:
    """The state of a checkpoint, after checking size and SHA-256 of every file.

    Raises:
        InputError: missing, truncated or altered files.
    """
    try:
        files = json.loads((checkpoint / INDEX).read_text())["files"]
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"{checkpoint}: not a complete checkpoint ({INDEX} is missing or damaged)") from error
    for name, expected in files.items():
        path = checkpoint / name
        if not path.is_file() or path.stat().st_size != expected["bytes"] or _digest(path) != expected["sha256"]:
            raise InputError(f"{path}: missing, truncated or altered; resume from an older checkpoint with --resume PATH")
    return torch.load(checkpoint / STATE, map_location=device, weights_only=True)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
