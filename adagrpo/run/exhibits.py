"""What a run shows beside its records: sample grids, the trace of an iteration, the live report."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ..disk.files import WriteError, replacing
from ..recipe.keys import OutputConfig
from ..report.page import write_report
from ..train import Trainer
from .folder import RunFolder
from .grid import save_grid
from .held_out import HeldOut
from .telling import Telling
from .trace import export_trace


class Exhibits:
    """Writes what a run can do without: a failure is told and ends nothing, but for a full disk.

    Args:
        config: what the recipe wants of them.
        trainer: of the policy.
        run: the folder.
        held_out: draws the grids.
        telling: told of failures.
    """

    def __init__(self, config: OutputConfig, trainer: Trainer, run: RunFolder, held_out: HeldOut, telling: Telling) -> None:
        self.config, self.trainer, self.run, self.held_out, self.telling = config, trainer, run, held_out, telling

    def iteration(self) -> dict[str, Any]:
        """One iteration of the trainer, under the profiler if the recipe wants its trace."""
        number = self.trainer.iterations_done + 1
        if number != self.config.trace_at or not self.trainer.ranks.writes:
            return self.trainer.iteration()
        with torch.profiler.profile() as profiler:
            metrics = self.trainer.iteration()
        path = self.run.path / "traces" / f"iteration-{number:06d}.json.gz"
        self._write(path, lambda draft: export_trace(profiler, draft))
        return metrics

    def grid(self, iteration: int) -> None:
        """A sample grid of fixed held-out prompts and noise, if the recipe wants any."""
        if not self.config.grid_every:
            return
        images, prompts, rewards = self.held_out.draw_grid(self.config.grid_prompts)
        path = self.run.samples / f"step-{iteration:06d}.png"
        if self._write(path, lambda draft: save_grid(Path(draft), images, prompts, rewards)):
            self.run.vouch(path)

    def report(self) -> None:
        """Rewrite the live report."""
        if not self.trainer.ranks.writes:
            return
        try:
            write_report([self.run.path], self.run.path / "report.html")
        except WriteError:
            raise
        except Exception as error:
            self.telling.warn(f"report.html could not be written: {type(error).__name__}: {error}")

    def _write(self, path: Path, write: Callable[[str], object]) -> bool:
        """Whether it was written; one rank does."""
        if not self.trainer.ranks.writes:
            return False
        try:
            with replacing(path) as draft:
                path.parent.mkdir(exist_ok=True)
                write(str(draft))
        except WriteError as error:
            if error.disk:
                raise
            self.telling.warn(f"{path.name} could not be written: {error.reason}")
            return False
        return True
