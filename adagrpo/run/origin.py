"""Where weights come from: the recipe and the base of a run, in its folder and in each checkpoint, so that a copied checkpoint
can be sampled and exported by itself and never acts on another base."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

from torch import Tensor

from ..disk.files import set_aside, write_json
from ..errors import InputError
from ..models.base import FlowModel
from ..models.fingerprint import (
    LEVELS,
    Fingerprint,
    base_components,
    difference,
    fingerprint,
    levels_print,
    trained_names,
)

RECIPE, BASE = "config.toml", "base.json"


class Origin:
    """The recipe and the base model of a run; compared with those that a folder was written under.

    Args:
        model: with its initial weights.
        path: of the model, for errors.
        recipe: as TOML.
        refers_to_start: whether fully trained tensors are measured against their initial values (the KL term).
        levels: noise levels that the run takes from the model, by what samples at them.
        say: told where an older version recorded nothing.
    """

    def __init__(
        self,
        model: FlowModel,
        path: str,
        recipe: str,
        refers_to_start: bool,
        levels: Mapping[str, Tensor],
        say: Callable[[str], object],
    ) -> None:
        self.base = fingerprint(base_components(model)) | levels_print(levels)
        self.path, self.recipe, self.say = path, recipe, say
        self.carried = {} if refers_to_start else trained_names(model)

    def begin(self, run: Path) -> str | None:
        """Record the base in the folder of a run at its first iteration.

        Returns:
            How it differs from the base of an earlier start in this folder, which left measurements of that one.
        """
        recorded = _read_base(run)
        write_json(run / BASE, self.base)
        return None if recorded is None else difference(recorded, self.base, {})

    @staticmethod
    def mend(run: Path, checkpoint: Path) -> list[str]:
        """Make the record in the folder of a run what a (verified) checkpoint of it says; what was wrong, as lines."""
        known, recorded = _read_base(checkpoint), _read_base(run)
        if known is None or recorded == known:
            return []
        aside = f": set aside as {set_aside(file).name}" if (file := run / BASE).exists() else ""
        write_json(run / BASE, known)
        return [f"{BASE} was missing or damaged{aside}; written anew from the checkpoint"]

    def write(self, folder: Path) -> None:
        """Put recipe and fingerprint into a checkpoint that is being written."""
        (folder / RECIPE).write_text(self.recipe, "utf-8")
        write_json(folder / BASE, self.base)

    def check(self, checkpoint: Path) -> None:
        """Refuse a checkpoint whose base was another model; what it carries itself is of no matter.

        Raises:
            InputError: naming component and tensor.
        """
        recorded = _read_base(checkpoint) or _read_base(checkpoint.absolute().parent.parent)
        if recorded is None:
            self.say(f"{checkpoint}: records no fingerprint of its base model (an older version's): not compared")
            return
        if LEVELS in self.base and LEVELS not in recorded:
            self.say(f"{checkpoint}: records no noise levels of its model's own (an older version's): not compared")
        other = difference(recorded, self.base, self.carried)
        if other is not None:
            began = "began from another model than this one"
            raise InputError(
                f"{checkpoint}: {began}, model.path = {self.path}: {other}; restore that model, or start a new run"
            )


def recipe_file(checkpoint: Path) -> Path:
    """The recipe of a checkpoint: its own, or its run folder's where it was written before checkpoints had one.

    Raises:
        InputError: neither is there.
    """
    places = checkpoint / RECIPE, checkpoint.absolute().parent.parent / RECIPE
    for place in places:
        if place.is_file():
            return place
    raise InputError(
        f"{checkpoint}: holds no {RECIPE}: an older version wrote it, and kept the recipe in the run folder; copy that to "
        f"{places[1]}, or name the run folder"
    )


def _read_base(folder: Path) -> Fingerprint | None:
    """The fingerprint in a run or checkpoint folder; None where there is none, or none that can be read."""
    try:
        found = json.loads((folder / BASE).read_text("utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) and all(isinstance(part, dict) for part in found.values()) else None
