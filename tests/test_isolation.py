"""Nothing that a part does in its call outlives it: whatever it switches, seeds, writes or raises, the run is the same."""

import contextlib
import contextvars
import dataclasses
import json
import os
import random
import signal
import subprocess
import sys
import textwrap
import threading
import time
import weakref
from pathlib import Path

import numpy
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from toy import ToyModel, half_bright, toy_config, toy_trainer

from adagrpo import isolation
from adagrpo.build import build_model, load_data, load_plugins
from adagrpo.config import RewardConfig
from adagrpo.errors import InputError, RunError
from adagrpo.fit import Fit
from adagrpo.isolation import Part, PartHung, call_part
from adagrpo.recipe import load_recipe
from adagrpo.rewards import build_reward
from adagrpo.run.folder import RunFolder
from adagrpo.train import Trainer

MODULE = """
    import os, random, signal, sys, threading
    import numpy, torch
    from toy import PROMPTS, ToyModel, half_bright

    CALLS, KEPT = [], []

    def vandalise(*tensors):
        CALLS.append(torch.is_grad_enabled())
        for tensor in tensors:
            tensor.copy_(torch.full_like(tensor, 3))
        torch.manual_seed(1), random.seed(1), numpy.random.seed(1)
        torch.rand(3), random.random(), numpy.random.rand()
        torch.set_default_dtype(torch.float64)
        torch.set_default_device("meta")
        torch.set_num_threads(torch.get_num_threads() + 1)
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.autograd.set_detect_anomaly(True)
        torch.set_float32_matmul_precision("medium")
        torch.backends.cudnn.benchmark = True
        torch.backends.cudnn.allow_tf32 = False
        torch.backends.cuda.enable_flash_sdp(False)
        torch.backends.cuda.matmul.fp32_precision = "tf32"
        KEPT.append(torch.autocast("cpu", torch.bfloat16))
        KEPT[-1].__enter__()
        torch.set_grad_enabled(bool(len(CALLS) % 2))
        KEPT.append(torch.inference_mode())
        KEPT[-1].__enter__()
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, signal.SIG_IGN)
        os.chdir("/")

    def honest_reward():
        return half_bright

    def vandal_reward():
        vandalise()
        def score(images, prompts):
            found = half_bright(images, prompts)
            vandalise(images, prompts.text_index)
            return found
        return score

    WEIGHT = torch.nn.Parameter(torch.tensor(1.0))

    def learning_reward():
        return lambda images, prompts: half_bright(images, prompts) * WEIGHT

    def inferring_reward():
        return torch.inference_mode()(half_bright)

    def honest_selection(scores, capability):
        return scores[0].argmax(1)

    PICKS = torch.zeros(2, dtype=torch.int64)

    def vandal_selection(scores, capability):
        PICKS.copy_(honest_selection(scores, capability))  # the same buffer in every call
        vandalise(scores, capability.mean, capability.var, capability.count)
        return PICKS

    def honest_advantage(rewards, capability, weights):
        return (rewards - rewards.mean(-1, keepdim=True))[0]

    def vandal_advantage(rewards, capability, weights):
        found = honest_advantage(rewards, capability, weights)
        vandalise(rewards, capability.mean, capability.var, capability.count, weights)
        return found

    RELEASED = threading.Event()

    def hanging_selection(scores, capability):
        RELEASED.wait()

    def hanging_advantage(rewards, capability, weights):
        RELEASED.wait()

    def hanging_prompts():
        yield "a"
        RELEASED.wait()

    def honest_model(path, dtype, device, height, width):
        return ToyModel(torch.float32)

    class Vandal(ToyModel):
        def encode(self, prompts):
            found = super().encode(prompts)
            vandalise()
            return found
        def velocity(self, x, sigma, conditioning):
            found = super().velocity(x, sigma, conditioning)
            vandalise(*[] if found.requires_grad else [x, sigma, *conditioning.tensors.values()])  # no backward without
            return found
        def decode(self, x):
            found = super().decode(x)
            vandalise(x)
            return found

    def vandal_model(path, dtype, device, height, width):
        made = Vandal(torch.float32)
        vandalise()
        return made

    def held_out():
        return ["a", "b"]

    def honest_prompts():
        return PROMPTS

    def vandal_prompts():
        def some():
            vandalise()
            yield from PROMPTS
        return some()

    def leaving_prompts():
        sys.exit(0)

    def leaving_selection(scores, capability):
        sys.exit(0)

    def leaving_advantage(rewards, capability, weights):
        raise KeyboardInterrupt

    def leaving_model(path, dtype, device, height, width):
        sys.exit(0)

    class Leaving(ToyModel):
        def velocity(self, x, sigma, conditioning):
            raise GeneratorExit

    def model_that_leaves(path, dtype, device, height, width):
        return Leaving(torch.float32)

    def leaving_factory():
        sys.exit(0)

    def leaving_reward():
        return lambda images, prompts: sys.exit(0)

    def interrupting_reward():
        def score(images, prompts):
            raise KeyboardInterrupt
        return score

    def outside_selection(scores, capability):
        return torch.full((scores.shape[1],), scores.shape[2])

    def broken_selection(scores, capability):
        return torch.full((scores.shape[1],), 0.5)

    def complex_reward():
        return lambda images, prompts: torch.zeros(len(images), dtype=torch.complex64)

    def sparse_reward():
        return lambda images, prompts: torch.zeros(len(images)).to_sparse()
"""


