"""Two ranks under a real torchrun are killed, stopped and signalled at random moments: every time the run folder says whom it
hit, or how the run ended, and the next start goes on from the last iteration that was saved.

`make proof` runs it; about ten minutes on two quiet cores.
"""

from __future__ import annotations

import dataclasses
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from toy_run import lines, recipe

from adagrpo.recipe.keys import EvaluationConfig
from adagrpo.recipe.load import to_toml

pytestmark = pytest.mark.proof

TESTS = Path(__file__).parents[1]
KILLS, HANGS, SIGNALS = 20, 5, 10
LIMIT = 120.0


class Torchrun:
    """A training on two ranks that never ends by itself, saved after every iteration."""

    def __init__(self, base: Path, restarts: int = 0, patience: int = 60) -> None:
        self.out, self.log = base / "run", base / "log.txt"
        config = recipe()
        train = dataclasses.replace(config.train, iterations=10**6, ranks_timeout=4.0)
        output = dataclasses.replace(config.output, grid_every=0)
        evaluation = EvaluationConfig(every=0, final_prompts=2, final_noises=1)
        config = dataclasses.replace(config, name="toy", train=train, output=output, evaluation=evaluation)
        (base / "recipe.toml").write_text(to_toml(config), "utf-8")
        environment = os.environ | {"PYTHONPATH": ":".join([str(TESTS), *sys.path]), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        command += ["--max-restarts", str(restarts), "--shutdown-timeout", str(patience)]
        command += ["--signals-to-handle", "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1", "-m", "adagrpo", "train"]
        command += [str(base / "recipe.toml"), "--out", str(self.out), "--resume", "auto"]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)

    def beats(self) -> list[dict[str, Any]]:
        """What both ranks say of themselves, as soon as they train and something is saved."""
        return waited_for(self._beats)

    def _beats(self) -> list[dict[str, Any]]:
        assert self.process.poll() is None, self.log.read_text()[-3000:]
        try:
            found = [json.loads((self.out / "ranks" / f"rank-{rank}.json").read_text()) for rank in range(2)]
        except (OSError, ValueError):
            return []
        return found if all(beat["iteration"] for beat in found) and self.saved() else []

    def saved(self) -> int:
        """The last iteration that is safe."""
        return max((int(path.name.removeprefix("step-")) for path in (self.out / "checkpoints").glob("step-*")), default=0)


def waited_for(find: Callable[[], Any]) -> Any:
    end = time.monotonic() + LIMIT
    while not (found := find()):
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.02)
    return found


@pytest.fixture
def base(tmp_path: Path):
    yield tmp_path
    for file in tmp_path.glob("pid-*"):  # a test that failed leaves nothing behind
        try:
            os.killpg(int(file.name.removeprefix("pid-")), signal.SIGKILL)
        except ProcessLookupError:
            continue


def begun(base: Path, **options: int) -> Torchrun:
    run = Torchrun(base, **options)
    (base / f"pid-{run.process.pid}").touch()
    return run


@pytest.mark.parametrize(
    ("number", "count", "said"),
    [
        (signal.SIGKILL, KILLS, r"is gone without a word \(killed\?\), last seen in phase .* of iteration \d+"),
        (signal.SIGSTOP, HANGS, r"hangs or lags behind \(process \d+, in phase .* of iteration \d+ since "),
    ],
)
def test_a_rank_that_is_killed_or_stopped_is_named_and_the_run_goes_on_by_itself(
    number: signal.Signals, count: int, said: str, base: Path
) -> None:
    rng, run = random.Random(int(number)), begun(base, restarts=count, patience=3)
    longest = 0.0
    for hit in range(count):
        beats, rank = run.beats(), rng.randrange(2)
        time.sleep(rng.uniform(0, 1))
        before = run.saved()
        os.kill(beats[rank]["process"]["pid"], number)
        started = time.monotonic()
        pids = {beat["process"]["pid"] for beat in beats}
        waited_for(lambda pids=pids: not any(Path(f"/proc/{pid}").exists() for pid in pids))
        longest = max(longest, time.monotonic() - started)
        waited_for(lambda run=run, pids=pids: not pids & {beat["process"]["pid"] for beat in run.beats()})
        events = lines(run.out, "events.jsonl")
        named = [event["message"] for event in events if re.search(f"rank {rank} on .* {said}", event["message"])]
        assert len(named) == len({*named}) and named, (hit, events[-3:])
        resumed = [event for event in events if event["kind"] == "resume"]
        assert len(resumed) == hit + 1 and resumed[-1]["iteration"] >= before, (hit, before, resumed[-1])
    print(f"{count} x {number.name}: all ranks had left after {longest:.1f} s at most, {run.saved()} iterations")
    run.process.send_signal(signal.SIGUSR1)
    run.process.wait(LIMIT)
    assert json.loads((run.out / "ended.json").read_text())["code"] == 138
    assert [record["iteration"] for record in lines(run.out)] == list(range(1, run.saved() + 1))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1])
def test_a_signal_to_torchrun_saves_the_last_iteration_and_is_no_reason_to_start_again(
    number: signal.Signals, base: Path
) -> None:
    rng = random.Random(int(number))
    for hit in range(SIGNALS):
        run = begun(base, restarts=1)
        run.beats()
        time.sleep(rng.uniform(0, 1))
        run.process.send_signal(number)
        run.process.wait(LIMIT)
        assert json.loads((run.out / "ended.json").read_text())["code"] == 128 + number, run.log.read_text()[-3000:]
        events = [event["kind"] for event in lines(run.out, "events.jsonl")]
        assert events.count("signal") == hit + 1 and "failure" not in events
        assert lines(run.out)[-1]["iteration"] == run.saved() > 0
        assert not (run.out / "ranks").exists()
