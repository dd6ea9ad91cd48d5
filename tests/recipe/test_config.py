"""Recipes: strict keys, readable errors, exact round trips."""

import contextlib
import dataclasses

import pytest

from adagrpo.arguments import configured
from adagrpo.errors import InputError
from adagrpo.forecast import planned_evaluations
from adagrpo.recipe.keys import Config
from adagrpo.recipe.load import load_recipe, read_recipe, recipe_names, to_toml
from adagrpo.recipe.rules import check
from adagrpo.run.changes import changed_keys, refusals
from adagrpo.study.hosts import without_adagrpo


@pytest.mark.parametrize("name", recipe_names())
def test_shipped_recipes_are_valid_and_round_trip(name: str, tmp_path) -> None:
    config = load_recipe(name)
    check(config)
    assert config.name == name
    file = tmp_path / "copy.toml"
    file.write_text(to_toml(config), "utf-8")
    assert load_recipe(file) == config


def test_the_fast_recipe_differs_by_its_probe_and_counts_within_its_budget() -> None:
    """16 steps more on 600 evaluations."""
    fast, lora = load_recipe("flux1-dev-fast"), load_recipe("flux1-dev-lora")
    assert set(changed_keys(fast, lora)) == {"name", "selection.probe"}
    without = sum(planned_evaluations(without_adagrpo(fast)).values())
    assert sum(planned_evaluations(fast).values()) / without - 1 == pytest.approx(16 / 600) and without == 600
    assert 16 / 600 < fast.budget.cheap_evaluations == 0.05


def test_official_recipe_differs_from_ours_only_where_the_released_code_does() -> None:
    ours, official = load_recipe("flux1-dev"), load_recipe("flux1-dev-official")
    changed = {
        f"{section.name}.{key.name}"
        for section in dataclasses.fields(Config)
        if dataclasses.is_dataclass(getattr(ours, section.name))
        for key in dataclasses.fields(getattr(ours, section.name))
        if getattr(getattr(ours, section.name), key.name) != getattr(getattr(official, section.name), key.name)
    }
    assert changed == {
        "rollout.fork_velocity", "loss.old_logp", "loss.average", "model.timestep", "train.steps_per_iteration",
        "selection.capability",
    }  # fmt: skip


