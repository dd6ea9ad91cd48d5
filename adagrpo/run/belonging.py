"""Whether a checkpoint that the user names is one of the run that goes on from it."""

from __future__ import annotations

import contextlib
from collections.abc import Collection
from pathlib import Path

from ..errors import InputError
from ..recipe.load import load_recipe
from .changes import changed_keys, refusals
from .checkpoint import checkpoints, read_index, verify

RECIPE = "config.toml"


def require_own(checkpoint: Path, run: Path, identity: str, recorded: Collection[str] = ()) -> None:
    """Refuse a checkpoint that is damaged, of another run or of another recipe.

    Where an id is not known (a lost manifest, a former version), only a checkpoint in the run's own folder is its own.

    Args:
        run: folder of the run.
        identity: the run's id by its manifest; '' if that is lost or has none.
        recorded: keys that earlier resumes of this run changed.

    Raises:
        InputError: it is.
    """
    theirs, ours = verify(checkpoint).run, identity or _id_of_checkpoints(run)
    if theirs and ours and theirs != ours:
        raise InputError(f"{checkpoint}: of another run ({theirs}; {run} is {ours}); name a checkpoint of this one")
    home = run / "checkpoints"
    if not (theirs and ours) and checkpoint.resolve().parent != home.resolve():
        unknown = "the checkpoint" if not theirs else f"{run}"
        raise InputError(
            f"{checkpoint}: not known to be of this run ({unknown} has no id); if it is, copy it into {home} and name it there"
        )
    _require_same_recipe(checkpoint, run, recorded)


def _id_of_checkpoints(run: Path) -> str:
    """The one id that the checkpoints of a folder have; '' if they have none or several."""
    found = set()
    for path in checkpoints(run / "checkpoints"):
        with contextlib.suppress(InputError, OSError):
            found.add(read_index(path).run)
    found.discard("")
    return found.pop() if len(found) == 1 else ""


def _require_same_recipe(checkpoint: Path, run: Path, recorded: Collection[str]) -> None:
    """Refuse a checkpoint whose recipe could not have become the run's by resuming."""
    if not (checkpoint / RECIPE).is_file():
        return
    there, here = load_recipe(checkpoint / RECIPE), load_recipe(run / RECIPE)
    changed = {key: pair for key, pair in changed_keys(there, here).items() if key not in recorded}
    if refused := refusals(there, here, changed):
        shown, why = refused
        raise InputError(f"{checkpoint}: of another recipe than {run}: {shown}; name a checkpoint of this run ({why})")
