"""A part that hangs does not take the run with it: its time is limited, and what was trained is saved."""

import contextlib
import contextvars
import dataclasses
import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
import weakref
from pathlib import Path

import pytest
import torch
import vandals
from torch.utils.flop_counter import FlopCounterMode
from toy import half_bright, toy_config, toy_trainer
from vandals import trained, weights

from adagrpo.errors import RunError
from adagrpo.parts import isolation
from adagrpo.parts.isolation import Part, PartHung, call_part
from adagrpo.run.fit import Fit
from adagrpo.run.folder import RunFolder


def test_a_limited_call_is_the_same_call_in_another_thread() -> None:
    """Grad mode, threads, context variables, results, failures and out of memory are those of the caller's thread."""
    word = contextvars.ContextVar("word", default="none")
    word.set("here")
    seen = {}

    def part(x):
        seen.update(thread=threading.current_thread(), grad=torch.is_grad_enabled(), n=torch.get_num_threads(), word=word.get())
        vandal_switches()
        x.add_(1)
        return x

    x = torch.zeros(2)
    limited = Part("p", timeout=60)
    found = call_part(limited, part, x)
    assert found.tolist() == [1, 1] and x.tolist() == [0, 0]
    assert seen["thread"] is not threading.main_thread() and seen["word"] == "here"
    assert not seen["grad"] and seen["n"] == torch.get_num_threads()
    first = seen["thread"]
    call_part(limited, part, x)
    assert seen["thread"] is first  # kept: libraries hold handles and buffers per thread
    with pytest.raises(RunError, match="p failed: SystemExit"):
        call_part(limited, sys.exit)
    with pytest.raises(RunError, match="p failed: KeyboardInterrupt"):
        call_part(limited, raising(KeyboardInterrupt))
    with pytest.raises(torch.OutOfMemoryError):
        call_part(limited, raising(torch.OutOfMemoryError))
    call_part(limited, lambda: call_part(limited, part, x))  # a part that calls a part waits for no one but itself


def vandal_switches() -> None:
    torch.set_grad_enabled(True)
    torch.set_default_dtype(torch.float64)
    torch.rand(1)
    os.chdir("/")


def raising(error: type[BaseException]):
    def part():
        raise error

    return part


def test_what_needs_the_main_thread_is_told_how_to_get_it() -> None:
    """E.g. a library whose own time limit is an alarm signal."""
    part = lambda: signal.signal(signal.SIGALRM, lambda number, frame: None)  # noqa: E731
    with pytest.raises(RunError, match=r"main thread.*; rewards\.0\.timeout = 0 calls it in the main thread"):
        call_part(Part("p", timeout=60, timeout_key="rewards.0.timeout"), part)
    earlier = signal.getsignal(signal.SIGALRM)
    call_part(Part("p"), part)
    assert signal.getsignal(signal.SIGALRM) == earlier


def test_the_parts_tensors_are_free_once_it_failed() -> None:
    """Nothing of a call that ran out of memory may live on: the next one gets half the rows, and needs the rest."""
    alive = []

    def part(x):
        alive.append(weakref.ref(x))
        raise torch.OutOfMemoryError

    for timeout in (0, 60):
        with contextlib.suppress(torch.OutOfMemoryError):
            call_part(Part("p", timeout=timeout), part, torch.zeros(3))
    assert [x() for x in alive] == [None, None]


def test_under_a_profiler_or_a_mode_the_call_stays_where_it_is_seen() -> None:
    threads = []
    part = lambda: threads.append(threading.current_thread())  # noqa: E731
    with torch.profiler.profile():
        call_part(Part("p", timeout=60), part)
    with FlopCounterMode(display=False):
        call_part(Part("p", timeout=60), part)
    call_part(Part("p"), part)
    assert set(threads) == {threading.main_thread()}


@pytest.fixture
def released():
    """An event that hanging parts wait for; set at the end, so that their threads end too."""
    event = threading.Event()
    yield event
    event.set()


@pytest.mark.parametrize("doing", ["sleep", "compute"])
def test_a_part_that_hangs_is_left_behind(doing: str, released) -> None:
    def part(x):
        while not released.is_set():
            released.wait(60) if doing == "sleep" else x.add_(1)

    started = time.monotonic()
    with pytest.raises(PartHung, match=r"p did not return within 0\.3 s; raise rewards\.0\.timeout"):
        call_part(Part("p", timeout=0.3, timeout_key="rewards.0.timeout"), part, torch.zeros(1))
    assert time.monotonic() - started < 30
    assert call_part(Part("p", timeout=60), lambda: 3) == 3


