"""Every file of a run follows the umask, also what libraries write through temporary files of their own."""

import os

import pytest
import torch
from safetensors.torch import save_file
from toy import ToyModel, toy_config, toy_trainer

from adagrpo.run.fit import Fit
from adagrpo.run.folder import RunFolder


class Safe(ToyModel):
    """Writes its weights as diffusers does."""

    def save_portable(self, folder) -> None:
        (folder / "transformer").mkdir()
        save_file(
            {k: v.contiguous() for k, v in self.transformer.state_dict().items()}, folder / "transformer" / "w.safetensors"
        )


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077])
def test_files_follow_the_umask(umask: int, tmp_path) -> None:
    config = toy_config(train={"iterations": 2, "slots": 1}, output={"grid_every": 1, "grid_prompts": 2, "checkpoint_every": 1})
    before = os.umask(umask)
    try:
        run = RunFolder.fresh(tmp_path / "run")
        trainer = toy_trainer(config, Safe())
        run.write_start(config, torch.device("cpu"), {})
        Fit(trainer.config, trainer, run, ["a", "b"], say=lambda line: None)()
    finally:
        os.umask(before)
    modes = {p.relative_to(run.path).as_posix(): p.stat().st_mode & 0o777 for p in run.path.rglob("*")}
    wrong = {name: oct(m) for name, m in modes.items() if m != (0o777 if (run.path / name).is_dir() else 0o666) & ~umask}
    assert not wrong and "checkpoints/step-000002/transformer/w.safetensors" in modes
