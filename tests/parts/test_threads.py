"""Threads of a rank: cores over ranks, unless the user said otherwise."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from adagrpo import commands
from adagrpo.errors import RunError
from adagrpo.parts import threads
from adagrpo.parts.threads import threads_per_rank, usable_cores
from adagrpo.recipe.load import load_recipe

CALL = f"import runpy; print(runpy.run_path({threads.__file__!r})['threads_per_rank']())"


@pytest.fixture
def cores(monkeypatch) -> None:
    monkeypatch.setattr(threads, "usable_cores", lambda groups: 26)


def torchrun(folder: Path, **variables: str) -> Path:
    """Files of the kernel that tell what this process's parent was started with."""
    place = folder / str(os.getppid())
    place.mkdir()
    (place / "environ").write_bytes(b"\0".join(f"{k}={v}".encode() for k, v in variables.items()) + b"\0")
    return folder


def test_a_process_alone_keeps_what_torch_chose(cores) -> None:
    assert threads_per_rank({}) is threads_per_rank({"LOCAL_WORLD_SIZE": "1", "OMP_NUM_THREADS": "1"}) is None


@pytest.mark.parametrize(("ranks", "expected"), [("2", 13), ("8", 3), ("64", 1)])
def test_cores_are_shared(ranks: str, expected: int, cores, tmp_path: Path) -> None:
    assert threads_per_rank({"LOCAL_WORLD_SIZE": ranks}, tmp_path) == expected


def test_what_torchrun_sets_by_itself_does_not_count_and_what_the_user_sets_does(cores, tmp_path: Path) -> None:
    given = {"LOCAL_WORLD_SIZE": "8", "OMP_NUM_THREADS": "1"}
    assert threads_per_rank(given, tmp_path) is None  # nothing is known of the parent
    assert threads_per_rank(given, torchrun(tmp_path, PATH="/bin", XOMP_NUM_THREADS="1")) == 3
    assert threads_per_rank({**given, "OMP_NUM_THREADS": "4"}, tmp_path) is None


def test_what_the_user_set_to_one_stays_one(cores, tmp_path: Path) -> None:
    proc = torchrun(tmp_path, PATH="/bin", OMP_NUM_THREADS="1")
    assert threads_per_rank({"LOCAL_WORLD_SIZE": "8", "OMP_NUM_THREADS": "1"}, proc) is None


def test_a_containers_limit_counts(tmp_path: Path) -> None:
    bound = usable_cores(tmp_path)
    assert bound == len(os.sched_getaffinity(0))
    for text, expected in (("max 100000", bound), ("50000 100000", 1), ("100000000 100000", bound), ("odd", bound)):
        (tmp_path / "cpu.max").write_text(text)
        assert usable_cores(tmp_path) == expected


@pytest.mark.parametrize("threads_found", [None, 3])
def test_training_takes_them(threads_found: int | None, monkeypatch) -> None:
    """Before it joins the others."""
    before, seen = torch.get_num_threads(), []

    def joined(*args) -> None:
        seen.append(torch.get_num_threads())
        raise RunError("alone")

    monkeypatch.setattr(commands, "threads_per_rank", lambda: threads_found)
    monkeypatch.setattr(commands, "joined", joined)
    try:
        with pytest.raises(RunError, match="alone"):
            commands.train(load_recipe("tiny"), None, None)
    finally:
        torch.set_num_threads(before)
    assert seen == [threads_found or before]


@pytest.mark.parametrize("user", [None, "1"])
def test_a_real_parent_tells(user: str | None) -> None:
    """Two real processes: the parent, as torchrun, hands its child a variable that it was or was not started with."""
    parent = (
        f"import os, subprocess, sys; os.environ['OMP_NUM_THREADS'] = '1'; subprocess.run([sys.executable, '-c', {CALL!r}])"
    )
    clean = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"}
    environment = {**clean, "LOCAL_WORLD_SIZE": "64", **({} if user is None else {"OMP_NUM_THREADS": user})}
    done = subprocess.run([sys.executable, "-c", parent], capture_output=True, text=True, env=environment, timeout=60)
    assert done.stdout.strip() == ("None" if user else str(max(1, usable_cores(Path("/sys/fs/cgroup")) // 64))), done.stderr