class Hanging:
    """A reward that hangs for good in call number ``at``; with ``number`` after having the process told to stop."""

    def __init__(self, at: int, released: threading.Event, number: int = 0) -> None:
        self.at, self.released, self.number, self.calls = at, released, number, 0

    def __call__(self, images, prompts):
        self.calls += 1
        if self.calls == self.at:
            images.zero_()
            if self.number:
                os.kill(os.getpid(), self.number)
            self.released.wait()
        return half_bright(images, prompts)


def fit_of(folder, reward, timeout: float, **sections) -> Fit:
    """A toy run of four iterations, evaluated and drawn every second; it saves nothing on its own but the last."""
    config = toy_config(
        output={"grid_every": 2, "checkpoint_every": 0},
        rewards=(dataclasses.replace(toy_config().rewards[0], timeout=timeout),),
        **sections,
    )
    run = RunFolder.existing(folder, config) if (folder / "config.toml").exists() else RunFolder.fresh(folder)
    trainer = toy_trainer(config, reward=reward)
    if not (folder / "config.toml").exists():
        run.write_start(config, trainer.model.device, {})
    return Fit(trainer.config, trainer, run, ["a", "b", "c"], say=lambda line: None)


def story(fit: Fit) -> list[dict]:
    """The metrics but for times."""
    lines = (fit.run.path / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if not k.startswith("perf/")} for line in lines]


def ended_like(whole: Fit, other: Fit) -> None:
    assert story(other) == story(whole)
    file = other.run.path / "events.jsonl"
    events = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    told = "".join(event["message"] for event in events if event["kind"] == "warning")
    assert not any(word in told for word in ("missing", "damaged", "lost", "set aside", "anew")), told
    assert all(map(torch.equal, weights(other.trainer), weights(whole.trainer)))
    assert json.loads((other.run.path / "result.json").read_text()) == json.loads((whole.run.path / "result.json").read_text())


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Fit:
    """The run that nothing stops."""
    fit = fit_of(tmp_path_factory.mktemp("whole") / "run", half_bright, 0)
    fit()
    return fit


def goes_on(folder, saved, timeout: float, **sections) -> Fit:
    """The run in ``folder``, with a reward that answers, to its end."""
    fit = fit_of(folder, half_bright, timeout, **sections)
    if saved:
        fit.resume(saved)
    else:
        fit.run.restore(0)
    fit()
    return fit


# Calls: 1 the trial, 2 the initial policy, 3 the first grid; an iteration probes and rolls out, every second one then
# evaluates and draws. 4 probe, 5 rollout of iteration 1; 6, 7 of 2, 8 its evaluation, 9 its grid; 10, 11 of iteration 3.
@pytest.mark.parametrize(
    ("at", "finished", "ending"),
    [
        (4, 0, "timeout"),
        (6, 1, "timeout"),
        (7, 1, "SIGTERM"),
        (8, 2, "timeout"),
        (8, 2, "SIGTERM"),
        (9, 2, "timeout"),
        (10, 2, "SIGTERM"),
        (11, 2, "timeout"),
    ],
)
def test_a_run_whose_reward_hangs_goes_on_bitwise(
    at: int, finished: int, ending: str, tmp_path, released, monkeypatch, whole
) -> None:
    monkeypatch.setattr(isolation, "GRACE", 0.1)
    stopped, timeout = ending == "SIGTERM", 60 if ending == "SIGTERM" else 0.4
    fit = fit_of(tmp_path / "run", Hanging(at, released, signal.SIGTERM if stopped else 0), timeout)
    if stopped:
        assert fit().exit_code == 143
        assert "rewards.0 (tiny) did not return" in (fit.run.path / "events.jsonl").read_text()
    else:
        with pytest.raises(RunError, match=r"rewards\.0 \(tiny\) did not return within 0\.4 s; raise rewards\.0\.timeout"):
            fit()
    saved = fit.run.latest_checkpoint()
    assert (saved.name if saved else None) == (f"step-{finished:06d}" if finished else None)
    ended_like(whole, goes_on(tmp_path / "run", saved, 0 if stopped else 60))  # the remedy that the message names


