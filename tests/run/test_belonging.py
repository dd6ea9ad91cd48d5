"""--resume PATH goes on from a checkpoint of this run only, also where ids are lost."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
from toy import toy_config, toy_trainer

from adagrpo.errors import InputError
from adagrpo.run.fit import Fit
from adagrpo.run.folder import RunFolder
from adagrpo.run.opening import opened

CONFIG = toy_config(train={"iterations": 2, "slots": 1}, output={"checkpoint_every": 1, "keep_last": 3})
OTHER_SEED = dataclasses.replace(CONFIG, train=dataclasses.replace(CONFIG.train, seed=4))


def finished(path: Path, config=CONFIG) -> Path:
    run, trainer = RunFolder.fresh(path), toy_trainer(config)
    run.write_start(config, trainer.model.device, {})
    Fit(trainer.config, trainer, run, ["a", "b", "c", "d"], say=lambda line: None)()
    return path


@pytest.fixture
def ours(tmp_path) -> Path:
    return finished(tmp_path / "ours")


@pytest.fixture
def theirs(tmp_path) -> Path:
    return finished(tmp_path / "theirs")


def resumed(run: Path, checkpoint: Path) -> Path | None:
    with opened(CONFIG, run, str(checkpoint)) as (_, found):
        return found


def former(checkpoint: Path) -> Path:
    """Make a checkpoint what earlier versions wrote: no id, no recipe, no records."""
    file = checkpoint / "checkpoint.json"
    index = json.loads(file.read_text())
    del index["seal"], index["run"]
    for name in ("config.toml", "base.json", "state/records.json"):
        (checkpoint / name).unlink()
        del index["files"][name]
    file.write_text(json.dumps(index))
    return checkpoint


STEP = Path("checkpoints") / "step-000001"


def test_a_lost_manifest_opens_the_folder_to_no_other_run(ours, theirs) -> None:
    (ours / "manifest.json").unlink()
    with pytest.raises(InputError, match="step-000001: of another run"):
        resumed(ours, theirs / STEP)
    assert resumed(ours, ours / STEP) == ours / STEP
    shutil.rmtree(ours / "checkpoints")
    (ours / "checkpoints").mkdir()
    with pytest.raises(InputError, match="not known to be of this run"):
        resumed(ours, theirs / STEP)
    assert not (ours / "manifest.json").exists()


def test_a_checkpoint_without_an_id_is_ours_in_our_folder_only(ours, theirs) -> None:
    with pytest.raises(InputError, match=r"the checkpoint has no id.*copy it into"):
        resumed(ours, former(theirs / STEP))
    assert resumed(ours, former(ours / STEP)) == ours / STEP


def test_a_run_without_an_id_takes_none_from_elsewhere(ours, theirs) -> None:
    (ours / "manifest.json").unlink()
    for number in (1, 2):
        former(ours / "checkpoints" / f"step-{number:06d}")
    with pytest.raises(InputError, match="ours has no id"):
        resumed(ours, theirs / STEP)
    assert resumed(ours, ours / STEP) == ours / STEP


def test_a_checkpoint_of_another_recipe_is_refused_wherever_it_lies(ours, tmp_path) -> None:
    other = finished(tmp_path / "other", OTHER_SEED)
    (ours / "manifest.json").unlink()
    shutil.rmtree(ours / STEP)
    shutil.copytree(other / STEP, ours / STEP)
    with pytest.raises(InputError, match=r"of another recipe than .*train.seed = 4 there, 0 here"):
        resumed(ours, ours / STEP)