@pytest.fixture(autouse=True)
def module(tmp_path, monkeypatch):
    (tmp_path / "vandals.py").write_text(textwrap.dedent(MODULE), "utf-8")
    (tmp_path / "leaves.py").write_text("import sys\nsys.exit(0)\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield
    for kept in reversed(getattr(sys.modules.get("vandals"), "KEPT", [])):
        kept.__exit__(None, None, None)  # of the code that is under test, were it not isolated
    sys.modules.pop("vandals", None)


@pytest.fixture(autouse=True)
def everything_restored():
    """What the process is like, before and after."""
    before = switches()
    states = torch.get_rng_state(), random.getstate(), numpy.random.get_state(legacy=True)[1].tolist()
    yield
    after = switches()
    again = torch.get_rng_state(), random.getstate(), numpy.random.get_state(legacy=True)[1].tolist()
    restore(before)
    assert after == before
    assert torch.equal(states[0], again[0]) and states[1:] == again[1:]


def switches() -> dict[str, object]:
    try:
        precision = torch.backends.cuda.matmul.allow_tf32
    except RuntimeError:
        precision = "mixed"
    return {
        "grad": torch.is_grad_enabled(),
        "inference": torch.is_inference_mode_enabled(),
        "dtype": torch.get_default_dtype(),
        "device": torch.get_default_device(),
        "threads": torch.get_num_threads(),
        "deterministic": torch.get_deterministic_debug_mode(),
        "anomaly": torch.is_anomaly_enabled(),
        "tf32": precision,
        "fp32": torch.backends.cuda.matmul.fp32_precision,
        "benchmark": torch.backends.cudnn.benchmark,
        "cudnn": torch.backends.cudnn.allow_tf32,
        "flash": torch.backends.cuda.flash_sdp_enabled(),
        "autocast": torch.is_autocast_enabled("cpu"),
        "Ctrl-C": signal.getsignal(signal.SIGINT),
        "folder": os.getcwd(),
    }


def restore(before: dict[str, object]) -> None:
    """A test that failed must not take the others with it."""
    torch.set_grad_enabled(before["grad"])
    torch.set_default_dtype(before["dtype"])
    torch.set_default_device(None)
    torch.set_num_threads(before["threads"])
    torch.set_deterministic_debug_mode(before["deterministic"])
    torch.set_anomaly_enabled(before["anomaly"])
    torch.set_float32_matmul_precision("highest")
    torch.backends.cuda.matmul.fp32_precision = before["fp32"]
    torch.backends.cudnn.benchmark = before["benchmark"]
    torch.backends.cudnn.allow_tf32 = before["cudnn"]
    torch.backends.cuda.enable_flash_sdp(before["flash"])
    torch.set_autocast_enabled("cpu", before["autocast"])
    signal.signal(signal.SIGINT, before["Ctrl-C"])
    os.chdir(before["folder"])


TIMEOUTS = "timeout" in RewardConfig.__dataclass_fields__  # not before there were time limits


def trained(
    who: str, reward: str = "honest_reward", iterations: int = 2, timeout: float = 0, **names: str
) -> tuple[list, Trainer]:
    """Metrics' rewards and the weights after a short run whose parts are ``who``'s, but for those named."""
    config = toy_config(
        model={"family": f"vandals:{names.get('model', 'honest_model')}"},
        data={"prompts": f"vandals:{names.get('prompts', 'honest_prompts')}", "held_out": "vandals:held_out"},
        selection={"strategy": f"vandals:{names.get('selection', 'honest_selection')}", "candidates": 3},
        advantage={"function": f"vandals:{names.get('advantage', 'honest_advantage')}"},
        train={"slots": 2} | ({"part_timeout": timeout} if TIMEOUTS else {}),
        rewards=(RewardConfig("tiny", **({"timeout": timeout} if TIMEOUTS else {})),),
    )
    select, fuse = load_plugins(config)
    rewards = [build_reward(f"vandals:{reward}", {}, "rewards.0")]
    trainer = Trainer(config, build_model(config.model), rewards, load_data(config)[0], select, fuse)
    seen = []
    for _ in range(iterations):
        metrics = trainer.iteration()
        seen.append([float(metrics["reward/train"]), *metrics["selection/picked"]])
    return seen, trainer


def weights(trainer: Trainer) -> list[torch.Tensor]:
    return [p.detach() for _, p in trainer.model.trainable()]


@pytest.mark.parametrize("timeout", [0, 600])
@pytest.mark.parametrize("part", ["reward", "selection", "advantage", "model", "prompts"])
def test_a_vandal_trains_what_an_honest_part_trains(part: str, timeout: float) -> None:
    """Bit for bit: picks, rewards, weights; and the process is afterwards what it was (fixture)."""
    truth, honest = trained("honest")
    found, trainer = trained("vandal", timeout=timeout, **{part: f"vandal_{part}"})
    assert found == truth
    for a, b in zip(weights(honest), weights(trainer), strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b)
    assert sys.modules["vandals"].CALLS


@pytest.mark.parametrize("timeout", [0, 600])
@pytest.mark.parametrize("part", ["reward", "selection", "advantage", "prompts"])
def test_parts_are_called_without_gradients(part: str, timeout: float) -> None:
    trained("vandal", iterations=1, timeout=timeout, **{part: f"vandal_{part}"})
    assert not any(sys.modules["vandals"].CALLS)


@pytest.mark.parametrize("reward", ["learning_reward", "inferring_reward"])
def test_rewards_with_weights_of_their_own_and_of_inference_mode_are_numbers(reward: str) -> None:
    truth, _ = trained("honest", iterations=1)
    found, trainer = trained("odd", reward, iterations=1)
    assert found == truth
    images = drawn(2, 3, 4, 4)
    score = trainer.score.score_images(images, prompt_rows(2))
    assert not score.requires_grad and not score.is_inference()
    (score * torch.ones(2, requires_grad=True)).sum().backward()


def drawn(*shape: int) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(0))


