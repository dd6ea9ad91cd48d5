"""One rank writes the run folder and speaks to the user."""

import dataclasses
from pathlib import Path

import pytest
from toy import toy_config, toy_trainer

from adagrpo.engine.ranks import Ranks
from adagrpo.run.fit import Fit
from adagrpo.run.folder import RunFolder


@pytest.mark.parametrize("rank", [0, 1])
def test_events_report_and_pictures_are_the_first_ranks(rank: int, tmp_path: Path) -> None:
    trainer, lines = toy_trainer(toy_config(output={"grid_every": 1, "grid_prompts": 2})), []
    run = RunFolder.fresh(tmp_path / "run")
    run.write_start(trainer.config, trainer.model.device, {})
    fit = Fit(trainer.config, trainer, run, ["a", "b"], say=lines.append)
    trainer.ranks = dataclasses.replace(Ranks(), rank=rank, size=2)
    before = sorted(path.name for path in run.path.rglob("*"))
    trainer.notices("something to tell")
    fit.exhibits.grid(1)
    fit.exhibits.report()
    written = {path.name for path in run.path.rglob("*")} - set(before)
    assert bool(lines) is (rank == 0)
    assert ({"events.jsonl", "step-000001.png", "report.html"} <= written) if rank == 0 else not written
