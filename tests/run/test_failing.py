"""Of ranks that fail, each and the run folder name the first one; what ended on purpose is not started again."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from toy_run import lines, recipe

from adagrpo.disk.owner import began_at
from adagrpo.engine.heartbeat import Heartbeat, read_beats
from adagrpo.recipe.keys import GuardsConfig
from adagrpo.recipe.load import to_toml
from adagrpo.run.ended import ended_before, launch_notice, note_end
from adagrpo.run.failing import first_failure

HERE = Path(__file__).parent
CASES = (
    "raise",
    "kill the first",
    "well@1 of kill the first",
    "reward",
    "memory",
    "nan",
    "nan@1",
    "signal",
    "signal@1",
    "hang",
)


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A folder with a run of each case, what its ranks said, and ``codes.json``."""
    base = tmp_path_factory.mktemp("failing")
    config = dataclasses.replace(recipe(), name="toy", guards=GuardsConfig())
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, ranks_timeout=3.0))
    (base / "recipe.toml").write_text(to_toml(config), "utf-8")
    environment = os.environ | {"PYTHONPATH": ":".join([str(HERE.parent), *sys.path]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(HERE / "ranks_failing.py"), str(base), *CASES]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=240)
    assert done.returncode == 0, done.stderr
    rows = [line.split("\t") for line in done.stdout.splitlines()]
    (base / "codes.json").write_text(json.dumps({case: list(map(int, codes)) for case, *codes in rows}))
    return base


def codes(base: Path, case: str) -> list[int]:
    return json.loads((base / "codes.json").read_text())[case]


def said(base: Path, case: str, rank: int) -> str:
    return (base / f"{case}-{rank}.txt").read_text()


FIRST = {
    "raise": "failed first, in phase reward of iteration 2: ValueError: planted",
    "reward": "failed first, in phase reward of iteration 2: RunError: rewards.0 (parts:reward) failed: ZeroDivisionError",
    "memory": "failed first, in phase update of iteration 2: RunError: out of memory in the update",
    "hang": "hangs or lags behind (process ",
}


@pytest.mark.parametrize("case", FIRST)
def test_the_survivor_and_the_run_folder_name_the_first_failing_rank(case: str, base: Path) -> None:
    name = f"rank 1 on {os.uname().nodename} {FIRST[case]}"
    assert codes(base, case) == [1, 1]
    assert f"adagrpo, rank 0: {name}" in said(base, case, 0)
    (event,) = lines(base / case, "events.jsonl")
    assert event["kind"] == "failure" and event["iteration"] == 1 and event["message"].startswith(name)
    assert FIRST[case].replace("'", "&#x27;") in (base / case / "report.html").read_text()
    assert FIRST[case].rpartition(": ")[2] in said(base, case, 1)
    assert not (base / case / "ended.json").exists()


def test_a_rank_that_hangs_says_where_it_stands(base: Path) -> None:
    for text in (said(base, "hang", 0), said(base, "hang", 1)):
        assert "in phase reward of iteration 2 since " in text and "called from ranks_failing.py:" in text


def test_a_killed_first_rank_is_named_by_the_other_and_the_next_start_goes_on_and_writes_it_down(base: Path) -> None:
    name = f"rank 0 on {os.uname().nodename} is gone without a word (killed?), last seen in phase start of iteration 2"
    assert codes(base, "kill the first") == [-9, 1]
    assert f"adagrpo, rank 1: {name}" in said(base, "kill the first", 1)
    assert codes(base, "well@1 of kill the first") == [0, 0]
    events = lines(base / "kill the first", "events.jsonl")
    assert any(event["message"].startswith(f"the start before this one ended: {name}") for event in events)
    assert [record["iteration"] for record in lines(base / "kill the first")] == [1, 2, 3]
    assert not (base / "kill the first" / "ranks").exists()


def test_gradients_that_are_not_finite_on_one_rank_are_told_of_that_rank(base: Path) -> None:
    assert codes(base, "nan") == [3, 3]
    (event,) = lines(base / "nan", "events.jsonl")
    assert event["message"].endswith(f"; the gradients of rank 1 on {os.uname().nodename} were not")


@pytest.mark.parametrize(("case", "code"), [("nan", 3), ("signal", 138)])
def test_what_ended_on_purpose_is_not_started_again_by_torchrun(case: str, code: int, base: Path) -> None:
    assert json.loads((base / case / "ended.json").read_text())["code"] == code
    assert codes(base, case) == [code, code]
    again = codes(base, f"{case}@1")  # the one that leaves second may be told to before it has looked
    assert code in again and set(again) <= {code, 128 + signal.SIGTERM}
    assert len(lines(base / case)) == 2


def test_an_end_counts_for_restarted_attempts_only(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "ended.json").write_text('{"code": 3, "time": "2020-01-01T00:00:00+00:00"}')
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    assert ended_before(tmp_path) is None
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "2")
    assert ended_before(tmp_path) == 3 and ended_before(None) is None
    (tmp_path / "ended.json").write_text('{"code": 1, "time": "2020-01-01T00:00:00+00:00"}')
    assert ended_before(tmp_path) is None


def test_another_nodes_restart_is_known_by_an_end_since_torchrun_began(tmp_path: Path, monkeypatch) -> None:
    assert -2 < time.time() - (began_at(os.getpid()) or 0) < 3600 and began_at(2**30) is None
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    note_end(tmp_path, 138)
    assert not (tmp_path / "ended.json").exists()  # torchrun is not there to start anything again
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    note_end(tmp_path, 138)
    assert ended_before(tmp_path) == 138
    monkeypatch.delenv("TORCHELASTIC_RUN_ID")
    assert ended_before(tmp_path) is None


def test_the_rank_that_came_to_fewer_collectives_lags_behind(tmp_path: Path) -> None:
    for rank, met in enumerate((3, 3, 2)):
        beat = Heartbeat(rank)
        beat.into(tmp_path)
        beat.at("rollout", 7)
        for _ in range(met):
            with beat.waiting("the end of sampling"):
                pass
    assert [(beat.rank, beat.met, beat.iteration) for beat in read_beats(tmp_path)] == [(0, 3, 7), (1, 3, 7), (2, 2, 7)]
    told, certain = first_failure(tmp_path, 0)
    assert told.startswith("rank 2 on ") and "in phase rollout of iteration 7" in told and not certain
    assert first_failure(tmp_path, 2) == ("", False)


def test_a_start_by_torchrun_that_cannot_stop_well_is_told(tmp_path: Path) -> None:
    proc = tmp_path / str(os.getppid())
    proc.mkdir()
    (proc / "cmdline").write_bytes(b"torchrun\0--nproc-per-node\x002\0train.py\0")
    given = {"TORCHELASTIC_RUN_ID": "x", "TORCHELASTIC_SIGNALS_TO_HANDLE": "SIGTERM,SIGINT,SIGHUP,SIGQUIT"}
    told = launch_notice(given, tmp_path)
    assert "--signals-to-handle" in told and "--shutdown-timeout" in told
    assert launch_notice({}, tmp_path) == "" == launch_notice(given | {"TORCHELASTIC_RESTART_COUNT": "1"}, tmp_path)
    (proc / "cmdline").write_bytes(b"torchrun\0--shutdown_timeout=900\0train.py\0")
    assert launch_notice(given | {"TORCHELASTIC_SIGNALS_TO_HANDLE": "SIGTERM,SIGUSR1"}, tmp_path) == ""
