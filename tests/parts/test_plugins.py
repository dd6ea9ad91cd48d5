"""Parts by import path: they act, and a wrong one is refused at the start, by key."""

import dataclasses
import sys
import textwrap

import pytest
import torch

from adagrpo.build import build_model, build_trainer, check_model, load_data, load_plugins
from adagrpo.cli import main
from adagrpo.engine.share import Share
from adagrpo.errors import InputError, RunError
from adagrpo.recipe.keys import DataConfig, RewardConfig
from adagrpo.recipe.load import load_recipe
from adagrpo.recipe.rules import check

MODULE = """
    import torch
    from toy import ToyModel

    class Dark:
        def __init__(self, gain=1.0):
            self.gain = gain
        def __call__(self, images, prompts):
            return self.gain * (1 - images.float().mean((1, 2, 3)))

    def prompts(count):
        return [f"thing {i}" for i in range(count)]

    def no_prompts():
        return []

    def last(scores, capability, offset=1):
        return torch.full((scores.shape[1],), scores.shape[2] - offset)

    def flat(rewards, capability, weights):
        return torch.ones_like(rewards[0])

    def model(path, dtype, device, height, width, row_noise=0.0):
        return ToyModel(dtype, row_noise)

    def sick(path, dtype, device, height, width):
        model = ToyModel(dtype)
        model.transformer.bias.data[3] = torch.nan
        return model

    def scalar(scores, capability):
        return torch.tensor(0)

    def broken(scores, capability):
        return {}["x"]

    def wrong_shape(rewards, capability, weights):
        return torch.zeros(3)

    def one_argument(scores):
        return 0

    NUMBER = 3
"""


@pytest.fixture(autouse=True)
def module(tmp_path, monkeypatch):
    (tmp_path / "myparts.py").write_text(textwrap.dedent(MODULE), "utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield
    sys.modules.pop("myparts", None)


def recipe(**sections):
    config = load_recipe("tiny")
    for section, changes in sections.items():
        config = dataclasses.replace(config, **{section: dataclasses.replace(getattr(config, section), **changes)})
    return config


def test_every_part_acts() -> None:
    config = recipe(
        model={"family": "myparts:model", "kwargs": {"row_noise": 1e-3}, "max_text_tokens": 256},
        data={"prompts": "myparts:prompts", "held_out": "myparts:prompts", "kwargs": {"count": 7}, "allow_overlap": True},
        selection={"strategy": "myparts:last", "kwargs": {"offset": 2}},
        advantage={"function": "myparts:flat"},
    )
    config = dataclasses.replace(config, rewards=(RewardConfig("myparts:Dark", kwargs={"gain": 2.0}),))
    check(config)
    trainer, held_out = build_trainer(config)
    assert len(held_out) == 7 and trainer.stream.prompts[0] == "thing 0"
    assert trainer.model.row_noise == 1e-3
    choice = trainer.probe_and_select(trainer.candidates([i % 7 for i in range(64)], Share.alone(8)))
    assert choice.picks.tolist() == [8 * slot + 6 for slot in range(8)]
    assert trainer.advantage(torch.rand(1, 4, 8))[0].unique().tolist() == [1.0]
    assert trainer.score.rewards[0].reward(torch.zeros(1, 3, 4, 4), [""]).tolist() == [2.0]
    metrics = trainer.iteration()
    assert metrics["policy/ratio_deviation"] <= 1e-6


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("selection", "strategy", "myparts:one_argument"),
        ("selection", "strategy", "myparts:NUMBER"),
        ("selection", "strategy", "myparts:nothing"),
        ("selection", "strategy", "nowhere.at_all:f"),
        ("advantage", "function", "myparts:one_argument"),
        ("model", "family", "myparts:one_argument"),
    ],
)
def test_wrong_signatures_are_refused_at_the_start(section: str, key: str, value: str, capsys) -> None:
    config = recipe(**{section: {key: value}})
    tokens = ["--model.max-text-tokens", "256"]  # of an adapter by import path, the tiny recipe's 12 would be refused first
    with pytest.raises(InputError, match=f"{section}.{key} = {value}"):
        load_plugins(config)
        check_model(config.model)
    assert main(["train", "tiny", "--dry-run", *tokens, f"--{section}.{key}", value]) == 2
    assert f"{section}.{key} = {value}" in capsys.readouterr().err


def test_kwargs_that_do_not_fit_are_refused() -> None:
    with pytest.raises(InputError, match=r"selection\.strategy = myparts:last: .*speed"):
        load_plugins(recipe(selection={"strategy": "myparts:last", "kwargs": {"speed": 1}}))
    with pytest.raises(InputError, match=r"selection\.kwargs"):
        check(recipe(selection={"kwargs": {"speed": 1}}))


@pytest.mark.parametrize("source", ["myparts:prompts", "myparts:no_prompts", "myparts:NUMBER"])
def test_prompt_sources_are_called_at_the_start(source: str) -> None:
    with pytest.raises((InputError, RunError), match=f"data.prompts = {source}"):
        load_data(recipe(data=vars(DataConfig(prompts=source))))


@pytest.mark.parametrize(
    ("section", "key", "value", "words"),
    [
        ("selection", "strategy", "myparts:scalar", r"selection\.strategy returned \(\); .* \(12,\), one index per slot"),
        ("selection", "strategy", "myparts:broken", r"selection\.strategy = myparts:broken failed: KeyError"),
        ("advantage", "function", "myparts:wrong_shape", r"advantage\.function returned \(3,\)"),
    ],
)
def test_plugins_that_fail_in_the_run_are_named(section: str, key: str, value: str, words: str) -> None:
    config = recipe(**{section: {key: value}}, model={"family": "myparts:model", "max_text_tokens": 256})
    trainer, _ = build_trainer(config)
    with pytest.raises(RunError, match=words):
        trainer.iteration()


def test_names_that_are_neither_built_in_nor_paths_offer_the_nearest() -> None:
    with pytest.raises(InputError, match="did you mean closest"):
        check(recipe(selection={"strategy": "closets"}))
    with pytest.raises(InputError, match=r"model\.family = fluxx"):
        check(recipe(model={"family": "fluxx"}))


def test_models_of_other_families_and_broken_folders_are_refused(tmp_path) -> None:
    folder = tmp_path / "other"
    folder.mkdir()
    (folder / "model_index.json").write_text('{"_class_name": "StableDiffusion3Pipeline"}')
    with pytest.raises(InputError, match=r"a StableDiffusion3Pipeline; model\.family = flux needs a FluxPipeline"):
        check_model(recipe(model={"path": str(folder)}).model)
    (folder / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    with pytest.raises(InputError, match="was saved without its transformer"):
        check_model(recipe(model={"path": str(folder)}).model)
    with pytest.raises(InputError, match="was saved without its transformer"):
        build_model(recipe(model={"path": str(folder)}).model)


def test_an_adapters_weights_that_are_not_finite_are_named() -> None:
    with pytest.raises(InputError, match=r"model\.family = myparts:sick: transformer: bias holds values that are not finite"):
        build_model(recipe(model={"family": "myparts:sick", "max_text_tokens": 256}).model)