def prompt_rows(count: int):
    from adagrpo.rewards import PromptRows

    return PromptRows(["a"], torch.zeros(count, dtype=torch.int64))


def test_every_reward_of_several_sees_the_images() -> None:
    """Whoever writes into the images first; those the caller keeps are never written into."""
    seen = []

    def vandal(images, prompts):
        seen.append(images.clone())
        images.zero_()
        return torch.zeros(len(images))

    config = toy_config(rewards=tuple(dataclasses.replace(toy_config().rewards[0]) for _ in range(2)))
    trainer = toy_trainer(config, reward=vandal)
    images = drawn(2, 3, 4, 4)
    kept = images.clone()
    trainer.score.score_images(images, prompt_rows(2))
    assert torch.equal(images, kept) and all(torch.equal(s, kept) for s in seen)
    seen.clear()
    trainer.score(drawn(2, *ToyModel.latent_shape), prompt_rows(2))
    assert len(seen) == 2 and torch.equal(*seen) and bool(seen[0].any())


@pytest.mark.parametrize(
    ("names", "words"),
    [
        ({"reward": "leaving_reward"}, r"rewards\.0 \(tiny\) failed: SystemExit"),
        ({"reward": "interrupting_reward"}, r"rewards\.0 \(tiny\) failed: KeyboardInterrupt"),
        ({"reward": "leaving_factory"}, r"rewards\.0 = vandals:leaving_factory: cannot be built: SystemExit"),
        ({"selection": "leaving_selection"}, r"selection\.strategy = vandals:leaving_selection failed: SystemExit"),
        ({"advantage": "leaving_advantage"}, r"advantage\.function = vandals:leaving_advantage failed: KeyboardInterrupt"),
        ({"prompts": "leaving_prompts"}, r"data\.prompts = vandals:leaving_prompts failed: SystemExit"),
        ({"model": "leaving_model"}, r"model\.family = vandals:leaving_model failed: SystemExit"),
        ({"model": "model_that_leaves"}, r"model\.family = vandals:model_that_leaves: velocity failed: GeneratorExit"),
        ({"selection": "outside_selection"}, r"selection\.strategy returned \[3, 3\]; candidates are 0 to 2"),
        ({"selection": "broken_selection"}, r"selection\.strategy returned .*float32.* integers"),
        ({"reward": "complex_reward"}, r"rewards\.0 \(tiny\) returned .*complex64.* real numbers"),
        ({"reward": "sparse_reward"}, r"rewards\.0 \(tiny\) returned .*sparse.* dense"),
    ],
)
@pytest.mark.parametrize("timeout", [0, 600])
def test_leaving_the_process_is_a_failure_of_the_part(names: dict[str, str], words: str, timeout: float) -> None:
    earlier = signal.signal(signal.SIGINT, lambda number, frame: None)
    try:
        with pytest.raises((RunError, InputError), match=words):
            trained("leaving", iterations=1, timeout=timeout, **names)
    finally:
        signal.signal(signal.SIGINT, earlier)


