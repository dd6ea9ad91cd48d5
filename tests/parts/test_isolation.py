"""Nothing that a part does in its call outlives it: whatever it switches, seeds, writes or raises, the run is the same."""

import contextlib
import dataclasses
import os
import random
import signal
import types

import numpy
import pytest
import torch
import vandals
from toy import ToyModel, half_bright, toy_config, toy_trainer
from vandals import trained, weights

from adagrpo.build import build_model
from adagrpo.errors import InputError, RunError
from adagrpo.models.isolated import isolated_model
from adagrpo.recipe.load import load_recipe
from adagrpo.rewards import build_reward
from adagrpo.run.fit import Fit
from adagrpo.run.folder import RunFolder


@pytest.fixture(autouse=True)
def module(tmp_path, monkeypatch):
    (tmp_path / "leaves.py").write_text("import sys\nsys.exit(0)\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    vandals.CALLS.clear()
    yield
    while vandals.KEPT:
        vandals.KEPT.pop().__exit__(None, None, None)  # of the code that is under test, were it not isolated


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


@pytest.mark.parametrize("timeout", [0, 600])
@pytest.mark.parametrize("part", ["reward", "selection", "advantage", "model", "prompts"])
def test_a_vandal_trains_what_an_honest_part_trains(part: str, timeout: float) -> None:
    """Bit for bit: picks, rewards, weights; and the process is afterwards what it was (fixture)."""
    truth, honest = trained("honest")
    found, trainer = trained("vandal", timeout=timeout, **{part: f"vandal_{part}"})
    assert found == truth
    for a, b in zip(weights(honest), weights(trainer), strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b)
    assert vandals.CALLS


@pytest.mark.parametrize("timeout", [0, 600])
@pytest.mark.parametrize("part", ["reward", "selection", "advantage", "prompts"])
def test_parts_are_called_without_gradients(part: str, timeout: float) -> None:
    trained("vandal", iterations=1, timeout=timeout, **{part: f"vandal_{part}"})
    assert not any(vandals.CALLS)


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
    fit = Fit(trainer.config, trainer, run, ["a", "b"], say=lambda line: None)
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


class Slotted:
    """An adapter without a ``__dict__``."""

    __slots__ = ("transformer",)
    encode = decode = resize = around = trainable = save_portable = lambda self, *_: None

    def velocity(self, *_: object) -> None:
        random.seed(1)


class Wrapper:
    """An adapter that hands every question on."""

    def __init__(self) -> None:
        self.model = ToyModel()

    def __getattr__(self, name: str) -> object:
        return getattr(self.__dict__["model"], name)


def namespace() -> object:
    model = ToyModel()
    return types.SimpleNamespace(**{name: getattr(model, name) for name in dir(model) if not name.startswith("__")})


def patched() -> object:
    model = ToyModel()
    model.velocity = lambda *_: None
    return model


@pytest.mark.parametrize("make", [namespace, Wrapper, patched])
def test_adapters_whose_methods_are_not_of_their_class_are_refused(make) -> None:
    with pytest.raises(
        InputError, match=r"model\.family = x:y: the \w+ it made has .*velocity.*methods of the adapter's class"
    ):
        isolated_model(make(), "model.family = x:y")


def test_an_adapter_with_slots_is_isolated() -> None:
    model = Slotted()
    guarded = isolated_model(model, "x:y")
    before = random.getstate()
    guarded.velocity()
    assert guarded is model and random.getstate() == before
