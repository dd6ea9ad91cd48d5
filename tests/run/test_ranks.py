"""A run on several ranks: the first one writes it and speaks, all decide alike, and it goes on at any number of ranks."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from ranks_pool import Pool
from toy_run import QUIET, lines, recipe

from adagrpo import commands
from adagrpo.engine.ranks import Ranks
from adagrpo.recipe.keys import Config, GuardConfig
from adagrpo.run.opening import opened_together
from adagrpo.train import Trainer


def run(ranks: Ranks, config: Config, out: Path, resume: str | None = None, fault: str = "", rank: int = 0) -> tuple[int, str]:
    """A whole training as the command does it: its exit code, and what this rank printed; ``fault`` befalls ``rank`` in its
    second iteration."""
    said = out.parent / f"said-{ranks.rank}"
    with (
        said.open("w") as file,
        contextlib.redirect_stdout(file),
        contextlib.redirect_stderr(file),
        pytest.MonkeyPatch.context() as m,
    ):
        if fault and ranks.rank == rank:
            m.setattr(Trainer, fault.partition(":")[0], FAULTS[fault](Trainer))
        with opened_together(ranks, config, out, resume) as (folder, checkpoint):
            code = commands._train(config, folder, checkpoint, ranks)
    return code, said.read_text()


def interrupted(kind: type[Trainer]):
    advantage = kind.advantage

    def method(self, rewards):
        if self.iterations_done == 1:
            os.kill(os.getpid(), signal.SIGUSR1)
        return advantage(self, rewards)

    return method


def exhausted(kind: type[Trainer]):
    reward, failed = kind.reward, []

    def method(self, *given):
        if self.iterations_done == 1 and not failed:
            failed.append(1)
            raise torch.OutOfMemoryError("CUDA out of memory")
        return reward(self, *given)

    return method


FAULTS = {"advantage": interrupted, "reward": exhausted}


@pytest.fixture(scope="module")
def pool() -> Iterator[Pool]:
    made = Pool(2)
    yield made
    made.close()


def alike(one: Path, other: Path) -> None:
    """The same records, and in the last checkpoint the same weights and level."""
    for a, b in zip(lines(one), lines(other), strict=True):
        a, b = ({key: value for key, value in record.items() if not key.startswith("ranks/")} for record in (a, b))
        assert a.keys() == b.keys()
        for key, value in a.items():
            if key != "policy/ratio_deviation" and not key.endswith(("seconds", "_calls")):
                assert b[key] == pytest.approx(value, rel=2e-4, abs=2e-5), key
    last = [torch.load(out / "checkpoints" / "step-000003" / "state" / "state.pt")["trainer"] for out in (one, other)]
    assert [state["draws"] for state in last] == [3, 3] and last[0]["stream_position"] == last[1]["stream_position"]
    for find in (
        lambda state: state["optimizer"]["masters"],
        lambda state: state["optimizer"]["averages"],
        lambda state: state["capability"],
    ):
        torch.testing.assert_close(*map(find, last), rtol=2e-4, atol=2e-5)


def test_two_ranks_write_the_run_of_one_and_it_goes_on_at_either_size(pool: Pool, tmp_path: Path) -> None:
    config, (one, two) = recipe(), (tmp_path / "one", tmp_path / "two")
    assert run(Ranks(), config, one)[0] == 0
    (code, said), (other_code, silent) = pool(run, config, two)
    assert code == other_code == 0 and "2 ranks, run folder" in said and "held-out reward" in said and silent == ""
    assert json.loads((two / "manifest.json").read_text())["ranks"] == 2
    assert names(one) == names(two)
    for record in lines(two):
        low, middle, high = (record[f"ranks/rollout_seconds_{name}"] for name in ("min", "median", "max"))
        assert 0 < low <= middle <= high and middle == pytest.approx((low + high) / 2) and record["ranks/slowest"] in (0, 1)
    alike(one, two)
    for out, go_on in ((one, lambda *given: pool(run, *given)), (two, lambda *given: [run(Ranks(), *given)])):
        resumed = tmp_path / f"{out.name}-resumed"
        shutil.copytree(out, resumed)
        assert all(code == 0 for code, _ in go_on(config, resumed, str(resumed / "checkpoints" / "step-000001")))
        alike(one, resumed)


def names(out: Path) -> list[str]:
    return sorted(str(path.relative_to(out)) for path in out.rglob("*") if path.is_file())


def test_a_signal_of_one_rank_ends_all_after_saving(pool: Pool, tmp_path: Path) -> None:
    found = pool(run, recipe(), tmp_path / "run", None, "advantage", 1)
    assert [code for code, _ in found] == [138, 138]
    assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-000001", "step-000002"]
    assert [event["kind"] for event in lines(tmp_path / "run", "events.jsonl")] == ["signal"]


def test_memory_that_runs_out_on_one_rank_halves_the_batches_of_all(pool: Pool, tmp_path: Path) -> None:
    found = pool(run, recipe(), tmp_path / "run", None, "reward", 1)
    assert [code for code, _ in found] == [0, 0]
    assert [event["kind"] for event in lines(tmp_path / "run", "events.jsonl")] == ["memory"]
    assert "engine.max_rows = 4" in lines(tmp_path / "run", "events.jsonl")[0]["message"]  # of 8: a slot's two groups of four
    assert len(lines(tmp_path / "run")) == 3


def test_a_guard_rolls_all_ranks_back_to_one_checkpoint(pool: Pool, tmp_path: Path) -> None:
    guards = dataclasses.replace(QUIET, grad_norm=GuardConfig(limit=1e-9, action="rollback", patience=2))
    config = dataclasses.replace(recipe(), guards=guards)
    assert [code for code, _ in pool(run, config, tmp_path / "run")] == [3, 3]
    kinds = [event["kind"] for event in lines(tmp_path / "run", "events.jsonl")]
    assert kinds == ["rollback", "stop"] and [record["iteration"] for record in lines(tmp_path / "run")] == [1, 2]


def test_what_the_first_rank_refuses_ends_the_others_without_a_word(pool: Pool, tmp_path: Path) -> None:
    assert pool(refused, recipe(), tmp_path) == ["InputError", "FirstRankFailed 2"]


def refused(ranks: Ranks, config: Config, out: Path) -> str:
    (out / "something").touch()
    try:
        with opened_together(ranks, config, out, None):
            raise AssertionError("the folder is none of a run")
    except (ValueError, SystemExit) as error:
        return type(error).__name__ + (f" {error.code}" if isinstance(error, SystemExit) else "")