def test_a_module_that_leaves_while_imported_is_named() -> None:
    with pytest.raises(InputError, match=r"rewards\.0 = leaves:reward: cannot be imported: SystemExit"):
        build_reward("leaves:reward", {}, "rewards.0")


def test_ctrl_c_in_a_part_is_ctrl_c() -> None:
    """The signal's handler raises inside the part; that is not the part's doing."""

    def interrupted(number, frame):
        raise KeyboardInterrupt

    def score(images, prompts):
        signal.raise_signal(signal.SIGINT)
        return half_bright(images, prompts)

    earlier = signal.signal(signal.SIGINT, interrupted)
    try:
        with pytest.raises(KeyboardInterrupt):
            toy_trainer(toy_config(), reward=score).iteration()
    finally:
        signal.signal(signal.SIGINT, earlier)


@pytest.mark.parametrize("noise_only", [False, True])
def test_a_reward_that_never_has_a_score_ends_the_run_at_its_start(noise_only: bool, tmp_path) -> None:
    """Noise alone proves nothing: a detector may find nothing there."""
    calls = []

    def score(images, prompts):
        calls.append(1)
        blind = not noise_only or len(calls) == 1
        return torch.full((len(images),), torch.nan) if blind else half_bright(images, prompts)

    trainer = toy_trainer(toy_config(train={"iterations": 1, "slots": 2}), reward=score)
    run = RunFolder.fresh(tmp_path / "run")
    run.write_start(trainer.config, trainer.model.device, {})
    fit = Fit(trainer, run, ["a", "b"], say=lambda line: None)
    with contextlib.nullcontext() if noise_only else pytest.raises(RunError, match=r"rewards\.0 \(tiny\) has no finite score"):
        fit()
    assert trainer.iterations_done == noise_only


def test_adapters_keep_their_kind_and_their_siblings() -> None:
    config = dataclasses.replace(load_recipe("tiny").model, family="vandals:honest_model")
    model = build_model(config)
    assert isinstance(model, ToyModel)
    sibling = model.around(ToyModel().transformer)
    x = drawn(1, *model.latent_shape)
    with torch.no_grad():
        next(iter(sibling.transformer.parameters())).add_(1)
    same, other = (m.velocity(x, torch.ones(1), m.encode(["a"])) for m in (model, sibling))
    assert not torch.equal(same, other) and same.requires_grad


def test_an_adapter_that_is_none_is_refused() -> None:
    config = dataclasses.replace(load_recipe("tiny").model, family="vandals:honest_prompts")
    with pytest.raises(InputError, match=r"model\.family"):
        build_model(config)


# ---- time limits -------------------------------------------------------------------------------------------------------


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
    return Fit(trainer, run, ["a", "b", "c"], say=lambda line: None)


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
    """The memory probe has folded the third draw's images into both when its rollout hangs."""
    kind = {"selection": {"probe": "memory", "candidates": 3}}
    truth = fit_of(tmp_path / "whole", half_bright, 0, **kind)
    truth()

    def score(images, prompts):
        if int(fit.trainer.capability.count) == 3:
            released.wait()
        return half_bright(images, prompts)

    fit = fit_of(tmp_path / "run", score, 0.4, **kind)
    with pytest.raises(RunError, match="did not return"):
        fit()
    saved = fit.run.latest_checkpoint()
    assert saved.name == "step-000002"
    ended_like(truth, goes_on(tmp_path / "run", saved, 0.4, **kind))


def test_selections_advantages_and_prompts_that_hang_are_named() -> None:
    names = {"selection": "selection.strategy", "advantage": "advantage.function", "prompts": "data.prompts"}
    for part, key in names.items():
        with pytest.raises(RunError, match=rf"{key} = vandals:hanging_{part} did not return .* raise train\.part_timeout"):
            trained("hanging", timeout=0.2, iterations=1, **{part: f"hanging_{part}"})
    sys.modules["vandals"].RELEASED.set()


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
    root = Path(__file__).resolve().parents[1]
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
