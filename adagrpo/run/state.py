"""All state of a run, between memory and its checkpoints: saved, restored, rolled back."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from ..assembly import own_noise_levels
from ..disk.files import WriteError, writing
from ..errors import InputError, RunError
from ..parts.isolation import own
from ..recipe.derived import Derived
from ..recipe.keys import Config
from ..recipe.load import to_toml
from ..train import Trainer
from .checkpoint import Retention, abandon_later, load_state, save_checkpoint
from .folder import RunFolder
from .guards import Guards
from .held_out import HeldOut
from .origin import Origin
from .telling import Telling


class RunState:
    """What a run is after its last finished iteration, and how that goes into a checkpoint and comes back.

    Args:
        config: the recipe.
        trainer: at its initial weights.
        run: the folder.
        held_out: has the scores of the initial policy.
        telling: told what was damaged on the way.

    Attributes:
        origin: recipe and base model.
        guards: watch the records.
        rollbacks: how many there were.
        best: highest held-out reward.
        unfinished: record of an iteration that is trained and not judged yet.
        sound: whether the last finished iteration may be saved.
        saved: whether it is.
        held_out_now: its held-out reward, if it was evaluated.
    """

    def __init__(self, config: Config, trainer: Trainer, run: RunFolder, held_out: HeldOut, telling: Telling) -> None:
        self.config, self.trainer, self.run, self.held_out, self.telling = config, trainer, run, held_out, telling
        base = self.config.model.path, to_toml(self.config), Derived(self.config).initial_model_read
        self.origin = Origin(trainer.model, *base, own_noise_levels(self.config, trainer.model), telling.warn)
        self.guards = Guards(self.config.guards)
        self.rollbacks, self.best = 0, -math.inf
        self.unfinished: dict[str, Any] | None = None
        self.sound, self.saved = False, False
        self.held_out_now: float | None = None

    def save(self, held_out: float | None = None) -> Path:
        """Write a checkpoint, by the first rank; its portable part holds the weight EMA where one is kept.

        Raises:
            RunError: it cannot be written; earlier checkpoints are intact.
        """
        path = self.trainer.ranks.told(lambda: self._save(held_out), "a checkpoint")
        self.saved = True
        return path

    def _save(self, held_out: float | None) -> Path:
        """See ``save``."""

        def portable(folder: Path) -> None:
            with self.trainer.optimizer.averaged_weights():
                self.trainer.model.save_portable(folder)
            self.origin.write(folder)

        self.run.require_ownership()
        o = self.config.output
        state = {
            "trainer": self.trainer.state_dict(),
            "guards": self.guards.state_dict(),
            "rollbacks": self.rollbacks,
            "best": self.best,
            "held_out": self.held_out.measure,
            "baseline": self.held_out.baseline,
            "unfinished": self.unfinished,
        }
        if reference := getattr(self.trainer.model, "reference_adapters", None):
            state["reference"] = reference
        # An iteration that is not judged yet takes the place of none that is.
        retention = Retention(o.keep_last, o.keep_every, o.keep_best) if self.unfinished is None else None
        done = self.trainer.iterations_done
        try:
            records, run = self.run.records(), self.run.identity()
            return save_checkpoint(self.run.checkpoints, done, state, portable, retention, held_out, records, run)
        except WriteError as error:
            kept = self.run.latest_checkpoint()
            raise RunError(
                f"checkpoint of iteration {done} could not be written to {self.run.checkpoints}: {error.reason}; "
                f"{error.remedy} or lower output.keep_last, then continue with --resume auto "
                f"(last complete checkpoint: {kept or 'none'})"
            ) from error

    def save_last(self) -> Path | None:
        """Save the last finished iteration if it may be and is not yet; the last complete checkpoint.

        Raises:
            RunError: it cannot be written.
        """
        if self.sound and not self.saved:
            return self.save(self.held_out_now)
        return self.trainer.ranks.told(self.run.latest_checkpoint, "the last checkpoint")

    def resume(self, checkpoint: Path, verified: bool = False) -> None:
        """Continue from ``checkpoint``: later lines of ``metrics.jsonl`` are dropped, later checkpoints renamed.

        Args:
            verified: its files were checked a moment ago.

        Raises:
            InputError: the checkpoint is damaged, or of another model, run or recipe.
            WriteError: the records of the run cannot be brought back to where they were.
        """
        ranks = self.trainer.ranks
        if not verified:
            ranks.told(lambda: self.run.require_own(checkpoint), "a checkpoint to resume")
        self.origin.check(checkpoint)
        try:
            self._restore(checkpoint)
        except (KeyError, ValueError, RuntimeError, TypeError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(f"{checkpoint}: a checkpoint of another model or recipe ({error})") from error
        ranks.told(lambda: self._restore_records(checkpoint), "the records of the run")

    def roll_back(self, iteration: int) -> str:
        """Restore the last checkpoint before ``iteration``, but go on with prompts and noise not used yet.

        Returns:
            Why it is not possible; empty where it was done.
        """
        ranks = self.trainer.ranks
        checkpoint, reason = ranks.told(lambda: self._checkpoint_before(iteration), "a checkpoint to roll back to")
        if self.rollbacks >= self.config.guards.max_rollbacks:
            checkpoint, reason = None, f"{self.rollbacks} rollbacks already"
        if checkpoint is None:
            return reason
        draws, position, rollbacks = self.trainer.draws, self.trainer.stream.position, self.rollbacks + 1
        limit = self.trainer.executor.limit.state
        self._restore(checkpoint)
        ranks.told(lambda: self._restore_records(checkpoint), "the records of the run")
        self.trainer.draws, self.trainer.stream.position, self.rollbacks = draws, position, rollbacks
        self.trainer.executor.limit.state = limit  # memory is what it is, whatever the weights
        return ""

    def _checkpoint_before(self, iteration: int) -> tuple[Path | None, str]:
        """The last sound one before ``iteration``, not that of a judged iteration itself, which is saved where a part hung
        before it was judged; and why there is none."""
        try:
            return self.run.sound_checkpoint(before=iteration), "no checkpoint yet"
        except InputError as error:
            return None, str(error)

    def _restore(self, checkpoint: Path) -> None:
        """Trainer, guards and counters from a verified checkpoint."""
        state = load_state(checkpoint)
        self.trainer.load_state_dict(state["trainer"])
        self.guards.load_state_dict(state["guards"])
        self.rollbacks, self.best = state["rollbacks"], state["best"]
        self.unfinished = state.get("unfinished")
        if "reference" in state:
            model: Any = self.trainer.model
            model.reference_adapters = {name: t.to(model.device, copy=True) for name, t in state["reference"].items()}
        if state.get("held_out", self.held_out.measure) != self.held_out.measure:  # a best of other prompts is none of these
            self.best = -math.inf
            self.guards.forget_best()
        self.held_out.baseline = own(state.get("baseline", self.held_out.baseline))

    def _restore_records(self, checkpoint: Path) -> None:
        """The run folder as it was when ``checkpoint`` was written; what was damaged or lies later is told."""
        done = self.trainer.iterations_done
        with writing(self.run.checkpoints):  # first: metrics are cut next, and a later checkpoint must not find its own gone
            self.run.notices += abandon_later(self.run.checkpoints, checkpoint, done, self.run.skipped)
        self.run.restore(done, checkpoint)
        self.run.notices += self.origin.mend(self.run.path, checkpoint)
        if done < self.config.train.iterations:
            self.run.retire("result.json")
        self.telling.notices()