def test_capability_and_evidence_go_back_too(tmp_path, released) -> None:
    """The memory probe has scored the third draw's uniform candidates when the rewards of its groups hang."""
    kind = {"selection": {"probe": "memory", "candidates": 3}}
    truth = fit_of(tmp_path / "whole", half_bright, 0, **kind)
    truth()

    def score(images, prompts):
        seen.append((fit.trainer.draws, len(images)))
        if fit.trainer.draws == 2 and len(images) == 16:
            released.wait()
        return half_bright(images, prompts)

    seen: list[tuple[int, int]] = []
    fit = fit_of(tmp_path / "run", score, 0.4, **kind)
    with pytest.raises(RunError, match="did not return"):
        fit()
    assert seen[-2:] == [(2, 2), (2, 16)]  # 2 slots; 2 forks of 4 each
    saved = fit.run.latest_checkpoint()
    assert saved.name == "step-000002"
    ended_like(truth, goes_on(tmp_path / "run", saved, 0.4, **kind))


def test_what_a_whole_draw_taught_goes_back_too(tmp_path, released) -> None:
    """The third draw's rewards are in the capability EMA and in the evidence when its advantage hangs."""
    kind = {"selection": {"probe": "memory", "candidates": 3}}
    truth = fit_of(tmp_path / "whole", half_bright, 0, **kind)
    truth()
    fit = fit_of(tmp_path / "run", half_bright, 0.4, **kind)
    advantage = fit.trainer.advantage

    def hanging(rewards):
        if fit.trainer.draws == 3:
            call_part(Part("advantage.function", timeout=0.2), released.wait)
        return advantage(rewards)

    fit.trainer.advantage = hanging
    with pytest.raises(RunError, match="did not return"):
        fit()
    assert int(fit.trainer.capability.count) == 2
    saved = fit.run.latest_checkpoint()
    assert saved.name == "step-000002"
    ended_like(truth, goes_on(tmp_path / "run", saved, 0.4, **kind))


def test_selections_advantages_and_prompts_that_hang_are_named() -> None:
    names = {"selection": "selection.strategy", "advantage": "advantage.function", "prompts": "data.prompts"}
    for part, key in names.items():
        with pytest.raises(RunError, match=rf"{key} = vandals:hanging_{part} did not return .* raise train\.part_timeout"):
            trained("hanging", timeout=0.2, iterations=1, **{part: f"hanging_{part}"})
    vandals.RELEASED.set()


HANGS = """
    from toy import half_bright

    CALLS = []

    def reward():
        def score(images, prompts):
            CALLS.append(1)
            while len(CALLS) == 6:  # the second iteration's probe; and never sleeps
                pass
            return half_bright(images, prompts)
        return score
"""

RECIPE = """
name = "hangs"
model = {family = "parts:model"}
data = {prompts = "parts:prompts", held_out = "parts:held_out"}
rollout = {steps = 6, sde_steps = [0, 2], group_size = 4}
selection = {candidates = 3}
train = {iterations = 3, slots = 2}
evaluation = {every = 0, final_prompts = 4, final_noises = 2}
output = {grid_every = 0, checkpoint_every = 0}
rewards = [{name = "hangs:reward", timeout = 1.0}]
"""


def test_the_process_leaves_although_the_parts_thread_runs_on(tmp_path) -> None:
    """By exit code 1, with the first iteration saved; the interpreter's own end might wait for the thread."""
    (tmp_path / "hangs.py").write_text(textwrap.dedent(HANGS), "utf-8")
    (tmp_path / "hangs.toml").write_text(RECIPE, "utf-8")
    root = Path(__file__).resolve().parents[2]
    code = os.environ.get("PYTHONPATH", f"{root}{os.pathsep}{root / 'kernels'}")
    paths = [code, str(root / "tests"), str(tmp_path)]
    done = subprocess.run(
        [sys.executable, "-m", "adagrpo", "train", str(tmp_path / "hangs.toml"), "--out", str(tmp_path / "run")],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 1, done.stderr
    assert "rewards.0 (hangs:reward) did not return within 1 s; raise rewards.0.timeout" in done.stderr
    assert [path.name for path in (tmp_path / "run" / "checkpoints").glob("step-*")] == ["step-000001"]
