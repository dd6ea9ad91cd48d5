"""Runs the toy recipe once per named moment, each in a child that kills itself there with SIGKILL. Used by test_crash.py."""

import os
import signal
import sys
from pathlib import Path

import torch
from toy import toy_trainer

from adagrpo.engine.executor import RolloutExecutor
from adagrpo.engine.optimizer import PolicyOptimizer
from adagrpo.recipe.keys import Config
from adagrpo.recipe.load import load_recipe
from adagrpo.run.fit import Fit
from adagrpo.run.folder import RunFolder

MOMENTS = ("probe", "rollout", "update", "write", "rename")
HELD_OUT = ["a", "b", "c", "d"]


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def plant(moment: str) -> None:
    """Arrange for death in the fourth iteration, or while its checkpoint is written or renamed."""
    run, step, save, rename = RolloutExecutor.run, PolicyOptimizer.step, torch.save, Path.rename

    def deadly_run(self, plan, x, conditioning, iteration, phase, **rest):
        if phase == moment and iteration == 3:
            run(self, plan, x, conditioning, iteration, phase, **rest)
            die()
        return run(self, plan, x, conditioning, iteration, phase, **rest)

    def deadly_step(self):
        norm = step(self)
        if moment == "update" and self.steps == 4:
            die()
        return norm

    def deadly_save(state, file):
        if moment == "write" and state.get("trainer", {}).get("iterations_done") == 4:
            os.write(file.fileno(), b"half a checkpoint")
            die()
        save(state, file)

    def deadly_rename(self, target):
        if moment == "rename" and target.name == "step-000004":
            die()
        return rename(self, target)

    RolloutExecutor.run, PolicyOptimizer.step, torch.save, Path.rename = deadly_run, deadly_step, deadly_save, deadly_rename


def child(config: Config, folder: Path, moment: str) -> None:
    torch.set_num_threads(1)
    plant(moment)
    run = RunFolder.fresh(folder)
    trainer = toy_trainer(config)
    run.write_start(config, trainer.model.device, {})
    Fit(trainer.config, trainer, run, HELD_OUT, say=lambda line: None)()


if __name__ == "__main__":
    base = Path(sys.argv[1])
    recipe = load_recipe(base / "recipe.toml")
    for name in MOMENTS:
        pid = os.fork()
        if pid == 0:
            child(recipe, base / name, name)
            os._exit(0)
        _, status = os.waitpid(pid, 0)
        print(name, os.waitstatus_to_exitcode(status))
