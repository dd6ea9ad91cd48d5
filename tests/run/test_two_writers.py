"""Whoever comes second to a folder, by whatever command, leaves it as it is; who only reads is welcome."""

import dataclasses
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from toy import toy_config

from adagrpo.cli import main
from adagrpo.recipe.keys import RewardConfig
from adagrpo.recipe.load import to_toml

HERE = Path(__file__).parent
WAITING = """
import os, time
import parts
from toy import half_bright

def reward():
    def score(images, prompts):
        if "STAND_STILL" in os.environ and os.path.exists({go!r}):
            open({there!r}, "a").close()
            while True:
                time.sleep(0.05)
        return half_bright(images, prompts)
    return score
"""


def snapshot(folder: Path) -> dict[str, tuple[bytes, float]]:
    """Bytes and time of every file, and every folder; the owner's record is touched by its heartbeat."""
    return {
        str(p.relative_to(folder)): (p.read_bytes(), p.stat().st_mtime if p.name != ".owner.json" else 0)
        if p.is_file()
        else (b"folder", 0)
        for p in folder.rglob("*")
    }


def wait_for(path: Path, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 120
    while not path.exists():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.02)


@pytest.fixture(scope="module")
def live(tmp_path_factory):
    """A run in another process, with a checkpoint and a draft of the next, that stands still in the middle of an iteration."""
    base = tmp_path_factory.mktemp("live")
    go, there = base / "go", base / "there"
    (base / "waiting.py").write_text(WAITING.format(go=str(go), there=str(there)))
    config = toy_config(
        model={"family": "parts:model", "device": "cpu"},
        data={"prompts": "parts:prompts", "held_out": "parts:held_out"},
        rewards=(RewardConfig("waiting:reward"),),
        train={"iterations": 200, "slots": 1},
        evaluation={"every": 0, "final_prompts": 0},
        output={"grid_every": 0, "checkpoint_every": 1},
        name="toy",
    )
    (base / "toy.toml").write_text(to_toml(config))
    code = "import sys; from adagrpo.cli import main; sys.exit(main())"
    paths = os.environ | {
        "PYTHONPATH": ":".join([str(base), str(HERE.parent), *sys.path]),
        "OMP_NUM_THREADS": "1",
        "STAND_STILL": "1",
    }
    command = [sys.executable, "-c", code, "train", str(base / "toy.toml"), "--out", str(base / "run")]
    process = subprocess.Popen(command, env=paths, cwd=base, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        wait_for(base / "run" / "checkpoints" / "step-000002" / "checkpoint.json", process)
        go.touch()
        wait_for(there, process)
        (base / "run" / "checkpoints" / ".step-000009.partial").mkdir()
        sys.path.insert(0, str(base))
        yield base, process
    finally:
        process.kill()
        process.communicate()
        sys.path.remove(str(base))


def seconds(base: Path) -> list[list[str]]:
    recipe, run = str(base / "toy.toml"), str(base / "run")
    train = ["train", recipe, "--out", run]
    (checkpoint, *_) = sorted((base / "run" / "checkpoints").glob("step-*"))
    return [
        train,
        [*train, "--resume", "latest"],
        [*train, "--resume", "auto"],
        [*train, "--resume", str(checkpoint)],
        [*train, "--resume", "auto", "--take-over"],
        [*train, "--train.seed", "5"],
        [*train, "--dry-run"],
        ["export", run, run],
        ["sample", run, "--prompt", "a", "--out", run],
        ["profile", recipe, "--out", run],
        ["tiny", "build", run],
    ]


def test_a_second_writer_is_refused_and_leaves_no_trace(live, tmp_path, capsys, monkeypatch) -> None:
    base, process = live
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to(base / "run")
    before = snapshot(base)
    assert "run/checkpoints/.step-000009.partial" in before
    for argv in [*seconds(base), ["train", str(base / "toy.toml"), "--out", "link/", "--resume", "auto"]]:
        assert main(argv) == 2, argv
        said = capsys.readouterr().err
        assert f"process {process.pid} on {os.uname().nodename} (adagrpo train) since 20" in said, (argv, said)
        assert snapshot(base) == before, argv
    assert process.poll() is None


@pytest.mark.parametrize("resume", ["", "latest", "auto", "checkpoints/step-000002"])
def test_an_owner_that_has_written_nothing_yet_is_named(resume: str, tmp_path, capsys) -> None:
    from adagrpo.disk.lock import OwnerLock, holding

    config = dataclasses.replace(toy_config(), name="toy")
    (tmp_path / "toy.toml").write_text(to_toml(config))
    out = tmp_path / "run"
    with holding(OwnerLock(out, "train", "")):
        before = snapshot(tmp_path)
        command = ["train", str(tmp_path / "toy.toml"), "--out", str(out), *(["--resume", resume] if resume else [])]
        assert main(command) == 2
        assert f"in use by process {os.getpid()} on " in capsys.readouterr().err
        assert snapshot(tmp_path) == before


def test_readers_are_welcome(live, tmp_path, capsys) -> None:
    base, _ = live
    before = snapshot(base)
    assert main(["report", str(base / "run"), "--out", str(tmp_path / "r.html")]) == 0
    assert main(["sample", str(base / "run"), "--prompt", "a", "--out", str(tmp_path / "samples")]) == 0
    assert snapshot(base) == before
    assert sorted(p.name for p in (tmp_path / "samples").iterdir()) == ["000-000.png"]
    assert main(["report", str(base / "run")]) == 0
    assert snapshot(base).keys() - before.keys() == {"run/report.html"}
    (base / "run" / "report.html").unlink()


def test_a_killed_run_is_free_at_once(live, capsys) -> None:
    base, process = live
    process.send_signal(signal.SIGKILL)
    process.wait()
    command = ["train", str(base / "toy.toml"), "--out", str(base / "run"), "--resume", "latest", "--train.seed", "7"]
    assert main(command) == 2
    said = capsys.readouterr().err
    assert "train.seed" in said and "in use" not in said
    assert not list((base / "run").glob(".owner*"))