def test_official_recipe_of_adapters_differs_from_the_full_one_where_the_released_code_does() -> None:
    full, adapters = load_recipe("flux1-dev-official"), load_recipe("flux1-dev-official-lora")
    changed = changed_keys(full, adapters)
    assert set(changed) == {
        "name", "model.tuning", "model.lora_targets", "loss.average", "train.steps_per_iteration", "optimizer.lr"
    }  # fmt: skip
    assert adapters.train.steps_per_iteration == 1 and adapters.optimizer.lr == 1e-4
    attention, feed_forward = (
        Config().model.lora_targets,
        {"ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2"},
    )
    assert set(adapters.model.lora_targets) == {*attention, *feed_forward}
    check(adapters)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[train]\niteration = 3", ["train.iteration", "did you mean iterations"]),
        ("[trian]\niterations = 3", ["trian", "did you mean train"]),
        ("[train]\niterations = '3'", ["train.iterations", "a whole number"]),
        ("[train]\niterations = true", ["train.iterations", "a whole number"]),
        ("[model]\ndtype = 'bf17'", ["model.dtype", "did you mean bf16"]),
        ("[rollout]\nsde_steps = 3", ["rollout.sde_steps", "a list"]),
        ("[optimizer]\nbetas = [0.9]", ["optimizer.betas", "2 values"]),
        ("[[rewards]]\nname = 'tiny'\nweigth = 2", ["rewards.0.weigth", "did you mean weight"]),
        ("train = 3", ["train", "a table"]),
        ("[train", ["not valid TOML"]),
    ],
)
def test_bad_files_name_file_key_and_remedy(text: str, words: list[str], tmp_path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text(text, "utf-8")
    with pytest.raises(InputError) as error:
        load_recipe(file)
    assert all(word in str(error.value) for word in [str(file), *words]), str(error.value)


def test_unknown_recipe_offers_the_nearest() -> None:
    with pytest.raises(InputError, match="did you mean flux1-dev"):
        load_recipe("flux1dev")


@pytest.mark.parametrize(
    ("section", "changes", "key"),
    [
        ("rollout", {"group_size": 1}, "rollout.group_size"),
        ("rollout", {"sde_steps": (0, 7)}, "rollout.sde_steps"),
        ("rollout", {"sde_steps": (2, 0)}, "rollout.sde_steps"),
        ("rollout", {"sde_steps": ()}, "rollout.sde_steps"),
        ("rollout", {"eta": 0.0}, "rollout.eta"),
        ("rollout", {"eta": float("nan")}, "rollout.eta"),
        ("rollout", {"scheme": "cps", "eta": 1.5}, "rollout.eta"),
        ("rollout", {"steps": 0}, "rollout.steps"),
        ("rollout", {"shift": 0.0}, "rollout.shift"),
        ("rollout", {"shift": "models"}, "rollout.shift"),
        ("rollout", {"plan": "window", "window_size": 8}, "rollout.window_size"),
        ("rollout", {"storage": "fp64"}, "rollout.storage"),
        ("rollout", {"plan": "trajectory"}, "loss.old_logp"),
        ("rollout", {"fork_velocity": "probe"}, "loss.old_logp"),
        ("rollout", {"shared_noise": True}, "rollout.shared_noise"),
        ("selection", {"alpha": 1.0}, "selection.alpha"),
        ("selection", {"candidates": 0}, "selection.candidates"),
        ("selection", {"candidates": 1, "strategy": "easiest"}, "selection.candidates"),
        ("train", {"steps_per_iteration": 3}, "train.steps_per_iteration"),
        ("train", {"iterations": 0}, "train.iterations"),
        ("optimizer", {"lr": float("inf")}, "optimizer.lr"),
        ("optimizer", {"betas": (0.9, 1.0)}, "optimizer.betas.1"),
        ("evaluation", {"final_noises": 0}, "evaluation.final_noises"),
    ],
)
def test_impossible_values_are_refused_by_key(section: str, changes: dict, key: str) -> None:
    config = load_recipe("tiny")
    config = dataclasses.replace(config, **{section: dataclasses.replace(getattr(config, section), **changes)})
    with pytest.raises(InputError, match=f"^{key} = "):
        check(config)


def test_no_reward_is_refused() -> None:
    with pytest.raises(InputError, match="rewards"):
        check(dataclasses.replace(load_recipe("tiny"), rewards=()))


@pytest.mark.parametrize("path", ["flux", "./flux", "owner/flux", "tiny-flux", "random:flux1-dev"])
def test_a_variant_is_refused_only_of_built_in_models(path: str) -> None:
    config = load_recipe("tiny")
    changed = dataclasses.replace(config, model=dataclasses.replace(config.model, path=path, variant="fp16"))
    refused = (
        contextlib.nullcontext() if path.rpartition("/")[2] == "flux" else pytest.raises(InputError, match="no effect here")
    )
    with refused:
        check(changed)


def test_the_shift_is_a_number_or_the_models_own(tmp_path) -> None:
    file = tmp_path / "recipe.toml"
    for told, found in (('"model"', "model"), ("2", 2.0), ("1.5", 1.5)):
        file.write_text(f'base = "tiny"\n[rollout]\nshift = {told}\n')
        config = load_recipe(file)
        check(config)
        assert config.rollout.shift == found and type(config.rollout.shift) is type(found)
        file.write_text(to_toml(config))
        assert load_recipe(file) == config
        for word, changed in (("model", "model"), ("3.0", 3.0), ("2", 2.0)):
            shift = configured(read_recipe(file), ["--rollout.shift", word], "train").config.rollout.shift
            assert shift == changed and type(shift) is type(changed)
    for wrong in ('"models"', "true", "[3.0]"):
        file.write_text(f'base = "tiny"\n[rollout]\nshift = {wrong}\n')
        with pytest.raises(InputError, match=r"rollout\.shift = .*: expected a number"):
            load_recipe(file)
    numbered = dataclasses.replace(config, rollout=dataclasses.replace(config.rollout, shift="model"))
    assert refusals(config, numbered, changed_keys(config, numbered)) is not None
